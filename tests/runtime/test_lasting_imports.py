"""What a process imports for good, the garbage collector leaves alone."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading

import pytest

from shardwright.runtime.lasting_imports import import_for_good


def run(code: str) -> list[str]:
    """In a process of its own: what is frozen there stays frozen."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout.split()


def test_what_is_imported_is_not_collected_and_what_comes_later_is():
    frozen, is_enabled, collected = run(
        """
        import gc, weakref
        from shardwright.runtime.lasting_imports import import_for_good
        import_for_good("json.tool")
        class Node: pass
        one, other = Node(), Node()
        one.other, other.one = other, one
        seen = weakref.ref(one)
        del one, other
        gc.collect()
        print(gc.get_freeze_count() > 1000, gc.isenabled(), seen() is None)
        """
    )
    assert (frozen, is_enabled, collected) == ("True", "True", "True")


def test_a_module_that_is_there_already_changes_nothing():
    before, after = run(
        """
        import gc, json
        from shardwright.runtime.lasting_imports import import_for_good
        print(gc.get_freeze_count())
        import_for_good("json")
        print(gc.get_freeze_count())
        """
    )
    assert before == after


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_is_as_before_behind_an_import_that_fails(is_enabled):
    found = run(
        f"""
        import gc
        from shardwright.runtime.lasting_imports import import_for_good
        gc.enable() if {is_enabled} else gc.disable()
        try:
            import_for_good("shardwright.no_such_module")
        except ModuleNotFoundError:
            print(gc.isenabled())
        """
    )
    assert found == [str(is_enabled)]


def test_two_such_imports_at_once_leave_the_collector_enabled():
    first = threading.Thread(target=import_for_good, args=("json.tool",))
    second = threading.Thread(target=import_for_good, args=("tomllib",))
    for thread in (first, second):
        thread.start()
    for thread in (first, second):
        thread.join()
    assert gc.isenabled()
