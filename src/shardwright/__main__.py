"""`python -m shardwright` is the same as `shardwright`."""

import sys

from shardwright.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
