"""Trains a tiny model of a family from random weights, on one core in minutes: a folder like any other model's.

    python benchmarks/train_tiny.py opt|bloom|llama OUT [--steps N] [--seed S]

The text is the docstrings of this Python's standard library, in the order of its files: every module of it but
site-packages, tests, and the vendored or old folders in LEFT_OUT. One module of every 16 validates and is not learned.
The default text that models are judged on is Python's language topics, another text, which `pydoc_data` holds and this
leaves out; lines of 40 characters and more that stand in both are dropped as well.

The families differ in what makes them families; size, tokens, their order and steps are the same. Tokens are byte-level
BPE of that text. Equal seeds give equal models where torch, its threads and Python are the same. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F

from gossamer.checkpoint.atomic import atomic_folder
from gossamer.checkpoint.textprint import SHORTEST_LINE
from gossamer.measure.corpus import load_corpus
from gossamer.settings import threads

LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"})
HELD_OUT = 16
"""One module of so many validates."""
END = "<|end|>"
"""Token 0, before every docstring."""
RECORD = "training.json"
"""What the folder says of its training."""
VALIDATIONS = 8


@dataclass(frozen=True)
class Size:
    """What the families share. Feed-forward networks have 8 * hidden_size**2 weights, with a gate or without."""

    vocab_size: int = 1024
    hidden_size: int = 192
    layers: int = 4
    heads: int = 6
    context: int = 256


@dataclass(frozen=True)
class Schedule:
    """AdamW; the learning rate rises for a tenth of the steps and falls along a cosine to a tenth."""

    steps: int = 600
    batch: int = 4
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        warmup = max(self.steps // 10, 1)
        fallen = 0.55 + 0.45 * math.cos(math.pi * max(step - warmup, 0) / max(self.steps - warmup, 1))
        return self.learning_rate * min((step + 1) / warmup, fallen)


@dataclass(frozen=True)
class Text:
    """Docstrings to learn and to validate on."""

    learned: list[str]
    held_out: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=("opt", "bloom", "llama"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--seed", type=int, default=Schedule.seed)
    args = parser.parse_args()
    found = train(args.family, args.out, docstrings(), Size(), Schedule(steps=args.steps, seed=args.seed))
    print(
        json.dumps({"benchmark": "train_tiny", "family": args.family, "steps": args.steps, "seed": args.seed, **found})
    )
    return 0


def docstrings() -> Text:
    """Every docstring of the standard library, without the lines that the default text to judge on has as well."""
    judged = {line.strip() for line in load_corpus("default").text.splitlines() if len(line.strip()) >= SHORTEST_LINE}
    modules = [list(_docstrings_of(file, judged)) for file in _modules()]
    learned = [text for i, module in enumerate(modules) if (i + 1) % HELD_OUT for text in module]
    return Text(learned, [text for module in modules[HELD_OUT - 1 :: HELD_OUT] for text in module])


def _modules() -> Iterator[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        if LEFT_OUT.isdisjoint(file.relative_to(library).parts):
            yield file


def _docstrings_of(file: Path, judged: set[str]) -> Iterator[str]:
    """Of the module and of everything in it, from the outside in."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (ast.get_docstring(node) or "").splitlines()
            text = "\n".join(line for line in lines if line.strip() not in judged).strip()
            if text:
                yield text + "\n"


def make_tokenizer(text: Text, vocab_size: int) -> Tokenizer:
    """Byte-level BPE of what is learned; END is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.learned, trainer)
    return tokenizer


def make_model(family: str, size: Size) -> Any:
    """A transformers model in float32 with random weights, tied embedding and no dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": size.vocab_size, "hidden_size": size.hidden_size, "tie_word_embeddings": True}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    shape = {"num_hidden_layers": size.layers, "num_attention_heads": size.heads}
    own: dict[str, dict[str, Any]] = {
        "opt": shape
        | {"ffn_dim": 4 * size.hidden_size, "max_position_embeddings": size.context, "dropout": 0.0},
        "bloom": {"n_layer": size.layers, "n_head": size.heads, "seq_length": size.context},
        "llama": shape
        | {"intermediate_size": 8 * size.hidden_size // 3, "max_position_embeddings": size.context},
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **common, **ends, **own[family])).float()
    if family != "bloom":  # which norms its embedding: tokens that begin as small as 0.02 are learned from slowly
        model.get_input_embeddings().weight.data *= 10
    if family == "opt":  # and positions as large as tokens drown them
        model.model.decoder.embed_positions.weight.data *= 0.25
    return model


def train(family: str, out: Path, text: Text, size: Size, schedule: Schedule) -> dict[str, float]:
    """Write the folder, complete or not at all; returns what validation says, in nats for each token.

    Raises OutputExists.
    """
    torch.set_num_threads(threads())
    torch.manual_seed(schedule.seed)
    tokenizer = make_tokenizer(text, size.vocab_size)
    learned, held_out = (tokens_of(tokenizer, texts) for texts in (text.learned, text.held_out))
    model, began = make_model(family, size), time.process_time()
    with atomic_folder(out) as folder:
        found = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens": schedule.steps * schedule.batch * size.context,
            "validation": _learn(model, learned, windows(held_out, size.context), schedule),
            "unigram": unigram(learned, held_out, size.vocab_size),
            "cpu_seconds": round(time.process_time() - began, 1),
        }
        _save(model, tokenizer, folder)
        (folder / RECORD).write_text(json.dumps(found))
    return found


def _learn(model: Any, learned: Tensor, held_out: Tensor, schedule: Schedule) -> float:
    """Train; the last validation."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=schedule.weight_decay)
    batches = _batches(windows(learned, held_out.shape[1]), schedule)
    checks = {schedule.steps * (i + 1) // VALIDATIONS for i in range(VALIDATIONS)}
    loss = math.nan
    with Progress(console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("training", total=schedule.steps)
        for step in range(schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            loss_of(model, next(batches)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.advance(task)
            if step + 1 in checks:
                loss = validate(model, held_out)
                progress.console.print(f"step {step + 1}: validation {loss:.3f}")
    return loss


def _batches(pieces: Tensor, schedule: Schedule) -> Iterator[Tensor]:
    """Rows of `pieces` [pieces, context] in a new order every time they are through, `batch` at a time."""
    generator = torch.Generator().manual_seed(schedule.seed)
    while True:
        yield from pieces[torch.randperm(len(pieces), generator=generator)].split(schedule.batch)


def tokens_of(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """One row of tokens [tokens], END before each text."""
    return torch.tensor([t for e in tokenizer.encode_batch(texts) for t in (0, *e.ids)])


def windows(tokens: Tensor, context: int) -> Tensor:
    """Tokens as [windows, context], the last incomplete one left away."""
    return tokens[: len(tokens) // context * context].view(-1, context)


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of tokens [batch, context], each by those before it."""
    logits = model(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.inference_mode()
def validate(model: Any, held_out: Tensor, most: int = 64) -> float:
    """Mean loss over evenly spread windows of held_out [windows, context]."""
    spread = held_out[:: max(len(held_out) // most, 1)][:most]
    return sum(float(loss_of(model, part)) * len(part) for part in spread.split(8)) / len(spread)


def unigram(learned: Tensor, held_out: Tensor, vocab_size: int) -> float:
    """The loss of a model that knows only how often each token is, every count one more than it was."""
    counts = torch.bincount(learned, minlength=vocab_size).double() + 1
    return float(-(counts / counts.sum()).log()[held_out].mean())


def _save(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """As transformers saves it, in bfloat16."""
    from transformers import PreTrainedTokenizerFast

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.bfloat16().save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
