"""torch's own helpers that take state dicts out of models and optimizers and put them back."""

from torch.distributed.checkpoint.state_dict import *  # noqa: F403
from torch.distributed.checkpoint.state_dict import __all__ as __all__
