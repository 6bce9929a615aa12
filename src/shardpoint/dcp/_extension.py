"""`shardpoint.dcp.extension`, where torch's package has it: programs import it from there."""

from shardpoint.dcp.extension import *  # noqa: F403
from shardpoint.dcp.extension import __all__ as __all__
