"""Imports of large libraries whose objects the garbage collector never looks at.

torch and transformers make some 350,000 objects that live as long as the process. A full collection goes through all of
them, which takes 0.2 s here and holds all threads: a decode step of ten times its length. And while they are imported,
each collection goes through what is there already: a seventh of the time that the import takes.
"""

from __future__ import annotations

import gc
import importlib
import sys


def import_for_good(name: str) -> None:
    """Import a module that the process never gives up, unless it was. What is in memory then is never collected."""
    if name in sys.modules:
        return
    was_enabled = gc.isenabled()  # beside another such import it is not, and that one enables it again
    gc.disable()
    try:
        importlib.import_module(name)
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
