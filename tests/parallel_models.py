"""Tiny models whose weights are in any format, and ranks that are threads of this process."""

from __future__ import annotations

import dataclasses
import json
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch

from format_codes import random_codes
from gossamer.formats import Dense, Format, quantization_config
from gossamer.model import config_from_hf, tensor_names
from gossamer.parallel import Plan, Share
from gossamer.parallel.group import Peers
from tiny_llama import CONFIG, make_tokenizer

T = TypeVar("T")
BF16 = Dense()
SECONDS = 120.0
SHAPE = {
    "vocab_size": 300, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
    "intermediate_size": 192, "num_hidden_layers": 3, "max_position_embeddings": 96, "dtype": "bfloat16",
}  # fmt: skip


def write_model(folder: Path, form: Format = BF16, **changes: Any) -> Path:
    """A LLaMA whose linear layers and tables are all in this format; biases, if any, are random."""
    folder.mkdir(parents=True)
    hf = {key: value for key, value in CONFIG.items() if key != "torch_dtype"} | SHAPE | changes
    generator = torch.Generator().manual_seed(5)
    tensors, formats = {}, {}
    for seed, (name, shape) in enumerate(tensor_names(config_from_hf(hf)).items()):
        module = name.removesuffix(".weight")
        if len(shape) == 1:
            base = 0.0 if name.endswith("bias") else 1.0
            tensors[name] = (base + 0.2 * torch.randn(shape, generator=generator)).bfloat16()
        elif isinstance(form, Dense):
            tensors[name] = (0.2 * torch.randn(shape, generator=generator)).to(form.dtype)
        else:
            formats[module] = form
            codes = random_codes(form, *shape, seed=seed)
            tensors |= {f"{module}.{local}": t for local, t in form.pack(_small(codes)).items()}
    if formats:
        kinds = {m: "embedding" if m.endswith("embed_tokens") else "linear" for m in formats}
        hf["quantization_config"] = quantization_config(formats, kinds, "lm_head")
    (folder / "config.json").write_text(json.dumps(hf))
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(hf["vocab_size"]).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "bos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _small(codes: Any) -> Any:
    """The same codes with scales of a power of two less, so that a deep model's activations stay in bounds."""
    spread = float(codes.dequantize().std())
    factor = 2.0 ** torch.tensor(0.2 / spread).log2().round()
    if codes.levels is not None and codes.levels.ndim == 2:
        return dataclasses.replace(codes, levels=(codes.levels * factor).half().float())
    return dataclasses.replace(codes, scale=codes.scale * factor)


class Meeting:
    """Where the ranks of a plan meet."""

    def __init__(self, plan: Plan) -> None:
        self.barriers = [threading.Barrier(plan.tp) for _ in range(plan.pp)]
        self.parts: dict[tuple[int, int], torch.Tensor] = {}
        self.between: dict[int, queue.Queue[torch.Tensor]] = {s.rank: queue.Queue() for s in plan.shares}
        self.sums = 0


class Thread:
    """Peers of a rank that is a thread."""

    def __init__(self, share: Share, meeting: Meeting) -> None:
        self.share, self.meeting = share, meeting

    def sum(self, tensor: torch.Tensor) -> None:
        share, meeting = self.share, self.meeting
        barrier = meeting.barriers[share.stage]
        meeting.parts[share.stage, share.tp_rank] = tensor.clone()
        barrier.wait(SECONDS)
        total = sum(meeting.parts[share.stage, rank] for rank in range(share.tp))
        barrier.wait(SECONDS)
        tensor.copy_(total)
        if share.rank == 0:
            meeting.sums += 1

    def send(self, tensor: torch.Tensor) -> None:
        self.meeting.between[self.share.rank + self.share.tp].put(tensor.clone())

    def receive(self, tensor: torch.Tensor) -> None:
        tensor.copy_(self.meeting.between[self.share.rank].get(timeout=SECONDS))


def together(plan: Plan, work: Callable[[Share, Peers], T], meeting: Meeting | None = None) -> list[T]:
    """What each rank of a plan makes, all of them at once."""
    meeting = meeting or Meeting(plan)
    with ThreadPoolExecutor(len(plan.shares)) as pool:
        running = [pool.submit(work, share, Thread(share, meeting)) for share in plan.shares]
        return [future.result(SECONDS) for future in running]
