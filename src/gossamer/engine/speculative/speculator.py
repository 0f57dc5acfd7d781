"""Whether to speculate, and how far: from what drafts were worth and what steps cost, both measured as it runs.

With a chance `a` that a draft is right, k of them give (1 - a^(k+1)) / (1 - a) tokens a step (Leviathan et al., arXiv
2211.17192, equation 1). A step of more tokens takes longer, and so do drafts: the number that gives the most tokens a
second is taken, and none where no number pays. That is a promise; what drafts did pay is measured beside it, and they
are off as well where they paid less than they took. Now and then the other way is tried, rarely where it would cost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from collections.abc import Sequence as Many
from typing import Protocol

from ...errors import EngineError
from ..sampler import Sampler
from ..scheduler import Piece
from ..sequence import Output, Sequence

MARGIN = 1.1
"""Speculation must promise so much more than none, or it is off."""
MEMORY = 0.95
"""What is kept of earlier evidence at each step."""
PRIOR_HITS, PRIOR_TRIALS = 1.2, 2.0
"""What is believed of a drafter before it was tried: drafts that are worth a trial."""
PLAIN_EVERY = 24
"""While drafts are made, one step in so many goes without: what is gained is measured, not remembered."""
TRIAL_STEPS, TRIAL_DRAFTS = 3, 2
"""While they are off, they are tried for so many steps; the first of them catches up and says little."""
SHORTEST_PAUSE, LOOK_EVERY = 48, 16
"""Steps between two trials, at least; and while they are off, between two looks at whether that is right still."""
TRIAL_SHARE = 0.01
"""Of the time: what trials may take, so that a trial that takes long comes rarely."""

GUESSED_SLOPE = 0.15
"""What a step of twice as many tokens is believed to take more, before it was tried."""
HORIZON = 128
"""Tokens of each sequence over which reading what the drafter has not read yet must pay."""
QUIET_SECONDS = 10.0
"""Between two remarks on whether drafts are made."""
MOST_SAVED = 4
"""Steps: what was gained before pays for no more of what is lost now."""

logger = logging.getLogger("gossamer.engine")


class Drafter(Protocol):
    """Something that guesses tokens."""

    name: str
    most: int

    def propose(self, sequences: Many[Sequence], samplers: Many[Sampler], count: int) -> list[list[int]]:
        """Up to `count` tokens for each sequence."""

    def behind(self, sequences: Many[Sequence]) -> float:
        """Seconds that it takes to read what it has not read of them yet."""

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""


class Rate:
    """A chance, from hits and trials of which the latest count most."""

    def __init__(self, hits: float = PRIOR_HITS, trials: float = PRIOR_TRIALS) -> None:
        self.hits, self.trials = hits, trials

    def note(self, hits: int, trials: int) -> None:
        self.hits, self.trials = MEMORY * self.hits + hits, MEMORY * self.trials + trials

    @property
    def chance(self) -> float:
        return min(0.99, self.hits / self.trials) if self.trials > 0 else 0.0


class Costs:
    """Seconds of a step by the tokens that it takes, as measured lately."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def note(self, tokens: int, seconds: float) -> None:
        before = self._seconds.get(_bucket(tokens))
        self._seconds[_bucket(tokens)] = seconds if before is None else 0.7 * before + 0.3 * seconds

    def of(self, tokens: int) -> float | None:
        """Seconds of a step of so many tokens: between those that are known, or a little more than the largest."""
        wanted = _bucket(tokens)
        below = max((b for b in self._seconds if b <= wanted), default=None)
        above = min((b for b in self._seconds if b >= wanted), default=None)
        if below is None:
            return None if above is None else self._seconds[above]
        if above is None:
            return self._seconds[below] * (1 + GUESSED_SLOPE * (wanted - below) / below)
        share = (wanted - below) / (above - below) if above > below else 0.0
        return (1 - share) * self._seconds[below] + share * self._seconds[above]


class Gain:
    """What drafts were worth lately: the time that they saved, in steps without drafts; below 0 they took more."""

    def __init__(self) -> None:
        self.saved = 0.0

    def note(self, tokens: float, cost: float) -> None:
        """A step gave so many tokens to each sequence, at the cost of so many steps without drafts."""
        self.saved = min(MOST_SAVED, MEMORY * self.saved + tokens - cost)

    def doubt(self) -> None:
        """What is known of the past says little of what comes."""
        self.saved /= 4


def _expected(chances: Many[float], count: int) -> float:
    """Tokens of a step with so many drafts for each sequence, whose drafts have these chances."""
    return sum((1 - a ** (count + 1)) / (1 - a) for a in chances)


def _bucket(tokens: int) -> int:
    """Counts that are taken for the same: exact up to 16, then in steps of an eighth."""
    size = 1
    while tokens // size > 16:
        size *= 2
    return tokens // size * size


class Speculator:
    """Has a drafter guess, and judges what that is worth."""

    def __init__(self, drafter: Drafter, most: int | None = None, adaptive: bool = True) -> None:
        """`most`: drafts of a sequence and step (None: the drafter's number); `adaptive`: off where it is slower."""
        self.drafter = drafter
        self.most = drafter.most if most is None else most
        self.adaptive = adaptive
        self.drafted = self.accepted = 0
        self.active = True
        """True while drafts are worth making."""
        self._costs = Costs()
        self._draft_seconds = Costs()
        """Of all drafts of one step, by their number."""
        self._rates: dict[Sequence, Rate] = {}
        self._overall = Rate()
        self._plain_left = 2  # steps without drafts, to begin with and now and then
        self._since_plain = 0
        self._gain = Gain()
        self._drafting = 0.0
        """Seconds that the drafts of the coming step took."""
        self._paused = 0
        self._paused_seconds = 0.0
        """Steps, and seconds of steps, since drafts were tried."""
        self._trial_left = 0
        self._told = -QUIET_SECONDS
        self._drafted_before = False

    def propose(self, running: Many[Sequence], samplers: Mapping[Sequence, Sampler]) -> None:
        """Give drafts to the sequences that decode."""
        decoding = [s for s in running if s.decodes]
        count = self._count(decoding)
        self._drafting = 0.0
        if not decoding or count == 0:
            self._drafted_before = False
            return
        began = time.perf_counter()
        guesses = self.drafter.propose(decoding, [samplers[s] for s in decoding], count)
        self._drafting = time.perf_counter() - began
        for sequence, guess in zip(decoding, guesses, strict=True):
            room = sequence.limit - sequence.generated - 1  # the last token needs no draft
            sequence.drafts = self._allowed(samplers[sequence], guess[: max(0, room)])
        made = sum(len(s.drafts) for s in decoding)
        if made and self._drafted_before:  # else it had to catch up, which `behind` accounts for
            self._draft_seconds.note(made, self._drafting)
        self._drafted_before = True

    def observe(
        self, pieces: Many[Piece], outputs: Many[Output], drafts: Mapping[Sequence, int], seconds: float
    ) -> None:
        """Learn from a step: how many drafts each sequence had, what came of them, and how long it took."""
        made = sum(drafts.values())
        if made:
            self._judge(outputs, drafts)
        if all(piece.count == 1 for piece in pieces):
            self._measure(len(pieces), len(pieces) + made, sum(len(o.tokens) for o in outputs), seconds)

    def _judge(self, outputs: Many[Output], drafts: Mapping[Sequence, int]) -> None:
        """Learn how many of each sequence's drafts were right."""
        told = {(o.request_id, o.choice): o for o in outputs}
        for sequence, made in drafts.items():
            if made:
                output = told[sequence.request_id, sequence.choice]
                right = max(0, len(output.tokens) - 1)
                self.drafted += made
                self.accepted += right
                trials = right + (right < made)
                self._overall.note(right, trials)
                if output.finish_reason is None:  # else it was forgotten already
                    self._rates.setdefault(sequence, Rate(self._overall.hits, self._overall.trials)).note(right, trials)

    def _measure(self, size: int, fed: int, tokens: int, seconds: float) -> None:
        """Take in a step of `size` sequences that did nothing but decode: tokens that it read and gave."""
        self._costs.note(fed, seconds)
        if fed == size:
            self._paused_seconds += seconds
        elif plain := self._costs.of(size):
            self._gain.note(tokens / size, (seconds + self._drafting) / plain)

    def forget(self, sequence: Sequence) -> None:
        self._rates.pop(sequence, None)
        self.drafter.forget(sequence)

    @property
    def acceptance_rate(self) -> float | None:
        """Drafted tokens that were right, or None before there were any."""
        return self.accepted / self.drafted if self.drafted else None

    def _allowed(self, sampler: Sampler, guess: list[int]) -> list[int]:
        """As much of a guess as the request's grammar allows."""
        if sampler.matcher is None:
            return guess
        try:
            return guess[: sampler.matcher.allowed(guess)]
        except EngineError:  # the step itself will meet it, and tell the request
            return []

    def _count(self, decoding: Many[Sequence]) -> int:
        """Drafts for each sequence in the coming step."""
        if not self.adaptive or not decoding:
            return self.most
        if self._plain_left > 0:
            self._plain_left -= 1
            return 0
        best = self._best(decoding) if self._gain.saved >= 0 else 0
        self._switch(best > 0)
        if best > 0:
            self._since_plain += 1
            if self._since_plain >= PLAIN_EVERY:
                self._since_plain = 0
                return 0
            return best
        return self._trial(decoding)

    def _trial(self, decoding: Many[Sequence]) -> int:
        """Drafts of a step while they do not pay: none, or a few now and then, to see whether that has changed."""
        if self._trial_left > 0:
            self._trial_left -= 1
            return min(TRIAL_DRAFTS, self.most)
        self._paused += 1
        looks = self._paused >= SHORTEST_PAUSE and self._paused % LOOK_EVERY == 0
        if looks and TRIAL_SHARE * self._paused_seconds >= self._trial_price(decoding):
            self._paused, self._paused_seconds = 0, 0.0
            self._trial_left = TRIAL_STEPS
            self._gain.doubt()
        return 0

    def _trial_price(self, decoding: Many[Sequence]) -> float:
        """Seconds that a trial is expected to lose."""
        count = min(TRIAL_DRAFTS, self.most)
        size, made = len(decoding), len(decoding) * count
        plain = self._costs.of(size) or 0.0
        drafted = (self._costs.of(size + made) or 0.0) + (self._draft_seconds.of(made) or 0.0)
        lost = drafted - plain * _expected(self._chances(decoding), count) / size
        return self.drafter.behind(decoding) + TRIAL_STEPS * max(0.0, lost)

    def _chances(self, decoding: Many[Sequence]) -> list[float]:
        """Of each sequence's drafts to be right."""
        return [self._rates.get(s, self._overall).chance for s in decoding]

    def _best(self, decoding: Many[Sequence]) -> int:
        """The number of drafts that promises the most tokens a second; 0 if none beats going without by the margin."""
        size = len(decoding)
        plain = self._costs.of(size)
        if plain is None:
            return 0
        chances = self._chances(decoding)
        best, most = 0, MARGIN * size / plain
        for count in range(1, self.most + 1):
            step = max(plain, self._costs.of(size * (1 + count)) or plain)
            rate = _expected(chances, count) / (step + (self._draft_seconds.of(size * count) or 0.0))
            if rate > most:
                best, most = count, rate
        saved = HORIZON * size * (plain / size - 1 / most)  # seconds, over the next tokens of all
        return best if best and saved > self.drafter.behind(decoding) else 0

    def _switch(self, active: bool) -> None:
        if active != self.active:
            self.active = active
            rate = self.acceptance_rate
            level = logging.DEBUG if time.monotonic() < self._told + QUIET_SECONDS else logging.INFO
            self._told = time.monotonic() if level == logging.INFO else self._told
            logger.log(
                level,
                "speculation by %s is %s: %s of the drafts were right",
                self.drafter.name, "on" if active else "off, for it would be slower",
                "none yet" if rate is None else f"{rate:.0%}",
            )  # fmt: skip
