"""One GGUF file that openvino-genai reads: architecture `llama`, and only the types that its reader knows."""

from __future__ import annotations

import torch

from ..checkpoint import Checkpoint
from ..checkpoint.gguf_architectures import WRITTEN
from ..errors import ExportError
from ..formats import Dense
from .base import Export, Options, holds
from .gguf import GGUFExport


class OpenVINOExport(GGUFExport):
    """A GGUF file for OpenVINO."""

    target = "openvino"
    layouts = ("stored", "f32", "f16", "q8_0", "q4_1", "q4_0")
    engine = "openvino"
    families = ("llama", "mistral")
    unknown = Export.unknown
    kinds = ("F32", "F16", "Q4_0", "Q4_1", "Q8_0")

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        super().__init__(checkpoint, options)
        config, first = checkpoint.config, checkpoint.config.layers[0]
        if len({(layer.num_heads, layer.num_kv_heads) for layer in config.layers}) > 1:
            raise ExportError("openvino: layers differ in heads, which it cannot read", hint="--to gguf: llama.cpp can")
        self.row = WRITTEN["llama"]  # it takes the width of a layer from its weights
        if first.q_size != config.hidden_size:
            raise ExportError(
                f"openvino: {first.num_heads} heads of {first.head_dim} are not the {config.hidden_size} of the model, "
                "and it reads no other width of heads",
                hint="--to gguf: llama.cpp does",
            )
        if config.rope.kind != "default":
            raise ExportError(
                f"openvino: rotary scaling {config.rope.kind} is not read from GGUF", hint="--to gguf: llama.cpp does"
            )

    def float_kind(self, name: str, form: Dense) -> str:
        """It reads no BF16: float16 where that is the same, else float32."""
        return "F16" if holds(self.checkpoint, name, torch.float16) else "F32"
