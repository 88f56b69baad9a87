# ruff: noqa: T201  a script for people
"""Plays many seeds of the simulation: `python tests/sim/run.py --seeds 1000`. Exits with 1 and the seed that failed."""

import argparse
import sys
import time
from collections import Counter

from simulated_cluster import play


def main() -> int:
    """Play the seeds, show how far it is, and say what happened in them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many seeds to play")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds is {arguments.seeds}; it must be at least 1")
    counts: Counter[str] = Counter()
    began = time.perf_counter()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    for done, seed in enumerate(seeds, start=1):
        try:
            counts.update(play(seed).counts)
        except AssertionError as exc:
            print(f"\nfailed: {exc}\nagain:  python tests/sim/run.py --first {seed} --seeds 1", file=sys.stderr)
            return 1
        if sys.stdout.isatty() or done == len(seeds) or done % 100 == 0:
            end = "\r" if sys.stdout.isatty() and done < len(seeds) else "\n"
            print(f"{done}/{len(seeds)} seeds, {time.perf_counter() - began:.1f} s", end=end, flush=True)
    print("\n".join(f"  {name:15} {count:8}" for name, count in sorted(counts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
