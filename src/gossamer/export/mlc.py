"""Folders for MLC-LLM: mlc-chat-config.json, tensor-cache.json and params_shard_*.bin.

    q4f16_1, q4f32_1   every matrix in groups of 32 columns; q4f16_2 leaves embedding and head in float
    q3f16_1            the same in groups of 40, ten codes of 3 bits in a word
    q0f16, q0bf16, q0f32   floats
    NAME.q_weight      uint32 [out, words], codes from 0, the first column's in the low bits
    NAME.q_scale       float [out, groups]; the weight is (code - 7) * scale, for 3 bits (code - 3) * scale
Those are codes from -7 to 8. Ours, from -8 to 7, are said by turning the sign of code and scale, which loses nothing.
q, k, v are one matrix in the file, and so are gate and up; what families call them is in mlc_families.py. Only the
layout can be checked here: no engine is driven.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint import Checkpoint, write_file
from ..checkpoint.files import read_json
from ..checkpoint.save import write_companions
from ..errors import ExportError, ProofFailed
from ..formats import Dense, Integer
from ..model import FAMILIES
from .base import (
    FOLDER,
    MISTAKE,
    Export,
    Options,
    Progress,
    form_of,
    holds,
    in_block,
    linear_formats,
    refuse_ragged,
    stored_of,
)
from .grids import divides, spread, steps
from .mlc_families import MLC_FAMILIES, misread, parameters

SHARD_BYTES = 32 << 20
INDEX = "tensor-cache.json"
OLD_INDEX = "ndarray-cache.json"
"""The same content under the name that older runtimes look for."""
CHATML = "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class _Layout:
    dtype: torch.dtype
    bits: int = 0
    """0: nothing is quantized."""
    group: int = 32
    ends: bool = True
    """Embedding and head are quantized, too."""


LAYOUTS = {
    "q4f16_1": _Layout(torch.float16, 4),
    "q4f16_2": _Layout(torch.float16, 4, ends=False),
    "q4f32_1": _Layout(torch.float32, 4),
    "q3f16_1": _Layout(torch.float16, 3, group=40),
    "q0f16": _Layout(torch.float16),
    "q0bf16": _Layout(torch.bfloat16),
    "q0f32": _Layout(torch.float32),
}
QUANTIZED = ("q3f16_1", "q4f16_1", "q4f16_2", "q4f32_1")
"""Layouts of integers, those of fewer bits first."""
_NAMES = {torch.float16: "float16", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.uint32: "uint32"}


@dataclass(frozen=True)
class _Param:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class MLCExport(Export):
    """A folder for MLC-LLM."""

    target = "mlc"
    layouts = ("stored", *LAYOUTS)
    families = tuple(MLC_FAMILIES)
    unknown = "is not written for it: it has no OPT and no BLOOM, and of Gemma no soft caps or but one kind of layer"

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        super().__init__(checkpoint, options)
        refuse_ragged(checkpoint, self.target)
        for why in misread(checkpoint.config):
            raise ExportError(f"{self.target}: {checkpoint.config.family}: {why}", hint=FOLDER)
        if self.layout == "stored":
            self.layout = self._chosen()
        self.how = LAYOUTS[self.layout]
        for name in checkpoint.names():
            self._check(name)

    def write(self, path: Path, progress: Progress) -> None:
        write_companions(path, self.checkpoint)
        places = parameters(self.checkpoint.config)
        params = [param for place, names in places.items() for param in self._params(place, names)]
        records = list(_write_shards(path, params, progress))
        size = sum(record["nbytes"] for record in records)
        count = self.checkpoint.parameters()
        about = {"ParamSize": len(params), "ParamBytes": size, "BitsPerParam": size * 8 / count}
        index = {"metadata": about, "records": records}
        for name, content in ((INDEX, index), (OLD_INDEX, index), ("mlc-chat-config.json", self._chat_config(path))):
            write_file(path / name, json.dumps(content, indent=2).encode() + b"\n")

    def reader(self, path: Path) -> MLCReader:
        return MLCReader(path, self.checkpoint)

    def _chosen(self) -> str:
        """The layout that holds what is stored."""
        inner = next(iter(linear_formats(self.checkpoint).values()))
        if isinstance(inner, Integer):
            return next((layout for layout in QUANTIZED if self._holds(layout)), "q4f16_2")
        if isinstance(inner, Dense):
            return {torch.float16: "q0f16", torch.bfloat16: "q0bf16", torch.float32: "q0f32"}[inner.dtype]
        raise ExportError(
            f"{self.target}: no layout is like {inner.name}",
            hint="recipes: int4-gptq, int4-rtn; or name a --layout with --allow-rounding",
        )

    def _holds(self, layout: str) -> bool:
        """True if a layout holds every tensor as it is."""
        self.how = LAYOUTS[layout]
        return all(
            self._exact_codes(n) is not None if self._quantized(n) else holds(self.checkpoint, n, self._dtype(n))
            for n in self.checkpoint.names()
        )

    def _quantized(self, name: str) -> bool:
        if not self.how.bits or len(self.checkpoint.shape(name)) != 2:
            return False
        return self.how.ends or in_block(self.checkpoint, name)

    def _dtype(self, name: str) -> torch.dtype:
        """That of a tensor which is not quantized."""
        family = FAMILIES[self.checkpoint.config.family]
        wide = [family.modules[role] for role in MLC_FAMILIES[family.name].wide]
        return torch.float32 if name.endswith(tuple(f"{module}.bias" for module in wide)) else self.how.dtype

    def _check(self, name: str) -> None:
        if not self._quantized(name):
            if not holds(self.checkpoint, name, self._dtype(name)):
                way_out = "--layout q4f32_1 or q0f32, or a recipe with float embedding and head"
                self.round_as_asked(name, f"is not exact in {_NAMES[self._dtype(name)]}", way_out)
            return
        if self._exact_codes(name) is None:
            way_out = "symmetric 4-bit integers in groups of a multiple of 32 are held (int4-rtn, int4-gptq)"
            self.round_as_asked(name, f"is not exact in {self.layout}", way_out)

    def _exact_codes(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Codes from 0 [out, in] and scales [out, groups] of this layout that are the stored weight, or None."""
        form, how = form_of(self.checkpoint, name), self.how
        if not isinstance(form, Integer) or form.outliers:
            return None
        codes = form.codes(stored_of(self.checkpoint, name))
        columns = codes.codes.shape[1]
        whole = form.group_size is None and columns % how.group
        if not whole and not divides(codes, how.group):
            return None
        found, groups = steps(codes), math.ceil(columns / how.group)
        scale = codes.scale.float().expand(-1, groups) if whole else spread(codes.scale.float(), columns, how.group)
        padded = torch.nn.functional.pad(found, (0, groups * how.group - columns)).view(len(found), groups, -1)
        turned = padded.amin(-1) < -_middle(how.bits)
        padded = torch.where(turned.unsqueeze(-1), -padded, padded)
        scale = torch.where(turned, -scale, scale)
        middle = _middle(how.bits)
        if int(padded.min()) < -middle or int(padded.max()) > middle + 1:
            return None
        if not torch.equal(scale.to(how.dtype).float(), scale):
            return None
        return (padded + middle).flatten(1), scale

    def _codes(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes from 0 and scales; by MLC's own rule where the stored ones cannot be said: largest weight / middle."""
        exact = self._exact_codes(name)
        if exact is not None:
            return exact
        how, weight = self.how, self.checkpoint.tensor(name)
        groups = math.ceil(weight.shape[1] / how.group)
        padded = torch.nn.functional.pad(weight, (0, groups * how.group - weight.shape[1]))
        grouped = padded.view(len(weight), groups, -1)
        scale = (grouped.abs().amax(-1) / _middle(how.bits)).to(how.dtype).float()
        safe = torch.where(scale == 0, 1.0, scale)
        codes = (grouped / safe.unsqueeze(-1)).round().clamp(-_middle(how.bits), _middle(how.bits))
        return (codes + _middle(how.bits)).flatten(1), scale

    def _params(self, place: str, names: Sequence[str]) -> Iterator[_Param]:
        """What stores the tensors that lie in a parameter."""
        name, module = names[0], place.removesuffix(".weight")
        rows = sum(self.checkpoint.shape(n)[0] for n in names)
        if not self._quantized(name):
            shape, dtype = (rows, *self.checkpoint.shape(name)[1:]), self._dtype(name)
            yield _Param(place, dtype, shape, partial(self._floats, names, dtype))
            return
        groups = math.ceil(self.checkpoint.shape(name)[1] / self.how.group)
        words = groups * self.how.group // (32 // self.how.bits)
        yield _Param(f"{module}.q_weight", torch.uint32, (rows, words), partial(self._words, names))
        yield _Param(f"{module}.q_scale", self.how.dtype, (rows, groups), partial(self._scales, names))

    def _floats(self, names: Sequence[str], dtype: torch.dtype) -> Tensor:
        return torch.cat([self.checkpoint.tensor(name).to(dtype) for name in names])

    def _words(self, names: Sequence[str]) -> Tensor:
        each = 32 // self.how.bits
        shifts = self.how.bits * torch.arange(each)
        codes = torch.cat([self._codes(name)[0] for name in names]).long()
        return (codes.view(len(codes), -1, each) << shifts).sum(-1).to(torch.int32).view(torch.uint32)

    def _scales(self, names: Sequence[str]) -> Tensor:
        return torch.cat([self._codes(name)[1] for name in names]).to(self.how.dtype)

    def _chat_config(self, folder: Path) -> dict[str, Any]:
        config, generation = self.checkpoint.config, read_json(folder / "generation_config.json")
        size = {
            "context_window_size": config.max_positions,
            "prefill_chunk_size": min(config.max_positions, 2048),
            "tensor_parallel_shards": 1,
        }
        model_config = {**MLC_FAMILIES[config.family].settings(config), "max_batch_size": 128, **size}
        if config.rope.kind == "llama3":
            model_config["rope_scaling"] = self.checkpoint.hf_config["rope_parameters"]
        files = [n for n in ("tokenizer.json", "tokenizer_config.json") if (folder / n).exists()]
        return {
            "version": "0.1.0",
            "model_type": FAMILIES[config.family].name,
            "quantization": self.layout,
            "model_config": model_config,
            "vocab_size": config.vocab_size,
            "active_vocab_size": self.checkpoint.tokenizer().vocab_size,
            **size,
            "sliding_window_size": -1,
            "attention_sink_size": -1,
            "pipeline_parallel_stages": 1,
            "tokenizer_files": files,
            "conv_template": self._conversation(),
            "temperature": 1.0,
            "top_p": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            **{key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in generation},
        }

    def _conversation(self) -> str:
        """MLC's name for the chat template: it has no room for templates of others, so what is not ChatML is plain."""
        tokenizer = self.checkpoint.tokenizer()
        if tokenizer.chat_template is None:
            return "LM"
        return "chatml" if tokenizer.render_chat([{"role": "user", "content": "A"}]).endswith(CHATML) else "LM"


class MLCReader:
    """The container read record by record, and codes taken word by word: (word >> place * bits) mod 2^bits."""

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self.name = "the container's index and a formula of its own"
        self._folder, self._checkpoint = folder, checkpoint
        self._places: dict[str, tuple[str, int, int]] = {}
        for place, names in parameters(checkpoint.config).items():
            first = 0
            for name in names:
                last = first + checkpoint.shape(name)[0]
                self._places.setdefault(name, (place, first, last))
                first = last
        self._records: dict[str, tuple[str, dict[str, Any]]] = {}
        for shard in read_json(folder / INDEX, 1 << 28)["records"]:
            if hashlib.md5((folder / shard["dataPath"]).read_bytes()).hexdigest() != shard["md5sum"]:
                raise ProofFailed(
                    f"{folder}: {shard['dataPath']} is not what was written into it, by its md5 in {INDEX}",
                    hint="the disk, or another program, has changed it: export again",
                )
            self._records |= {record["name"]: (shard["dataPath"], record) for record in shard["records"]}
        self.nbytes = sum(record["nbytes"] for _, record in self._records.values())
        self._how = LAYOUTS[read_json(folder / "mlc-chat-config.json")["quantization"]]

    def weight(self, name: str) -> Tensor:
        place, first, last = self._places[name]
        if place in self._records:
            return self._array(place)[first:last].float()
        module = place.removesuffix(".weight")
        words = self._array(f"{module}.q_weight")[first:last].long()
        scale = self._array(f"{module}.q_scale")[first:last].float()
        base, each = 1 << self._how.bits, 32 // self._how.bits
        columns = self._checkpoint.shape(name)[1]
        weight = torch.empty(len(words), columns)
        for column in range(columns):
            code = words[:, column // each] // base ** (column % each) % base
            weight[:, column] = (code - (base // 2 - 1)) * scale[:, column // self._how.group]
        return weight

    def _array(self, name: str) -> Tensor:
        if name not in self._records:
            raise ProofFailed(f"{self._folder}: {INDEX} has no {name}", hint=MISTAKE)
        file, record = self._records[name]
        start = record["byteOffset"]
        data = np.fromfile(self._folder / file, np.uint8, record["nbytes"], offset=start)
        dtype = {text: dtype for dtype, text in _NAMES.items()}[record["dtype"]]
        return torch.from_numpy(data).view(dtype).view(record["shape"])


def _middle(bits: int) -> int:
    """The code that stands for zero."""
    return (1 << (bits - 1)) - 1


def _write_shards(folder: Path, params: Sequence[_Param], progress: Progress) -> Iterator[dict[str, Any]]:
    """Write params_shard_N.bin, each of at most SHARD_BYTES or one tensor, and yield what the index says of them."""
    shards: list[list[_Param]] = [[]]
    for param in params:
        if shards[-1] and sum(p.nbytes for p in shards[-1]) + param.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(param)
    done = 0
    for number, shard in enumerate(shards):
        name, offset, records, digest = f"params_shard_{number}.bin", 0, [], hashlib.md5()
        with open(folder / name, "wb") as file:
            for param in shard:
                progress("writing", done, len(params))
                data = param.make().contiguous().view(torch.uint8).numpy().tobytes()
                file.write(data)
                digest.update(data)
                where = {"nbytes": len(data), "byteOffset": offset}
                about = {"name": param.name, "shape": list(param.shape), "dtype": _NAMES[param.dtype]}
                records.append({**about, "format": "raw", **where})
                offset, done = offset + len(data), done + 1
        about_shard = {"dataPath": name, "format": "raw-shard", "nbytes": offset, "records": records}
        yield {**about_shard, "md5sum": digest.hexdigest()}
    progress("writing", len(params), len(params))
