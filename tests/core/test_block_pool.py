"""Block ids: who holds them, when they are free again, and which prefixes they hold."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.core.block_pool import ROOT_NODE, BlockPool


def pool_of(num_blocks: int, *, prefix_cache: bool = True) -> BlockPool:
    return BlockPool(num_blocks=num_blocks, block_size=2, prefix_cache=prefix_cache)


def store(pool: BlockPool, tokens: tuple[int, ...]) -> list[int]:
    """Take blocks for these tokens, as if they were computed, and offer the full ones for reuse."""
    table = pool.allocate(pool.blocks_for(len(tokens)))
    assert table is not None
    node = ROOT_NODE
    for index in range(len(tokens) // 2):
        node = pool.register(node, tokens[2 * index : 2 * index + 2], table[index])
    return table


def test_allocation_is_all_or_nothing():
    pool = pool_of(3)
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    assert pool.allocate(0) == []
    assert pool.allocate(1) == [2]


def test_a_block_is_free_when_nobody_refers_to_it():
    pool = pool_of(4)
    table = store(pool, (1, 2, 3))
    pool.share(table[:1])
    pool.free(table, in_flight=False)
    assert pool.num_free == 3
    pool.check([table[:1]])
    pool.free(table[:1], in_flight=False)
    assert pool.num_free == 4
    pool.check([])


def test_a_block_drains_until_the_last_step_that_uses_it_is_back():
    """Two sequences with a shared block were aborted in two steps; both have to come back."""
    pool = pool_of(2)
    table = store(pool, (1, 2))
    pool.share(table)
    pool.free(table, in_flight=True)
    pool.free(table, in_flight=True)
    assert (pool.num_free, pool.num_draining) == (1, 1)
    pool.drained(table)
    assert (pool.num_free, pool.num_draining) == (1, 1)
    pool.drained(table)
    assert (pool.num_free, pool.num_draining) == (2, 0)


def test_giving_back_twice_is_a_bug():
    pool = pool_of(2)
    table = pool.allocate(1)
    pool.free(table, in_flight=False)
    with pytest.raises(AssertionError, match="given back twice"):
        pool.free(table, in_flight=False)
    with pytest.raises(AssertionError, match="does not drain"):
        pool.drained(table)


def test_a_prefix_is_found_up_to_the_block_before_the_last_token():
    pool = pool_of(4)
    table = store(pool, (1, 2, 3, 4))
    assert pool.find_prefix((1, 2, 3, 4, 5))[0] == table
    assert pool.find_prefix((1, 2, 3, 4))[0] == table[:1]
    assert pool.find_prefix((1, 2, 3, 5, 6))[0] == table[:1]
    assert pool.find_prefix((1, 2))[0] == []
    assert pool.find_prefix((2, 1, 3, 4, 5))[0] == []


def test_equal_tokens_after_another_beginning_are_other_content():
    pool = pool_of(4)
    store(pool, (1, 2, 3, 4))
    assert pool.find_prefix((3, 4, 5))[0] == []
    assert pool.find_prefix((9, 9, 3, 4, 5))[0] == []


def test_equal_content_keeps_its_first_block():
    pool = pool_of(4)
    first = store(pool, (1, 2, 3, 4))
    second = store(pool, (1, 2, 3, 4))
    assert pool.find_prefix((1, 2, 3, 4, 5))[0] == first
    pool.free(second, in_flight=False)
    pool.free(first, in_flight=False)
    assert pool.find_prefix((1, 2, 3, 4, 5))[0] == first
    pool.check([])


def test_the_longest_unused_content_is_overwritten_first_and_ends_before_beginnings():
    pool = pool_of(4)
    old = store(pool, (1, 2, 3, 4))
    new = store(pool, (5, 6, 7, 8))
    pool.free(old, in_flight=False)
    pool.free(new, in_flight=False)
    assert pool.allocate(1) == [old[1]]
    assert pool.find_prefix((1, 2, 3, 4, 5))[0] == old[:1]
    assert pool.find_prefix((5, 6, 7, 8, 9))[0] == new
    assert pool.allocate(1) == [old[0]]
    assert pool.find_prefix((1, 2, 3))[0] == []


def test_what_followed_overwritten_content_is_not_found_under_new_content():
    """Node numbers are used once: a child of a forgotten block stays lost even if its parent's content comes back."""
    pool = pool_of(3)
    table = store(pool, (1, 2, 3, 4))
    pool.share(table[1:])
    pool.free(table, in_flight=False)
    pool.allocate(2)
    again = pool.find_prefix((1, 2, 3, 4, 5))[0]
    assert again == []
    pool.check([table[1:], [2], [0]])


def test_sharing_takes_a_block_out_of_the_free_ones():
    pool = pool_of(2)
    table = store(pool, (1, 2))
    pool.free(table, in_flight=False)
    assert pool.num_idle(table) == 1
    pool.share(table)
    assert pool.num_idle(table) == 0
    assert pool.num_free == 1
    assert pool.allocate(2) is None


def test_without_the_cache_nothing_is_found():
    pool = pool_of(2, prefix_cache=False)
    store(pool, (1, 2))
    assert pool.find_prefix((1, 2, 3)) == ([], ROOT_NODE)


def test_check_sees_a_reference_that_no_table_has():
    pool = pool_of(2)
    table = pool.allocate(1)
    with pytest.raises(AssertionError, match="referred to"):
        pool.check([])
    pool.check([table])


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(1, 6)), max_size=50))
def test_any_use_keeps_the_books_and_finds_only_equal_prefixes(actions):
    """Against a plain model: what each live block holds is remembered beside the pool and compared when found."""
    pool = pool_of(8)
    tables: list[list[int]] = []
    draining: list[list[int]] = []
    content: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to and with it
    for action, which, length in actions:
        match action:
            case 0:
                tokens = tuple((which + 2 * i) % 3 for i in range(length))
                cached, node = pool.find_prefix(tokens)
                for index, block in enumerate(cached):
                    assert content[block] == tokens[: 2 * index + 2]
                missing = pool.blocks_for(length) - len(cached)
                if missing + pool.num_idle(cached) > pool.num_free:
                    continue
                pool.share(cached)
                table = cached + (pool.allocate(missing) or [])
                for index in range(len(cached), length // 2):
                    node = pool.register(node, tokens[2 * index : 2 * index + 2], table[index])
                    content[table[index]] = tokens[: 2 * index + 2]
                tables.append(table)
            case 1 if tables:
                pool.free(tables.pop(which % len(tables)), in_flight=False)
            case 2 if tables:
                table = tables.pop(which % len(tables))
                pool.free(table, in_flight=True)
                draining.append(table)
            case 3 if draining:
                pool.drained(draining.pop(which % len(draining)))
        pool.check(tables)
        assert not any(pool.is_free(block) for table in (*tables, *draining) for block in table)
