"""Which rank holds what of a model: shares of heads, of the feed-forward network, of the vocabulary and of the layers.

Tensor parallelism as in Megatron-LM (arXiv 1909.08053): q, k, v, gate and up are cut by rows, o and down by columns,
embedding and head by tokens of the vocabulary, so that each half of a layer ends in one sum over the ranks. Knows
shapes and formats; reads no tensor.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from ..errors import EngineError
from ..formats import Format
from ..formats.cut import Spans, cut_unit
from ..model.config import LayerConfig, ModelConfig
from ..model.families import FAMILIES, norm_parts, tensor_names
from .roofline import Stage, Work

Span: TypeAlias = tuple[int, int]
"""First, and one past the last."""

BLOCK = 32
"""Columns that kernels multiply at once: cuts at multiples of it round activations as the whole would."""


@dataclass(frozen=True)
class Cut:
    """How a rank's tensor comes out of the model's: these rows, then these columns of them (None: all)."""

    source: str
    rows: Spans | None = None
    columns: Spans | None = None
    zero: bool = False
    """All zeros instead: another rank adds it to the sum."""


@dataclass(frozen=True)
class LayerShare:
    """What one rank holds of one layer."""

    heads: Span
    """Query heads."""
    kv_heads: tuple[int, ...]
    """Key-value heads in order, each for equally many query heads; one may come several times."""
    ffn: Span
    """Columns of the feed-forward network."""

    def config(self, layer: LayerConfig) -> LayerConfig:
        """The layer as this rank sees it."""
        return replace(
            layer,
            num_heads=self.heads[1] - self.heads[0],
            num_kv_heads=len(self.kv_heads),
            ffn_width=self.ffn[1] - self.ffn[0],
        )


@dataclass(frozen=True)
class Share:
    """What one of tp * pp ranks holds."""

    config: ModelConfig
    """Of the whole model."""
    rank: int
    tp: int
    pp: int
    first_layer: int
    layers: tuple[LayerShare, ...]
    vocab: Span

    @property
    def stage(self) -> int:
        return self.rank // self.tp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def is_first(self) -> bool:
        """True if it holds (a part of) the embedding."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """True if it holds (a part of) the head."""
        return self.stage == self.pp - 1

    @property
    def rank_config(self) -> ModelConfig:
        """The smaller model that this rank computes."""
        of_model = self.config.layers[self.first_layer :]
        return replace(
            self.config,
            vocab_size=self.vocab[1] - self.vocab[0],
            layers=tuple(share.config(layer) for share, layer in zip(self.layers, of_model, strict=False)),
            tie_embeddings=self.config.tie_embeddings and self.pp == 1,
        )

    def cuts(self) -> dict[str, Cut]:
        """Tensor name in this rank's model -> where it comes from; the embedding and the head only where they are."""
        family = FAMILIES[self.config.family]
        embed, head = f"{family.embed}.weight", f"{family.head}.weight"
        vocab = (self.vocab,) if self.tp > 1 else None
        found = {embed: Cut(embed, vocab)} if self.is_first else {}
        for i, share in enumerate(self.layers):
            found |= self._layer_cuts(i, share)
        if self.is_last:
            for part in norm_parts(self.config):
                found[f"{family.final_norm}.{part}"] = Cut(f"{family.final_norm}.{part}")
            if not self.rank_config.tie_embeddings:
                found[head] = Cut(embed if self.config.tie_embeddings else head, vocab)
        return found

    def tensor_bytes(self, forms: Mapping[str, Format]) -> dict[str, int]:
        """Bytes of each tensor of this rank; `forms`: of every tensor of the model."""
        shapes = tensor_names(self.rank_config)
        return {name: forms[cut.source].nbytes(shapes[name]) for name, cut in self.cuts().items()}

    def _layer_cuts(self, index: int, share: LayerShare) -> Iterator[tuple[str, Cut]]:
        family, layer = FAMILIES[self.config.family], self.config.layers[self.first_layer + index]
        spans = _spans(share, layer.head_dim)
        for role in layer.norm_sizes(self.config.hidden_size):
            source, own = family.module(role, self.first_layer + index), family.module(role, index)
            for part in norm_parts(self.config):
                yield f"{own}.{part}", Cut(f"{source}.{part}")
        for role in layer.linear_shapes(self.config.hidden_size):
            source, own = family.module(role, self.first_layer + index), family.module(role, index)
            by_columns = role in ("o", "down")
            span = spans[role] if self.tp > 1 else None
            rows, columns = (None, span) if by_columns else (span, None)
            yield f"{own}.weight", Cut(f"{source}.weight", rows, columns)
            if layer.has_bias(role):
                yield f"{own}.bias", Cut(f"{source}.bias", rows, zero=by_columns and self.tp_rank > 0)


@dataclass(frozen=True)
class Plan:
    """Shares of all ranks: rank = stage * tp + rank within the stage."""

    config: ModelConfig
    tp: int
    pp: int
    shares: tuple[Share, ...]

    def weight_bytes(self, forms: Mapping[str, Format]) -> list[int]:
        """Bytes of weights that each rank holds; `forms`: of every tensor of the model."""
        return [sum(share.tensor_bytes(forms).values()) for share in self.shares]

    def wire_bytes_per_token(self) -> int:
        """Bytes that each rank hands to others for one token: partial sums of a stage's ring, and hidden states."""
        hidden = 4 * self.config.hidden_size
        most = max(len(share.layers) for share in self.shares)
        reductions = 2 * most + 1  # of attention and feed-forward network, and of the embedding
        ring = 2 * (self.tp - 1) / self.tp
        return int(reductions * hidden * ring) + hidden * (self.pp > 1)

    def stages(self, forms: Mapping[str, Format], kv_element_bytes: int) -> tuple[Stage, ...]:
        """What a step asks of every rank, stage by stage."""
        found = []
        for stage in range(self.pp):
            shares = self.shares[stage * self.tp : (stage + 1) * self.tp]
            ranks = tuple(step_work(s.rank_config, s.tensor_bytes(forms), s.is_last, kv_element_bytes) for s in shares)
            found.append(Stage(ranks, 2 * len(shares[0].layers) + shares[0].is_first))
        return tuple(found)


def step_work(config: ModelConfig, nbytes: Mapping[str, int], has_head: bool, kv_element_bytes: int) -> Work:
    """What a step reads and multiplies of a model, or of a rank's part of one; `nbytes`: of each of its tensors."""
    looked_up = 0 if config.tie_embeddings else nbytes.get(f"{FAMILIES[config.family].embed}.weight", 0)
    shapes = itertools.chain.from_iterable(c.linear_shapes(config.hidden_size).values() for c in config.layers)
    return Work(
        weight_bytes=sum(nbytes.values()) - looked_up,  # of an embedding that is no head, a row is read
        kv_bytes=kv_element_bytes * config.kv_elements_per_token(),
        macs=sum(map(math.prod, shapes)) + has_head * config.vocab_size * config.hidden_size,
        context_macs=sum(2 * layer.num_heads * layer.head_dim for layer in config.layers),
    )


def make_plan(
    config: ModelConfig, forms: Mapping[str, Format], tp: int, pp: int, costs: Sequence[float] | None = None
) -> Plan:
    """Cut a model in tp * pp. `forms`: how each matrix is stored; `costs`: of each layer, where they were measured.

    Raises EngineError naming the layer that cannot be cut, and the way out.
    """
    if tp < 1 or pp < 1:
        raise EngineError(f"tensor parallelism of {tp} and {pp} stages: both must be 1 or more")
    if config.positions != "rotary" or config.embed_norm:
        raise EngineError(
            f"a model of the family {config.family} cannot be cut: its positions or the norm of its embedding are not",
            hint="run it in one process",
        )
    if pp > config.num_layers:
        raise EngineError(
            f"{config.num_layers} layers cannot be {pp} stages", hint=f"take --pp {config.num_layers} or less"
        )
    if config.vocab_size < tp:
        raise EngineError(f"a vocabulary of {config.vocab_size} cannot be cut in {tp}")
    if tp > 1:
        for role in ("embed",) if config.tie_embeddings else ("embed", "head"):
            cut_unit(forms[f"{FAMILIES[config.family].module(role)}.weight"], FAMILIES[config.family].module(role))
    vocab = _even(config.vocab_size, BLOCK if config.vocab_size >= BLOCK * tp else 1, tp)
    layers = [_layer_shares(config, forms, i, tp) for i in range(config.num_layers)]
    weights = [sum(map(math.prod, c.linear_shapes(config.hidden_size).values())) for c in config.layers]
    stages = _stages(weights if costs is None else costs, config.vocab_size * config.hidden_size, pp)
    shares = []
    for rank in range(tp * pp):
        start, stop = stages[rank // tp]
        of_rank = tuple(layer[rank % tp] for layer in layers[start:stop])
        shares.append(Share(config, rank, tp, pp, start, of_rank, vocab[rank % tp]))
    return Plan(config, tp, pp, tuple(shares))


def _layer_shares(config: ModelConfig, forms: Mapping[str, Format], index: int, tp: int) -> list[LayerShare]:
    """A layer's shares of all ranks of its stage."""
    layer, family = config.layers[index], FAMILIES[config.family]
    if tp == 1:
        whole = LayerShare((0, layer.num_heads), tuple(range(layer.num_kv_heads)), (0, layer.ffn_width))
        return [whole]
    units = {}
    for role in layer.linear_shapes(config.hidden_size):
        name = family.module(role, index)
        units[role] = cut_unit(forms[f"{name}.weight"], name)
    heads = _head_shares(layer, tp, units["o"])
    if heads is None:
        form = forms[f"{family.module('o', index)}.weight"].name
        raise EngineError(
            f"{family.module('o', index)} cannot be cut in {tp}: {layer.num_heads} heads of {layer.head_dim} columns, "
            f"stored as {form}, whose groups must stay whole",
            hint="take a smaller --tp, or compress the model with smaller groups or one scale for each row",
        )
    unit = math.lcm(units["down"], BLOCK)
    unit = unit if layer.ffn_width // unit >= tp else units["down"]
    if layer.ffn_width // unit < tp:
        raise EngineError(
            f"{family.module('down', index)} cannot be cut in {tp}: its {layer.ffn_width} columns are "
            f"{layer.ffn_width // unit} groups of {unit}",
            hint="take a smaller --tp, or compress the model with smaller groups or one scale for each row",
        )
    ffn = _even(layer.ffn_width, unit, tp)
    return [LayerShare(h, kv, f) for (h, kv), f in zip(heads, ffn, strict=True)]


def _head_shares(layer: LayerConfig, tp: int, unit: int) -> list[tuple[Span, tuple[int, ...]]] | None:
    """Query heads and key-value heads of each rank, so that the rank with the most has as little as can be.

    Whole groups go together, or a group is cut and its key-value head is held by several ranks. None: neither is
    possible with cuts at multiples of `unit` columns.
    """
    found = []
    for count in range(1, layer.num_heads + 1):  # heads that stay together
        together = layer.num_heads % count == 0 and (layer.group % count == 0 or count % layer.group == 0)
        if not together or count * layer.head_dim % unit or layer.num_heads // count < tp:
            continue
        heads = _even(layer.num_heads, count, tp)
        shares = [(span, _kv_heads(span, layer.group)) for span in heads]
        most = max(span[1] - span[0] + len(kv) for span, kv in shares)
        found.append(((most, sum(len(kv) for _, kv in shares), -count), shares))
    return min(found)[1] if found else None


def _kv_heads(heads: Span, group: int) -> tuple[int, ...]:
    """Key-value heads of these query heads, as often as it takes for each to have equally many."""
    counts = Counter(head // group for head in range(*heads))
    own = math.gcd(*counts.values())
    return tuple(kv for kv, count in counts.items() for _ in range(count // own))


def _even(size: int, unit: int, parts: int) -> list[Span]:
    """Consecutive parts of whole units, as even as can be; what is less than a unit goes to the last."""
    units, bounds = size // unit, [0]
    for part in range(parts):
        bounds.append(bounds[-1] + unit * (units // parts + (part < units % parts)))
    bounds[-1] = size
    return list(itertools.pairwise(bounds))


def _stages(costs: Sequence[float], head: float, pp: int) -> list[Span]:
    """Consecutive layers of each stage, the dearest stage as cheap as can be; `head` is a cost of the last."""
    count = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best = {0: (0.0, [0])}  # layers in the stages so far -> cost of the dearest, and where they begin and end
    for stage in range(1, pp + 1):
        last = stage == pp
        ends = [count] if last else range(stage, count - (pp - stage) + 1)
        best = {
            end: min(
                (max(most, sums[end] - sums[start] + head * last), [*bounds, end])
                for start, (most, bounds) in best.items()
                if start < end
            )
            for end in ends
        }
    bounds = best[count][1]
    return list(itertools.pairwise(bounds))


def _spans(share: LayerShare, head_dim: int) -> dict[str, Spans]:
    """Role -> rows (of o and down: columns) of the model's matrix that a rank holds."""
    heads = ((share.heads[0] * head_dim, share.heads[1] * head_dim),)
    kv = tuple((head * head_dim, (head + 1) * head_dim) for head in share.kv_heads)
    return {"q": heads, "k": kv, "v": kv, "o": heads, "gate": (share.ffn,), "up": (share.ffn,), "down": (share.ffn,)}
