"""One replica: the engine's own scheduler and blocks, and a clock that is told what each step took.

It does with a step's pieces what `Engine.step` does; that both make the same steps is a test. Knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.backend import blocks_for
from ..engine.block_manager import BlockManager
from ..engine.params import SamplingParams
from ..engine.scheduler import Piece, Scheduler
from ..engine.sequence import Sequence
from ..errors import UsageError
from .cost import StepCost, work_of

PLAIN = SamplingParams(ignore_eos=True)


@dataclass(frozen=True)
class ReplicaOptions:
    """As `gossamer serve` takes them. Raises UsageError."""

    kv_tokens: int = 65536
    """Tokens that the KV cache holds."""
    max_batch_tokens: int = 512
    max_sequences: int = 64
    prefix_reuse: bool = True

    def __post_init__(self) -> None:
        for name in ("kv_tokens", "max_batch_tokens", "max_sequences"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, must be 1 or more")


class _NoText:
    """Tokens of a simulation are no text."""

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


NO_TEXT = _NoText()


def make_sequence(prompt: list[int], output_tokens: int, digests: list[bytes]) -> Sequence:
    """A prompt that will get so many tokens."""
    sequence = Sequence(prompt, PLAIN, output_tokens, (), NO_TEXT)
    sequence.digests = digests
    return sequence


class Replica:
    """An engine that computes nothing. Raises EngineError as the engine does."""

    def __init__(self, options: ReplicaOptions, cost: StepCost) -> None:
        self.cost = cost
        self.blocks = BlockManager(blocks_for(options.kv_tokens), options.prefix_reuse)
        self.scheduler = Scheduler(self.blocks, options.max_batch_tokens, options.max_sequences)
        self.busy = 0.0
        """Seconds of all steps so far."""
        self.steps = 0
        self._pieces: list[Piece] = []

    @property
    def stepping(self) -> bool:
        """True from `begin` to `end`."""
        return bool(self._pieces)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; a step that has begun goes on without it."""
        self.scheduler.add(sequence)

    def begin(self) -> float:
        """Begin a step: the seconds that it will take; 0 if there is nothing to do."""
        self._pieces = self.scheduler.schedule()
        if not self._pieces:
            return 0.0
        seconds = self.cost.seconds(work_of(self._pieces))
        self.busy += seconds
        self.steps += 1
        return seconds

    def end(self) -> list[Sequence]:
        """End the step: the sequences that it gave a token."""
        told = []
        for piece in self._pieces:
            sequence = piece.sequence
            if not piece.ends:
                self.scheduler.done(piece, sequence.computed + piece.count)
                continue
            sequence.push(0)
            self.scheduler.done(piece, len(sequence.ids) - 1)
            if sequence.finish_reason is not None:
                self.scheduler.remove(sequence)
            told.append(sequence)
        self._pieces = []
        return told
