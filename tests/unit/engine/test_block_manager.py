"""Blocks of the KV cache: each is held by whom it was given to, and what is adopted holds the very tokens asked for.

A plain model stands beside the manager: pages that are written as a backend would write them, each place with the
whole text up to it, so that a block of another text shows even where its own tokens are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from gossamer.engine import block_manager
from gossamer.engine.backend import BLOCK_SIZE, blocks_for
from gossamer.engine.block_manager import BlockManager, BlockTable, chain

Text = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Kept:
    """Contents that can be adopted: in which block, and after which other contents."""

    block: int
    parent: Kept | None


@dataclass(eq=False)
class Held:
    """A table, the text in it, and how much of that was computed."""

    table: BlockTable
    text: list[int]
    computed: int
    owned: set[int] = field(default_factory=set)
    """Blocks that it was given for itself."""
    last: Kept | None = None


class Blocks(RuleBasedStateMachine):
    """Random texts of few letters come and go in a cache of a few blocks."""

    tables = Bundle("tables")

    @initialize(blocks=st.integers(2, 12))
    def begin(self, blocks: int) -> None:
        self.manager = BlockManager(blocks)
        self.pages: list[list[Text | None]] = [[None] * BLOCK_SIZE for _ in range(blocks)]
        self.held: list[Held] = []
        self.kept: dict[Text, Kept] = {}

    @rule(
        target=tables,
        letters=st.lists(st.integers(0, 1), max_size=5),
        tail=st.integers(1, BLOCK_SIZE),
        spare=st.integers(0, 1),
    )
    def adopt(self, letters: list[int], tail: int, spare: int) -> Held:
        text = [letter for letter in letters for _ in range(BLOCK_SIZE)] + [7] * tail
        digests = chain(text)
        table = self.manager.adopt(digests, text)
        count = len(table.blocks)
        assert len(table.digests) == count
        assert count * BLOCK_SIZE < len(text)
        for at, block in enumerate(table.blocks):
            assert self.pages[block] == [tuple(text[: i + 1]) for i in range(at * BLOCK_SIZE, (at + 1) * BLOCK_SIZE)]
        held = Held(table, text, count * BLOCK_SIZE, last=self.reachable(text)[-1] if count else None)
        self.check_hits(text, count)
        self.held.append(held)
        if not self.grow(held, len(text), spare):
            self.drop(held)
        return held

    @rule(held=tables, count=st.one_of(st.integers(1, 40), st.just(1000)))
    def compute(self, held: Held, count: int) -> None:
        if held not in self.held:
            return
        end = min(len(held.text), held.computed + count)
        self.write(held, held.text, held.computed, end)
        held.computed = end
        before = len(held.table.digests)
        self.manager.commit(held.table, held.text, end)
        assert held.table.digests == chain(held.text[:end])
        for at in range(before, len(held.table.digests)):
            text = tuple(held.text[: (at + 1) * BLOCK_SIZE])
            there = self.kept.get(text)
            if there is None or there.parent is not held.last:
                there = self.kept[text] = Kept(held.table.blocks[at], held.last)
            held.last = there

    @rule(held=tables, token=st.integers(0, 1), count=st.integers(1, 20))
    def decode(self, held: Held, token: int, count: int) -> None:
        if held in self.held and self.grow(held, len(held.text) + count):
            held.text += [token] * count

    @rule(held=tables, drafts=st.integers(1, 20))
    def draft_in_vain(self, held: Held, drafts: int) -> None:
        if held not in self.held or held.computed < len(held.text) - 1:
            return
        if self.grow(held, len(held.text) + drafts):
            wrong = [*held.text, *[9] * drafts]
            self.write(held, wrong, held.computed, len(wrong))
            held.computed = len(held.text) - 1
        self.manager.shrink(held.table, len(held.text))
        assert len(held.table.blocks) == blocks_for(len(held.text))
        held.owned &= set(held.table.blocks)

    @rule(held=consumes(tables))
    def release(self, held: Held) -> None:
        if held in self.held:
            self.drop(held)

    @precondition(lambda self: not self.held)
    @rule()
    def forget(self) -> None:
        self.manager.forget()
        self.kept.clear()
        self.pages = [[None] * BLOCK_SIZE for _ in self.pages]

    @invariant()
    def every_block_is_free_or_held_by_those_who_may(self) -> None:
        manager = self.manager
        holders = [0] * manager.num_blocks
        for held in self.held:
            assert len(set(held.table.blocks)) == len(held.table.blocks)
            for block in held.table.blocks:
                holders[block] += 1
        assert [block.holders for block in manager._blocks] == holders
        assert set(manager._free) == {number for number, count in enumerate(holders) if count == 0}
        assert manager.free + manager.used == manager.num_blocks
        owners = [block for held in self.held for block in held.owned]
        assert len(owners) == len(set(owners)), "a block was given to two tables"
        assert all(manager._blocks[number].digest == digest for digest, number in manager._known.items())
        assert sum(block.digest is not None for block in manager._blocks) == len(manager._known)

    @invariant()
    def what_was_computed_stays(self) -> None:
        for held in self.held:
            for place in range(held.computed):
                page = self.pages[held.table.blocks[place // BLOCK_SIZE]]
                assert page[place % BLOCK_SIZE] == tuple(held.text[: place + 1])

    def check_hits(self, text: list[int], count: int) -> None:
        """Whatever was kept and not needed for something else since is found."""
        assert count == len(self.reachable(text))

    def reachable(self, text: list[int]) -> list[Kept]:
        found: list[Kept] = []
        for end in range(BLOCK_SIZE, len(text), BLOCK_SIZE):
            kept = self.kept.get(tuple(text[:end]))
            if kept is None or kept.parent is not (found[-1] if found else None):
                break
            found.append(kept)
        return found

    def grow(self, held: Held, tokens: int, spare: int = 0) -> bool:
        before, free = list(held.table.blocks), self.manager.free
        done = self.manager.grow(held.table, tokens, spare)
        new = held.table.blocks[len(before) :]
        assert held.table.blocks[: len(before)] == before
        missing = max(0, blocks_for(tokens) - len(before))
        assert done == (missing == 0 or missing + spare <= free)
        assert len(new) == (missing if done else 0)
        assert all(block not in other.table.blocks for block in new for other in self.held if other is not held)
        held.owned.update(new)
        self.kept = {text: kept for text, kept in self.kept.items() if kept.block not in new}
        return done

    def drop(self, held: Held) -> None:
        self.manager.release(held.table)
        assert held.table == BlockTable()
        self.held.remove(held)

    def write(self, held: Held, text: list[int], start: int, end: int) -> None:
        for place in range(start, end):
            block = held.table.blocks[place // BLOCK_SIZE]
            assert block in held.owned, "a block that others hold is written"
            self.pages[block][place % BLOCK_SIZE] = tuple(text[: place + 1])


class CollidingBlocks(Blocks):
    """Digests of three values: most texts have the digest of another one, and none may be taken for it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(block_manager, "_digest", lambda parent, tokens: bytes([(sum(parent) + sum(tokens)) % 3]))

    def teardown(self) -> None:
        self.patch.undo()

    def check_hits(self, text: list[int], count: int) -> None:
        """Contents may make room for others of the same digest."""

    @rule(held=Blocks.tables, count=st.one_of(st.integers(1, 40), st.just(1000)))
    def compute(self, held: Held, count: int) -> None:
        if held in self.held:
            end = min(len(held.text), held.computed + count)
            self.write(held, held.text, held.computed, end)
            held.computed = end
            self.manager.commit(held.table, held.text, end)

    def reachable(self, text: list[int]) -> list[Kept]:
        return [Kept(-1, None)] * len(text)


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=120, stateful_step_count=40)
TestCollidingBlocks = CollidingBlocks.TestCase
TestCollidingBlocks.settings = settings(max_examples=120, stateful_step_count=40)


def put(manager: BlockManager, text: list[int]) -> BlockTable:
    """Compute a text, as far as it is not there; its table."""
    table = manager.adopt(chain(text), text)
    assert manager.grow(table, len(text))
    manager.commit(table, text, len(text))
    return table


def blocks_of(*letters: int) -> list[int]:
    """Whole blocks of one letter each, and one token more."""
    return [letter for letter in letters for _ in range(BLOCK_SIZE)] + [99]


def test_contents_are_adopted_while_held_and_afterwards():
    manager = BlockManager(8)
    first = put(manager, blocks_of(1, 2))
    second = put(manager, blocks_of(1, 3))
    assert second.blocks[0] == first.blocks[0]
    assert manager.used == 5
    shared = first.blocks[:2]
    manager.release(first)
    manager.release(second)
    assert manager.used == 0
    assert put(manager, blocks_of(1, 2)).blocks[:2] == shared


def test_the_last_token_is_never_adopted():
    manager = BlockManager(8)
    text = blocks_of(1, 2)[:-1]
    put(manager, text)
    assert len(manager.adopt(chain(text), text).blocks) == 1
    assert manager.match(chain(text), text) == 2


def test_without_reuse_nothing_is_kept():
    manager = BlockManager(8, reuse=False)
    manager.release(put(manager, blocks_of(1, 2)))
    assert manager.adopt(chain(blocks_of(1, 2)), blocks_of(1, 2)) == BlockTable()


def test_what_was_used_least_recently_goes_first_and_of_a_text_its_end():
    manager = BlockManager(6)
    old, new = blocks_of(1, 2), blocks_of(3, 4)  # with their last tokens three blocks each
    for text in (old, new, old):
        manager.release(put(manager, text))
    found = []
    taken = BlockTable()
    for tokens in range(BLOCK_SIZE, 7 * BLOCK_SIZE, BLOCK_SIZE):
        assert manager.grow(taken, tokens)
        found.append((manager.match(chain(old), old), manager.match(chain(new), new)))
    assert found == [(2, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0)]
    assert not manager.grow(taken, 7 * BLOCK_SIZE)


def test_a_copy_that_came_second_is_not_kept_but_goes_on_from_the_first():
    manager = BlockManager(12)
    text = blocks_of(1, 2, 3)
    tables = [BlockTable(), BlockTable()]
    for table in tables:
        assert manager.grow(table, len(text))
    manager.commit(tables[0], text, 2 * BLOCK_SIZE)
    manager.commit(tables[1], text, 3 * BLOCK_SIZE)
    expected = [*tables[0].blocks[:2], tables[1].blocks[2]]
    for table in tables:
        manager.release(table)
    assert put(manager, text).blocks[:3] == expected


def test_growth_is_all_or_nothing_and_leaves_what_is_to_be_spared():
    manager = BlockManager(4)
    table = BlockTable()
    assert not manager.grow(table, 3 * BLOCK_SIZE, spare=2)
    assert (table.blocks, manager.free) == ([], 4)
    assert manager.grow(table, 2 * BLOCK_SIZE, spare=2)
    assert manager.grow(table, 2 * BLOCK_SIZE, spare=99)  # it has them already
    assert not manager.grow(table, 5 * BLOCK_SIZE)


def test_what_is_forgotten_is_not_found():
    manager = BlockManager(8)
    manager.release(put(manager, blocks_of(1, 2)))
    manager.forget()
    assert manager.match(chain(blocks_of(1)), blocks_of(1)) == 0
    manager.release(put(manager, blocks_of(1, 2)))
    assert manager.match(chain(blocks_of(1, 2)), blocks_of(1, 2)) == 2


class TestCollisions:
    """Digests that mean nothing: one value for all, or one for all texts of a length."""

    def test_tokens_are_compared(self, monkeypatch):
        monkeypatch.setattr(block_manager, "_digest", lambda parent, tokens: bytes([len(parent)]))
        manager = BlockManager(8)
        put(manager, blocks_of(1))
        assert manager.match(chain(blocks_of(1)), blocks_of(1)) == 1
        assert manager.match(chain(blocks_of(2)), blocks_of(2)) == 0

    def test_a_block_is_not_taken_for_the_same_tokens_after_another_text(self, monkeypatch):
        monkeypatch.setattr(block_manager, "_digest", lambda parent, tokens: bytes(len(parent) + 1))
        manager = BlockManager(12)
        put(manager, blocks_of(1))
        put(manager, blocks_of(2, 3))  # its second block follows a digest that the first text had
        put(manager, blocks_of(1))
        assert manager.match(chain(blocks_of(1, 3)), blocks_of(1, 3)) == 1
        assert put(manager, blocks_of(2, 3)).digests == chain(blocks_of(2, 3))
