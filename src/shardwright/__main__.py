"""`python -m shardwright` is the same as `shardwright`."""

from shardwright.cli.app import entry

if __name__ == "__main__":
    entry()
