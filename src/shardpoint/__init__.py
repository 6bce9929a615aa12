"""Checkpoints of large PyTorch models, opened without torch.

`open` reads what ``torch.distributed.checkpoint`` (2.3 and later), ``torch.save`` and
safetensors write. Training code uses ``shardpoint.dcp``, which needs torch and is never
imported from here.
"""

__version__ = "0.1.0"
