"""Keeps the KV block ids: which are free, who refers to them, which hold a prefix that can be reused.

One logical pool serves all stages: block 7 means block 7 of every stage's cache. The pool knows nothing of
sequences: callers hold tables and give back what they took.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from shardwright.types import BlockId, TokenId

PrefixKey: TypeAlias = tuple[int, tuple[TokenId, ...]]
"""The node of the blocks before, and this block's own tokens: equal keys mean equal content from position 0 on."""

ROOT_NODE = 0


class BlockPool:
    """All KV blocks: free, held (somebody refers to it) or draining (nobody does, but a step in flight uses it).

    The prefix cache is a tree: each full computed block is a node named by its parent's node and its tokens. Nodes
    are looked up by that whole key, so that a collision of hashes can't give a wrong block, and node numbers are
    never used twice, so that a child of a forgotten block can't be found under a new one.
    """

    def __init__(self, *, num_blocks: int, block_size: int, prefix_cache: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        self._pins = [0] * num_blocks  # steps in flight whose sequence gave the block back
        self._blank: list[BlockId] = list(range(num_blocks - 1, -1, -1))  # free, without content; a stack
        self._idle: dict[BlockId, None] = {}  # free, with reusable content; least recently used first
        self._nodes: dict[PrefixKey, tuple[int, BlockId]] = {}
        self._keys: list[PrefixKey | None] = [None] * num_blocks
        self._last_node = ROOT_NODE

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give now, the reusable ones among them."""
        return len(self._blank) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Free blocks whose content can be given again."""
        return len(self._idle)

    @property
    def num_draining(self) -> int:
        """Blocks that nobody refers to but that a step in flight uses."""
        return sum(1 for refs, pins in zip(self._references, self._pins, strict=True) if pins and not refs)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[BlockId] | None:
        """Take `count` blocks, each with one reference; None, and nothing taken, when fewer are free."""
        if count > self.num_free:
            return None
        return [self._take_free() for _ in range(count)]

    def _take_free(self) -> BlockId:
        if self._blank:
            block = self._blank.pop()
        else:
            block = next(iter(self._idle))
            del self._idle[block]
            self._forget(block)
        self._references[block] = 1
        return block

    def free(self, blocks: Sequence[BlockId], *, in_flight: bool) -> None:
        """Give a table's references back.

        With `in_flight`, a step that uses the blocks is not back yet: they drain until `drained` is called with
        them. The last blocks become reusable first, because a prefix is worth more than what follows it.
        """
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} was given back twice"
            self._references[block] -= 1
            if in_flight:
                self._pins[block] += 1
            self._settle(block)

    def drained(self, blocks: Sequence[BlockId]) -> None:
        """The step that used these blocks is back."""
        for block in reversed(blocks):
            assert self._pins[block] > 0, f"block {block} does not drain"
            self._pins[block] -= 1
            self._settle(block)

    def _settle(self, block: BlockId) -> None:
        if self._references[block] or self._pins[block]:
            return
        if self._keys[block] is None:
            self._blank.append(block)
        else:
            self._idle[block] = None

    # --- prefix reuse ------------------------------------------------------------------------------

    def find_prefix(self, tokens: Sequence[TokenId], most_tokens: int | None = None) -> tuple[list[BlockId], int]:
        """The longest run of blocks that hold the beginning of `tokens`, and its node. Takes no reference.

        Together they hold at most `most_tokens`, because what comes after has to be computed in any case; that is at
        least the last token, or there would be no logits to go on from.
        """
        blocks: list[BlockId] = []
        node = ROOT_NODE
        if not self.prefix_cache:
            return blocks, node
        size = self.block_size
        most = len(tokens) - 1 if most_tokens is None else most_tokens
        for end in range(size, most + 1, size):
            found = self._nodes.get(self.key(node, tokens[end - size : end]))
            if found is None:
                break
            node, block = found
            blocks.append(block)
        return blocks, node

    def num_idle(self, blocks: Iterable[BlockId]) -> int:
        """How many of these blocks `share` would take out of the free ones."""
        return sum(1 for block in blocks if block in self._idle)

    def share(self, blocks: Iterable[BlockId]) -> None:
        """Take one more reference to each of these blocks, which `find_prefix` gave."""
        for block in blocks:
            assert self._keys[block] is not None, f"block {block} has no reusable content"
            self._idle.pop(block, None)
            self._references[block] += 1

    def register(self, parent: int, tokens: Sequence[TokenId], block: BlockId) -> int:
        """Offer a full block for reuse and give its node. Call only when the step that wrote it is back.

        Equal content that is known already keeps its block; this one stays private to its sequence.
        """
        if not self.prefix_cache:
            return ROOT_NODE
        assert self._references[block] > 0, f"block {block} is not held"
        key = self.key(parent, tokens)
        known = self._nodes.get(key)
        if known is not None:
            return known[0]
        self._last_node += 1
        self._nodes[key] = (self._last_node, block)
        self._keys[block] = key
        return self._last_node

    def key(self, parent: int, tokens: Sequence[TokenId]) -> PrefixKey:
        """The name of a full block's content, after what `parent` names."""
        return parent, tuple(tokens)

    def _forget(self, block: BlockId) -> None:
        key = self._keys[block]
        assert key is not None, f"block {block} has no content to forget"
        del self._nodes[key]
        self._keys[block] = None

    # --- invariants --------------------------------------------------------------------------------

    def is_free(self, block: BlockId) -> bool:
        """Whether the block can be given away now."""
        return not self._references[block] and not self._pins[block]

    def num_references(self, block: BlockId) -> int:
        """How many tables name the block."""
        return self._references[block]

    def check(self, tables: Iterable[Sequence[BlockId]]) -> None:
        """Assert that free + held + draining = all, and that each block has as many references as `tables` name it."""
        counted = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counted[block] += 1
        assert counted == self._references, f"blocks are named {counted} times, referred to {self._references} times"
        used = [block for block in range(self.num_blocks) if self._references[block] or self._pins[block]]
        free = {*self._blank, *self._idle}
        assert len(free) == self.num_free, "a block is free twice"
        assert free.isdisjoint(used), "a block in use is free"
        assert len(free) + len(used) == self.num_blocks, f"{len(free)} free, {len(used)} held or draining"
        assert not any(self._keys[block] for block in self._blank), "a blank block has content"
        for key, (_, block) in self._nodes.items():
            assert self._keys[block] is key, f"block {block} has other content than the prefix cache says"
