"""Offer this machine as a worker: `python3 worker_node.py`. The same as `shardwright worker`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "src"))

from shardwright.cli.bootstrap import start_with, use_project_python  # noqa: E402  found only now

if __name__ == "__main__":
    use_project_python(ROOT, "worker_node.py")
    from shardwright.cli.console import leave
    from shardwright.cli.nodes import worker_node
    from shardwright.runtime.threads import worker_environment

    start_with(worker_environment())
    leave(worker_node())
