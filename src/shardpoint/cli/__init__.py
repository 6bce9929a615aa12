"""The command line, without torch: ``shardpoint ls``, ``info`` and ``verify``."""

from shardpoint.cli._main import main

__all__ = ["main"]
