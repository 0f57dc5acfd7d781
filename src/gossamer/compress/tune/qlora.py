"""Low-rank adapters over the quantized model (QLoRA: Dettmers et al., arXiv 2305.14314), merged or kept.

A layer's weight W gets an addition B A of rank r: A [r, in] begins random, B [out, r] at zero.

merged   The addition is made to the weights *before* they are rounded, in every forward pass (as in L4Q, arXiv
         2402.04902): what is trained is what is stored, and nothing is lost when the adapter is merged in the end.
kept     The codes are frozen and the adapter stays in float beside them, as in QLoRA; the output folder has it as files
         of the PEFT library. Gossamer's engine runs the base without it.
"""

from __future__ import annotations

import json
import math

import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..tunedlinear import TunedLinear
from ..tuning import TunedModel
from . import ModelTuner, TuneOptions, distill, groups_of
from .qat import begin_latent


class QLoRAOptions(TuneOptions):
    rank: int = Field(default=16, ge=1, le=4096, description="of the adapters")
    keep: bool = Field(
        default=False, description="true: leave the codes alone and store the adapters beside them, for PEFT"
    )
    learning_rate: float = Field(default=1e-3, ge=0, description="of the adapters")
    scale_rate: float = Field(
        default=1e-3, ge=0, description="merged: of scales, relative to their mean size; 0: fixed"
    )
    norms: bool = Field(default=False, description="merged: train norm weights too")


class QLoRA(ModelTuner):
    """Trains an adapter for every linear layer of the blocks."""

    name = "qlora"
    latent = True
    Options = QLoRAOptions
    options: QLoRAOptions

    def tune(self, model: TunedModel) -> None:
        """Train the adapters, then merge or keep them. Raises CompressionError, NumericalError."""
        o = self.options
        if o.keep:
            self._keep(model)
            return
        begin_latent(model, scales=bool(o.scale_rate), zeros=False, norms=o.norms, ends=False)
        for layer in model.linears().values():
            assert layer.latent is not None
            adapter = AddedAdapter(layer, o.rank, model.generator)
            layer.latent.requires_grad_(False)
            parametrize.register_parametrization(layer, "latent", adapter)
        self._train(model)
        for layer in model.linears().values():
            parametrize.remove_parametrizations(layer, "latent")

    def _keep(self, model: TunedModel) -> None:
        adapters = {}
        for name, layer in model.linears().items():
            adapters[name] = layer.extra = Adapter(layer.weight(), self.options.rank, model.generator)
        self._train(model)
        for layer in model.linears().values():
            layer.extra = None
        model.files |= peft_files(adapters, self.options.rank)

    def _train(self, model: TunedModel) -> None:
        o = self.options
        rates = {"a": o.learning_rate, "b": o.learning_rate, "scale": o.scale_rate, "weight": o.norm_rate}
        distill(model, groups_of(model, **rates), o)


class Adapter(nn.Module):
    """x A^T B^T of inputs x [.., in]: what stands beside a layer."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        out, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns, generator=generator) / math.sqrt(columns))
        self.b = nn.Parameter(torch.zeros(out, rank))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a.T @ self.b.T


class AddedAdapter(Adapter):
    """W + B A of a layer's weight W [out, in], both in units of its scale: a parametrization of what is rounded."""

    def __init__(self, layer: TunedLinear, rank: int, generator: torch.Generator) -> None:
        assert layer.latent is not None
        assert layer.scale is not None
        super().__init__(layer.latent, rank, generator)
        self.unit = layer.scale.detach().clone()
        """[out, groups] the scale that training begins with."""

    def forward(self, x: Tensor) -> Tensor:
        return x + ((self.b @ self.a).view(*self.unit.shape, -1) / self.unit.unsqueeze(-1)).view_as(x)


def peft_files(adapters: dict[str, Adapter], rank: int) -> dict[str, bytes]:
    """The files of a LoRA adapter as the PEFT library (0.18) reads them; alpha is the rank, so the scaling is 1."""
    tensors = {}
    for name, adapter in adapters.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.a.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.b.detach().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in adapters}),
    }
    return {
        "adapter_model.safetensors": safetensors.torch.save(tensors),
        "adapter_config.json": json.dumps(config, indent=2, sort_keys=True).encode(),
    }
