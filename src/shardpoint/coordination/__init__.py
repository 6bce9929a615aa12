"""How the ranks of one save or load speak: bytes, and every step's success or failure.

`Coordinator` has one implementation here, for a single process; the one over a torch
process group lives in the torch face. `agree`, `broadcast_result` and `gather_scatter` are
how steps run: a rank that fails still takes part in the exchange, so nobody waits for it,
and all ranks raise the same `RankFailedError`. A rank that is gone is a failed one.
`portable` makes any exception one that can be sent.
"""

from shardpoint.coordination._protocol import Coordinator, SingleProcess
from shardpoint.coordination._steps import agree, broadcast_result, gather_scatter, portable
from shardpoint.coordination._wire import Shared, WireWriter

__all__ = [
    "Coordinator",
    "Shared",
    "SingleProcess",
    "WireWriter",
    "agree",
    "broadcast_result",
    "gather_scatter",
    "portable",
]
