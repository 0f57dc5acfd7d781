"""The schedule: budgets are kept, nobody starves, turns are kept, and what blocks run out for is computed again.

`World` does what an engine does around a scheduler, without a model: it writes every place of the cache with the whole
text up to it and reads it back, and says which token follows a text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gossamer.engine.backend import BLOCK_SIZE, blocks_for
from gossamer.engine.block_manager import BlockManager, chain
from gossamer.engine.params import SamplingParams
from gossamer.engine.scheduler import PROMPT_LOGPROBS_CHUNK, Piece, Scheduler
from gossamer.engine.sequence import Sequence
from gossamer.errors import EngineError

LETTERS = 3


class NoText:
    """A stream of tokens that have no text."""

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def following(text: list[int]) -> int:
    """The token after a text."""
    return (7 * text[-1] + 3 * text[len(text) // 2] + len(text)) % LETTERS


def completed(prompt: list[int], limit: int) -> list[int]:
    text = list(prompt)
    for _ in range(limit):
        text.append(following(text))
    return text


@dataclass
class World:
    """A scheduler, the pages of its blocks, and sequences that end when they have `limit` tokens."""

    blocks: int = 100
    budget: int = 64
    most: int = 16
    reuse: bool = True
    seed: int = 0
    drafting: float = 0.0
    """Chance that a sequence that decodes has drafts in a step."""
    steps: int = 0
    paused: bool = False
    """Whether answers rested in the last step."""
    computed: int = 0
    """Tokens of all steps, drafts too."""
    fed: list[int] = field(default_factory=list)
    """Tokens of the last step, drafts too, by sequence."""
    ended: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.manager = BlockManager(self.blocks, self.reuse)
        self.scheduler = Scheduler(self.manager, self.budget, self.most)
        self.pages: list[list[tuple[int, ...] | None]] = [[None] * BLOCK_SIZE for _ in range(self.blocks)]
        self.added: dict[Sequence, int] = {}

    def add(self, prompt: list[int], limit: int, **fields: object) -> Sequence:
        sequence = Sequence(prompt, SamplingParams(max_tokens=limit, **fields), limit, (), NoText())
        sequence.digests = chain(prompt) if sequence.params.prompt_logprobs is None else []
        self.scheduler.add(sequence)
        self.added[sequence] = self.steps
        return sequence

    @property
    def rest(self) -> list[Sequence]:
        return sorted([*self.scheduler.running, *self.scheduler.waiting], key=lambda s: s.turn)

    def step(self) -> list[Piece]:
        """One step, and everything that must hold of it."""
        self._draft()
        running, preemptions = list(self.scheduler.running), self.scheduler.preemptions
        pieces = self.scheduler.schedule()
        self.steps += 1
        self.fed = [len(piece.tokens) for piece in pieces]
        self._check(pieces, running, self.scheduler.preemptions > preemptions)
        for piece in pieces:
            self._compute(piece)
        for piece in pieces:
            self._advance(piece)
        return pieces

    def drain(self) -> None:
        """Step to the end of everything, which comes."""
        most = self.steps + sum(s.prompt_tokens + s.limit for s in self.rest)
        while self.rest:
            assert self.steps < most, "it does not end"
            self.step()
        assert self.manager.used == 0

    def _draft(self) -> None:
        for sequence in self.scheduler.running:
            room = sequence.limit - sequence.generated - 1
            if sequence.decodes and room > 0 and self.rng.random() < self.drafting:
                right = completed(sequence.ids, self.rng.randint(1, min(20, room)))[len(sequence.ids) :]
                sequence.drafts = [t if self.rng.random() < 0.9 else self.rng.randrange(LETTERS) for t in right]

    def _check(self, pieces: list[Piece], before: list[Sequence], preempted: bool) -> None:
        scheduler = self.scheduler
        assert bool(pieces) == bool(self.rest)
        assert sum(len(piece.tokens) for piece in pieces) <= self.budget
        assert len(scheduler.running) <= self.most
        for queue in (scheduler.running, scheduler.waiting):
            assert [s.turn for s in queue] == sorted(s.turn for s in queue)
        served = [piece.sequence for piece in pieces]
        assert len(set(served)) == len(served)
        assert set(served) <= set(scheduler.running)
        self._check_shares(served, before)
        admitted = [s for s in scheduler.running if s not in before]
        assert not (admitted and preempted), "one was admitted while another made room"
        for sequence in scheduler.waiting:
            if any(sequence.turn < other.turn for other in admitted):
                assert self.waits_for_another(sequence), "another was admitted before its turn"
        for piece in pieces:
            assert 1 <= piece.count <= piece.sequence.missing
            fed = piece.sequence.computed + len(piece.tokens)
            assert fed <= len(piece.sequence.table.blocks) * BLOCK_SIZE

    def _check_shares(self, served: list[Sequence], before: list[Sequence]) -> None:
        """Whoever answers has a part of every step, or at least of every second one; prompts are read by turns."""
        running = self.scheduler.running
        idle = [s for s in before if s in running and s.decodes and s not in served]
        assert not (idle and self.paused), "answers rested twice"
        self.paused = bool(idle)
        reading = [s for s in running if not s.decodes]
        parts = [s in served for s in reading]
        assert parts == sorted(parts, reverse=True), "a prompt was read before its turn"
        assert served or not running

    def waits_for_another(self, sequence: Sequence) -> bool:
        """True if one that runs computes a block that this one can adopt."""
        end = (self.manager.match(chain(sequence.ids), sequence.ids) + 1) * BLOCK_SIZE
        wanted = sequence.ids[:end]
        return end < len(sequence.ids) and any(s.ids[:end] == wanted for s in self.scheduler.running)

    def _compute(self, piece: Piece) -> None:
        sequence, text = piece.sequence, [*piece.sequence.ids, *piece.drafts]
        for place in range(sequence.computed, sequence.computed + len(piece.tokens)):
            self.pages[sequence.table.blocks[place // BLOCK_SIZE]][place % BLOCK_SIZE] = tuple(text[: place + 1])
        for place in range(sequence.computed + len(piece.tokens)):
            page = self.pages[sequence.table.blocks[place // BLOCK_SIZE]]
            assert page[place % BLOCK_SIZE] == tuple(text[: place + 1]), "another text is in its blocks"
        self.computed += len(piece.tokens)

    def _advance(self, piece: Piece) -> None:
        sequence = piece.sequence
        if not piece.ends:
            self.scheduler.done(piece, sequence.computed + piece.count)
            return
        drafts = piece.drafts
        for i in range(len(drafts) + 1):
            sequence.push(following(sequence.ids))
            if sequence.finish_reason is not None or i == len(drafts) or drafts[i] != sequence.ids[-1]:
                break
        self.scheduler.done(piece, len(sequence.ids) - 1)
        assert sequence.finish_reason is not None or len(sequence.table.blocks) <= blocks_for(len(sequence.ids))
        if sequence.finish_reason is not None:
            assert sequence.ids == completed(sequence.prompt, sequence.limit)
            self.scheduler.remove(sequence)
            self.ended.append(sequence)


class Arrivals(RuleBasedStateMachine):
    """Sequences of all lengths come, some are aborted, and the cache is too small for all of them."""

    @initialize(
        blocks=st.integers(4, 24),
        most=st.integers(1, 8),
        more=st.integers(0, 40),
        reuse=st.booleans(),
        drafting=st.sampled_from([0.0, 0.5, 1.0]),
        seed=st.integers(0, 1000),
    )
    def begin(self, blocks: int, most: int, more: int, reuse: bool, drafting: float, seed: int) -> None:
        self.world = World(blocks, most + more, most, reuse, seed, drafting)

    @rule(
        letters=st.lists(st.integers(0, 1), max_size=4),
        tail=st.integers(1, BLOCK_SIZE),
        limit=st.integers(1, 60),
        told=st.sampled_from([None, None, None, 0]),
        choices=st.sampled_from([1, 1, 1, 3]),
    )
    def arrive(self, letters: list[int], tail: int, limit: int, told: int | None, choices: int) -> None:
        prompt = [letter for letter in letters for _ in range(BLOCK_SIZE)] + [2] * tail
        fits = blocks_for(len(prompt) + limit) <= self.world.blocks
        for _ in range(choices):
            if fits:
                self.world.add(prompt, limit, prompt_logprobs=told)
            else:
                with pytest.raises(EngineError, match="do not fit the KV cache"):
                    self.world.add(prompt, limit)

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()

    @precondition(lambda self: self.world.rest)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.world.rest))
        held = len(sequence.table.blocks)
        own = [b for b in sequence.table.blocks if self.world.manager._blocks[b].holders == 1]
        free = self.world.manager.free
        self.world.scheduler.remove(sequence)
        assert self.world.manager.free == free + len(own)
        assert held == 0 or not sequence.table.blocks

    @invariant()
    def blocks_are_held_by_those_who_run(self) -> None:
        held = {block for s in self.world.scheduler.running for block in s.table.blocks}
        assert self.world.manager.used == len(held)
        assert all(not s.table.blocks and s.computed == 0 for s in self.world.scheduler.waiting)

    def teardown(self) -> None:
        self.world.drain()


TestArrivals = Arrivals.TestCase
TestArrivals.settings = settings(max_examples=120, stateful_step_count=30)


def test_a_step_that_cannot_serve_all_that_run_is_refused():
    with pytest.raises(EngineError, match="8 tokens cannot serve 9 sequences"):
        Scheduler(BlockManager(4), max_batch_tokens=8, max_sequences=9)


def test_nothing_to_do_is_an_empty_step():
    assert World().step() == []


def test_decodes_are_served_first_and_prompts_by_turns_with_the_rest():
    world = World(budget=32, most=4)
    world.add([0] * 5, 50)
    world.step()
    world.add([1] * 40, 5)
    world.add([2] * 40, 5)
    found = [[(piece.sequence.prompt[0], piece.count) for piece in world.step()] for _ in range(3)]
    assert found == [[(0, 1), (1, 31)], [(0, 1), (1, 9), (2, 22)], [(0, 1), (1, 1), (2, 18)]]


def test_no_more_run_than_may():
    world = World(most=3)
    for letter in range(5):
        world.add([letter] * 4, 6)
    world.step()
    assert (len(world.scheduler.running), len(world.scheduler.waiting)) == (3, 2)
    world.drain()
    assert [s.prompt[0] for s in world.ended] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("budget", [8, 30, 64, 1000])
@pytest.mark.parametrize("reuse", [True, False])
def test_a_shared_beginning_is_computed_once(budget, reuse):
    """However the steps are cut, and though all arrive at once."""
    world = World(budget=budget, most=8, reuse=reuse)
    for tail in range(1, 6):
        world.add([0] * (4 * BLOCK_SIZE) + [tail] * tail, 3)
    world.drain()
    once = 4 * BLOCK_SIZE * (1 if reuse else 5)
    assert world.computed == once + sum(range(1, 6)) + 5 * 2  # of three tokens of an answer, two are fed
    assert world.scheduler.prefix_hits == (4 * 4 * BLOCK_SIZE if reuse else 0)
    assert [s.cached_tokens for s in world.ended] == [0, *[4 * BLOCK_SIZE if reuse else 0] * 4]


def test_nobody_waits_for_a_block_that_it_must_compute_itself():
    world = World()
    for _ in range(2):
        world.add([0] * BLOCK_SIZE, 3)  # its last token is in the only block
    world.step()
    assert len(world.scheduler.running) == 2


def test_one_that_waits_for_a_beginning_lets_others_pass():
    world = World(budget=64)
    first, second, third = world.add([0] * 120, 2), world.add([0] * 124, 2), world.add([1] * 130, 2)
    world.step()
    assert world.scheduler.running == [first]
    world.step()
    assert world.scheduler.running == [first, third]
    assert world.scheduler.waiting == [second]
    world.drain()
    assert second.cached_tokens == 112


def test_if_the_one_that_computes_a_beginning_is_aborted_another_does():
    world = World(budget=20)
    first, second = world.add([0] * 60, 2), world.add([0] * 50, 2)
    world.step()
    world.scheduler.remove(first)
    world.step()
    assert second in world.scheduler.running
    world.drain()


class TestTurns:
    def test_of_those_that_come_together_the_shortest_is_first(self):
        world = World(budget=32, most=8)
        for length in (50, 10, 30):
            world.add([length] * length, 1)
        world.drain()
        assert [s.prompt_tokens for s in world.ended] == [10, 30, 50]

    def test_a_short_one_passes_a_long_one_that_is_being_read(self):
        world = World(budget=32, most=8)
        long = world.add([0] * 640, 2)
        world.step()
        short = world.add([1] * 20, 1)
        world.step()
        assert world.ended == [short]
        assert long.computed == 32 + 12

    def test_a_long_one_lets_those_pass_that_come_while_as_many_tokens_are_computed_as_it_has(self):
        """And no more of them, though twice as much comes all the time as can be computed."""
        world = World(budget=32, most=8, reuse=False)
        long = world.add([0] * 640, 1)
        while long not in world.ended:
            world.add([1] * 31, 1)
            world.add([2] * 31, 1)
            world.step()
        passed = 640 / 32 * 2 * 31
        assert passed + 640 - 4 * 32 < world.computed < passed + 640 + 4 * 32

    def test_what_is_known_of_a_prompt_does_not_make_it_long(self):
        world = World(budget=32, most=8, blocks=200)
        world.add([0] * 640, 1)
        world.drain()
        short, known = world.add([1] * 30, 1), world.add([0] * 640, 1)
        world.drain()
        assert world.ended[1:] == [known, short]


class TestBursts:
    def test_answers_rest_in_every_second_step_while_much_is_to_be_read(self):
        world = World(budget=32, most=8)
        answering = world.add([0] * 5, 50)
        world.step()
        for letter in range(1, 5):
            world.add([letter] * 50, 1)
        served = [answering in [piece.sequence for piece in world.step()] for _ in range(6)]
        assert served == [False, True, False, True, True, True]  # 200, 168, 137, then less than four steps' worth

    def test_who_cannot_be_admitted_makes_nobody_rest(self):
        world = World(blocks=20, budget=32, most=8)
        answering = world.add([0] * 5, 50)
        world.step()
        world.add([1] * (19 * BLOCK_SIZE + 1), 1)
        for _ in range(4):
            assert [piece.sequence for piece in world.step()] == [answering]


class TestPreemption:
    def test_the_youngest_makes_room_and_gets_the_same_tokens_later(self):
        world = World(blocks=6, reuse=False)
        sequences = [world.add([letter] * 30, 40) for letter in range(2)]
        world.drain()
        assert world.scheduler.preemptions > 0
        assert world.ended == sequences  # each is compared with the text that it must have

    def test_the_oldest_is_never_preempted(self):
        world = World(blocks=6)
        oldest = world.add([0] * 30, 60)
        world.step()
        for letter in range(1, 6):
            world.add([letter] * 20, 20)
        while oldest not in world.ended:
            before = oldest.computed
            world.step()
            assert oldest.computed > before
        assert world.scheduler.preemptions > 0
        world.drain()

    def test_what_is_still_there_is_not_computed_again(self):
        world = World(blocks=7)
        world.add([0] * 10, 70)  # takes six blocks in the end
        young = world.add([1] * 10, 60)
        while not world.scheduler.preemptions:
            world.step()
        assert young.cached_tokens == 0
        assert len(young.digests) == len(young.ids) // BLOCK_SIZE > 0
        before, missing = world.computed, len(young.ids)
        while world.scheduler.waiting:
            world.step()
        assert young.computed > 0
        world.drain()
        assert world.computed - before < missing + 70 + 60

    def test_nobody_is_admitted_in_the_step_in_which_one_made_room(self):
        world = World(blocks=4)
        world.add([0] * 15, 30)
        world.add([1] * 15, 30)
        small = None
        while not world.scheduler.preemptions:
            small = small or world.add([2], 1)
            world.step()  # checks it
        world.drain()

    def test_drafts_do_not_cost_another_its_place(self):
        world = World(blocks=4)
        first, second = world.add([0] * 14, 18), world.add([1] * 14, 18)
        world.step()
        while second in world.rest:
            first.drafts = completed(first.ids, 20)[len(first.ids) :][: first.limit - first.generated - 1]
            world.step()
        assert world.scheduler.preemptions == 0


class TestDrafts:
    def test_blocks_that_only_drafts_needed_are_given_back(self):
        world = World()
        sequence = world.add([0] * 14, 40)
        world.step()
        sequence.drafts = [(t + 1) % LETTERS for t in completed(sequence.ids, 12)[len(sequence.ids) :]]
        (piece,) = world.step()
        assert len(piece.sequence.table.blocks) == 1
        assert world.manager.used == 1

    def test_prompts_have_half_of_what_decodes_leave(self):
        world = World(budget=32, most=4)
        decoding = [world.add([letter] * 4, 60) for letter in range(2)]
        world.step()
        reading = world.add([2] * 100, 5)
        for sequence in decoding:
            sequence.drafts = completed(sequence.ids, 20)[len(sequence.ids) :]
        assert world.step()[-1].sequence is reading
        assert world.fed == [1 + 15, 1, 15]

    def test_they_take_all_that_nobody_else_wants(self):
        world = World(budget=32, most=4)
        decoding = [world.add([letter] * 4, 60) for letter in range(2)]
        world.step()
        for sequence in decoding:
            sequence.drafts = completed(sequence.ids, 20)[len(sequence.ids) :]
        world.step()
        assert world.fed == [21, 11]


def test_a_prompt_whose_tokens_are_told_is_computed_in_small_pieces_and_not_looked_up():
    world = World(budget=512)
    world.add([0] * 150, 2)
    world.drain()
    world.add([0] * 150, 2, prompt_logprobs=0)
    found = [piece.count for _ in range(3) for piece in world.step()]
    assert found == [PROMPT_LOGPROBS_CHUNK, PROMPT_LOGPROBS_CHUNK, 150 - 2 * PROMPT_LOGPROBS_CHUNK]


def test_a_large_prompt_leaves_some_blocks_to_those_that_decode():
    world = World(blocks=200, budget=2000)
    first = world.add([0] * 10, 40)
    world.step()
    second = world.add([1] * (198 * BLOCK_SIZE - 1), 1)
    world.step()
    assert world.scheduler.running == [first]  # 199 are free, 198 would be taken, 2 must be left
    world.drain()
    assert world.ended == [first, second]
