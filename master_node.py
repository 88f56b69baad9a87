"""Register workers and generate text on them: `python3 master_node.py --help`. The same code as `shardwright`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "src"))

from shardwright.cli.bootstrap import use_project_python  # noqa: E402  found only now

if __name__ == "__main__":
    use_project_python(ROOT, "master_node.py")
    from shardwright.cli.console import leave
    from shardwright.cli.nodes import master_node

    leave(master_node())
