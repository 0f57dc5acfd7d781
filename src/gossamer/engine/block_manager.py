"""Blocks of the KV cache: who holds them, and which contents can be used again. Knows no torch and no request.

A full block is known by a digest chained over every token up to its end, so that equal digests mean equal prefixes
(PagedAttention, Kwon et al., arXiv 2309.06180; prefix reuse as in SGLang, Zheng et al., arXiv 2312.07104). No digest is
believed: on a hit the tokens themselves are compared, and that what they follow is this very text. A block that nobody
holds keeps its contents until it is the least recently used
one and is needed for something else. Full blocks never change, so holders share them without copying.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from .backend import BLOCK_SIZE, blocks_for

ROOT = b""
"""What the digest of a first block is chained to."""


def chain(tokens: Sequence[int], parent: bytes = ROOT) -> list[bytes]:
    """A digest for each full block of these tokens, which follow what `parent` stands for."""
    digests = []
    for end in range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE):
        parent = _digest(parent, tokens[end - BLOCK_SIZE : end])
        digests.append(parent)
    return digests


def _digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


@dataclass
class BlockTable:
    """The blocks of one sequence, in the order of its tokens; only the manager changes it."""

    blocks: list[int] = field(default_factory=list)
    """Numbers of blocks; of all but the last, BLOCK_SIZE tokens each."""
    digests: list[bytes] = field(default_factory=list)
    """Of the first blocks, those whose contents are complete and known to the manager."""
    last: int = 0
    """Which contents the last of these digests stands for: what the next block follows."""


class _Block:
    """One block: how many tables hold it, and what is in it, if that is known."""

    __slots__ = ("contents", "digest", "holders", "parent", "tokens")

    def __init__(self) -> None:
        self.holders = 0
        self.digest: bytes | None = None
        self.contents = self.parent = 0  # numbers of its contents and of those before; 0 is the beginning of all texts
        self.tokens: tuple[int, ...] = ()


class BlockManager:
    """`num_blocks` blocks of BLOCK_SIZE tokens; `reuse`: keep contents for other sequences with the same prefix."""

    def __init__(self, num_blocks: int, reuse: bool = True) -> None:
        self.reuse = reuse
        self.num_blocks = num_blocks
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the first goes first
        self._known: dict[bytes, int] = {}
        self._contents = itertools.count(1)

    @property
    def free(self) -> int:
        """Blocks that nobody holds, whether contents are kept in them or not."""
        return len(self._free)

    @property
    def used(self) -> int:
        return self.num_blocks - len(self._free)

    def match(self, digests: Sequence[bytes], tokens: Sequence[int]) -> int:
        """How many blocks from the first on hold the beginning of these tokens, whose digests are given."""
        return len(self._match(digests, tokens))

    def adopt(self, digests: Sequence[bytes], tokens: Sequence[int]) -> BlockTable:
        """A table that holds the longest known beginning of these tokens; at least their last one is left out."""
        table = BlockTable()
        most = (len(tokens) - 1) // BLOCK_SIZE if self.reuse else 0
        for number in self._match(digests[:most], tokens):
            self._hold(number)
            table.blocks.append(number)
            table.last = self._blocks[number].contents
        table.digests = list(digests[: len(table.blocks)])
        return table

    def grow(self, table: BlockTable, tokens: int, spare: int = 0) -> bool:
        """Give a table the blocks that it lacks for so many tokens, or nothing if fewer than `spare` would be left."""
        missing = blocks_for(tokens) - len(table.blocks)
        if missing > 0:
            if missing + spare > len(self._free):
                return False
            table.blocks += [self._take() for _ in range(missing)]
        return True

    def shrink(self, table: BlockTable, tokens: int) -> None:
        """Take back the blocks that a table has beyond so many tokens."""
        kept = max(blocks_for(tokens), len(table.digests))
        while len(table.blocks) > kept:
            self._drop(table.blocks.pop())

    def commit(self, table: BlockTable, tokens: Sequence[int], computed: int) -> None:
        """Keep the contents of a table's full blocks, now that the first `computed` of its tokens are in the cache."""
        if not self.reuse:
            return
        while (len(table.digests) + 1) * BLOCK_SIZE <= computed:
            at = len(table.digests)
            parent = table.digests[-1] if at else ROOT
            held = tuple(tokens[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE])
            digest = _digest(parent, held)
            number = self._find(digest, table.last, held)
            if number is None:  # else another sequence was first; this copy is dropped with its holder
                number = table.blocks[at]
                self._keep(number, digest, table.last, held)
            table.digests.append(digest)
            table.last = self._blocks[number].contents

    def release(self, table: BlockTable) -> None:
        """Take all blocks of a table back; contents are kept, the beginning of the text the longest."""
        for number in reversed(table.blocks):
            self._drop(number)
        table.blocks, table.digests, table.last = [], [], 0

    def forget(self) -> None:
        """Keep no contents: they were lost, or written over by others."""
        for number in self._known.values():
            self._blocks[number].digest = None
        self._known.clear()

    def _match(self, digests: Sequence[bytes], tokens: Sequence[int]) -> list[int]:
        """The blocks that hold the longest known beginning of these tokens."""
        blocks: list[int] = []
        parent = 0
        for digest in digests:
            at = len(blocks) * BLOCK_SIZE
            number = self._find(digest, parent, tokens[at : at + BLOCK_SIZE])
            if number is None:
                break
            blocks.append(number)
            parent = self._blocks[number].contents
        return blocks

    def _find(self, digest: bytes, parent: int, tokens: Sequence[int]) -> int | None:
        """The block with this digest, if it holds these tokens after these contents."""
        number = self._known.get(digest)
        if number is None:
            return None
        block = self._blocks[number]
        return number if block.parent == parent and block.tokens == tuple(tokens) else None

    def _keep(self, number: int, digest: bytes, parent: int, tokens: tuple[int, ...]) -> None:
        """Remember what a block holds, instead of whatever had the same digest."""
        other = self._known.get(digest)
        if other is not None:
            self._blocks[other].digest = None
        block = self._blocks[number]
        block.digest, block.parent, block.tokens, block.contents = digest, parent, tokens, next(self._contents)
        self._known[digest] = number

    def _hold(self, number: int) -> None:
        block = self._blocks[number]
        block.holders += 1
        if block.holders == 1:
            del self._free[number]

    def _take(self) -> int:
        """The free block that was used least recently; what was in it is forgotten."""
        number, _ = self._free.popitem(last=False)
        block = self._blocks[number]
        if block.digest is not None:
            del self._known[block.digest]
            block.digest = None
        block.holders = 1
        return number

    def _drop(self, number: int) -> None:
        block = self._blocks[number]
        block.holders -= 1
        if block.holders == 0:
            self._free[number] = None
            if block.digest is None:  # nothing to keep: it is the first to go
                self._free.move_to_end(number, last=False)
