"""What a BlockMethod may see and do: one block, its inputs, and the outputs that the original has in its place.

Knows blocks, activations and codes; knows no file, recipe or method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import CompressionError, NumericalError, UnknownName
from ..formats import Codes, Dense, Format
from ..formats.base import check_tensors
from ..model.decoder import Block, Rotation
from .walk import ENOUGH_SEQUENCES, TOKENS_PER_COLUMN, hessian, slices

POINTS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""Linear layers that read the same input; a block may have no gate."""


class BlockView:
    """One block in work. `put` or `store` decide its linear layers one by one; all must be decided in the end.

    Norm weights, biases and linear weights of `block` may be changed in place before that (folding): what the block
    holds when the method returns is what is stored, norms and biases rounded to the model's float dtype.
    """

    def __init__(
        self,
        block: Block,
        x: Tensor,
        target: Tensor,
        rotation: Rotation,
        forms: Mapping[str, Format],
        names: Mapping[str, str],
        seed: int = 0,
        teacher_x: Tensor | None = None,
        given: Callable[[str], dict[str, Tensor]] | None = None,
    ) -> None:
        self.block = block
        """In float32, on the CPU; its parameters require no gradient until a method says so."""
        self.x = x
        """[sequences, time, hidden] inputs of the block as the compressed model gives them (the original, if the method
        is independent); not to be changed."""
        self.target = target
        """[sequences, time, hidden] what the original block gives on the original inputs; not to be changed."""
        self.teacher_x = teacher_x
        """[sequences, time, hidden] what the original's own blocks are given here, if the method asks for it."""
        self.rotation = rotation
        """Rotary factors for [batch, time]: any batch."""
        self.decided: dict[str, Codes] = {}
        """Role -> codes, of the layers that are decided by `put`."""
        self.stored: dict[str, dict[str, Tensor]] = {}
        """Role -> stored tensors, of the layers that are decided by `store`."""
        self.generator = torch.Generator().manual_seed((seed * 1_000_003 + block.index) % 2**63)
        """For whatever a method draws: a block gets the same numbers in a run that was resumed."""
        self._forms, self._names, self._given = forms, names, given
        self._zeros = {role: form.zeros(getattr(block, role).weight) for role, form in forms.items()}

    @property
    def index(self) -> int:
        """The block's number."""
        return self.block.index

    @property
    def roles(self) -> tuple[str, ...]:
        """Its linear layers, in the order in which they are computed."""
        return tuple(self._forms)

    @property
    def points(self) -> tuple[tuple[str, ...], ...]:
        """Those of POINTS that this block has."""
        return tuple(tuple(role for role in roles if role in self._forms) for roles in POINTS)

    def form(self, role: str) -> Format:
        """How this linear layer will be stored."""
        self._known(role)
        return self._forms[role]

    def name(self, role: str) -> str:
        """Module name of a linear layer, for errors."""
        self._known(role)
        return self._names[role]

    def given(self, role: str) -> dict[str, Tensor]:
        """Stored tensors of a linear layer as the part of the recipe was given them."""
        form = self.form(role)
        if isinstance(form, Dense):
            return {"weight": getattr(self.block, role).weight.detach().to(form.dtype, copy=True)}
        assert self._given is not None
        return self._given(role)

    def put(self, role: str, codes: Codes) -> None:
        """Decide a linear layer: its float weight in the block becomes `codes.dequantize()`.

        Raises CompressionError for codes of another shape, NumericalError if the weight is not finite.
        """
        linear = getattr(self.block, self._known(role))
        if codes.codes.shape != linear.weight.shape:
            raise CompressionError(
                f"{self._names[role]}: codes {tuple(codes.codes.shape)} for a weight {tuple(linear.weight.shape)}"
            )
        codes = codes.with_zeros(self._zeros[role])
        value = codes.dequantize()
        if not torch.isfinite(value).all():
            raise NumericalError(
                f"{self._names[role]}: the quantized weight has {int((~torch.isfinite(value)).sum())} values that are "
                "NaN or infinite"
            )
        linear.weight = nn.Parameter(value, requires_grad=False)
        self.decided[role] = codes

    def store(self, role: str, tensors: dict[str, Tensor]) -> None:
        """Decide a linear layer by its stored tensors: its weight in the block becomes what they stand for.

        Raises KernelError for tensors that the layer's format does not store, NumericalError if it is not finite.
        """
        linear = getattr(self.block, self._known(role))
        check_tensors(self._forms[role], tensors, tuple(linear.weight.shape))
        value = self._forms[role].unpack(tensors)
        if not torch.isfinite(value).all():
            raise NumericalError(
                f"{self._names[role]} has {int((~torch.isfinite(value)).sum())} values that are NaN or infinite"
            )
        linear.weight = nn.Parameter(value, requires_grad=False)
        self.stored[role] = tensors

    def inputs(self, role: str) -> Iterator[Tensor]:
        """Inputs [some sequences, time, in] of a linear layer as the block stands now, a few sequences at a time."""
        self._known(role)
        for c in slices(self.x):
            yield self.input_of(role, self.x[c])

    def input_of(self, role: str, x: Tensor) -> Tensor:
        """Input [sequences, time, in] of a linear layer, as the block stands now, for inputs x of the block."""
        block = self.block
        normed: Tensor = block.attn_norm(x)
        if role in ("q", "k", "v"):
            return normed
        mixed = block.mix(normed, self.rotation)
        if role == "o":
            return mixed
        normed = block.ffn_input(x, block.attended(mixed))
        return normed if role in ("gate", "up") else block.gated(normed)

    def hessian(self, *roles: str) -> Tensor:
        """X^T X [in, in] of the inputs X that these roles share, as the block stands now.

        Of as many sequences as that takes: more would take longer than they tell.
        """
        for role in roles:
            self._known(role)
        if not any(set(roles) <= set(point) for point in POINTS) or not roles:
            raise CompressionError(f"{', '.join(roles) or 'no roles'}: these linear layers do not share their inputs")
        columns = getattr(self.block, roles[0]).weight.shape[1]
        enough = max(ENOUGH_SEQUENCES, -(-TOKENS_PER_COLUMN * columns // self.x.shape[1]))
        with torch.no_grad():
            return hessian(self.input_of(roles[0], self.x[c]) for c in slices(self.x[:enough]))

    def outputs(self) -> Iterator[tuple[slice, Tensor]]:
        """Which sequences, and what the block as it stands now gives for them [some sequences, time, hidden]."""
        for c in slices(self.x):
            yield c, self.block(self.x[c], self.rotation)

    def _known(self, role: str) -> str:
        if role not in self._forms:
            raise UnknownName("linear layer", role, self._forms)
        return role
