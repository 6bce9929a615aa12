"""torch's own helpers that take state dicts out of models and optimizers and put them back."""

from typing import Any

from torch.distributed.checkpoint import state_dict as _torchs
from torch.distributed.checkpoint.state_dict import *  # noqa: F403
from torch.distributed.checkpoint.state_dict import __all__ as __all__


def __getattr__(name: str) -> Any:  # what has an underscore, and programs import all the same
    return getattr(_torchs, name)
