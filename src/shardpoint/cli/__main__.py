"""For ``python -m shardpoint.cli``, where scripts are not on the path."""

import sys

from shardpoint.cli._main import main

if __name__ == "__main__":
    sys.exit(main())
