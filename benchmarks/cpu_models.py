"""The model files of the CPU benchmark: made once below the cache (GOSSAMER_HOME/bench), then used again.

Ours are made by `gossamer compress` with the recipes beside this file, so that they take no more bytes for a weight
than the peer's file that they stand beside, embedding and head counted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gossamer.checkpoint import open_checkpoint
from gossamer.measure.corpus import load_corpus
from gossamer.settings import cache_dir
from peers import llama_cpp_tool

HERE = Path(__file__).parent
RECIPES = HERE / "recipes"
STAND_IN = {"w8a8": "int8-body"}
"""Files that our own reader cannot open, and the file with the very same weights that is judged for them."""
MINUTES = 60.0


def path_of(name: str) -> Path:
    """A model file or folder by its name in MODELS; made if it is not there. Raises CalledProcessError."""
    file, make = MODELS[name]
    path = cache_dir("bench") / file()
    if not path.exists():
        print(f"making {path}", file=sys.stderr, flush=True)
        partial = path.with_name(f"{path.stem}-partial{path.suffix}")
        _remove(partial)
        make(partial)
        os.rename(partial, path)
    return path


def facts_of(name: str) -> dict[str, Any]:
    """What a table says of a model: bytes as stored, bits per weight, parameters, and what must be known of it."""
    checkpoint = open_checkpoint(path_of(STAND_IN.get(name, name)))
    return {
        "weight_bytes": checkpoint.weight_bytes(),
        "bits_per_weight": round(checkpoint.bits_per_weight(), 3),
        "parameters": checkpoint.parameters(),
        "read_bytes": _read_bytes(name),
        "kld": None,
    }


def _read_bytes(name: str) -> int:
    """Bytes of weights that one token reads: all of them, but of an embedding that is not the head only a row."""
    checkpoint = open_checkpoint(path_of(STAND_IN.get(name, name)))
    tied = "lm_head.weight" not in checkpoint.names()
    skipped = 0 if tied else checkpoint.nbytes("model.embed_tokens.weight")
    return checkpoint.weight_bytes() - skipped


def divergences(names: Iterable[str], corpus: str, tokens: int, threads: int) -> dict[str, float | None]:
    """Mean KL divergence of each model to the float model on a text; nothing for random weights.

    One protocol for ours and theirs: weights as each file stores them, all else in float32. What was judged before on
    the same text is remembered.
    """
    known = [name for name in names if not name.startswith("1b-")]
    paths = {name: path_of(STAND_IN.get(name, name)) for name in known}
    text = f"{load_corpus(corpus).sha256} {tokens} {open_checkpoint(path_of('bf16')).fingerprint()}"
    keys = {name: f"{text} {open_checkpoint(path).fingerprint()}" for name, path in paths.items()}
    file = cache_dir("bench") / "divergences.json"
    found: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    missing = {paths[name]: key for name, key in keys.items() if key not in found}
    if missing:
        words = ["eval", *missing, "--reference", path_of("bf16"), "--corpus", corpus, "--tokens", tokens]
        options = ["--samples", 0, "--threads", threads, "--json", "--quiet"]
        records = map(json.loads, run([sys.executable, "-m", "gossamer", *words, *options]).splitlines())
        found |= {missing[Path(r["model"]["path"])]: r["results"]["kld_mean"] for r in records if r["results"]}
        file.write_text(json.dumps(found, indent=1))
    return {name: found.get(key) for name, key in keys.items()}


def run(words: list[Any], minutes: float = MINUTES) -> str:
    """Standard output of a command, which may take so long. Raises CalledProcessError, TimeoutExpired."""
    command = [str(word) for word in words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=minutes * 60).stdout


def _gossamer(*words: object) -> None:
    run([sys.executable, "-m", "gossamer", *words, "--quiet"])


def _converted(out: Path) -> None:
    _gossamer("convert", "smollm2", "--out", out)


def _random(out: Path) -> None:
    run([sys.executable, HERE / "make_random_llama.py", out])


def _compressed(base: str, recipe: str) -> tuple[Callable[[], str], Callable[[Path], None]]:
    """An artifact of ours; another text of the recipe is another file."""
    file = RECIPES / f"{recipe}.yaml"

    def name() -> str:
        return f"{base}-{recipe}-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"

    def make(out: Path) -> None:
        _gossamer("compress", path_of(base), "--recipe", file, "--out", out)

    return name, make


def _requantized(out: Path) -> None:
    """The float weights of the GGUF file that everything starts from, as a GGUF file that still has its tokenizer."""
    _quantize("--allow-requantize", open_checkpoint("smollm2").path, out, "BF16")


def _random_gguf(out: Path) -> None:
    run([sys.executable, HERE / "make_gguf.py", path_of("1b-bf16"), out])


def _pure(source: str, kind: str) -> Callable[[Path], None]:
    return lambda out: _quantize("--pure", path_of(source), out, kind)


def _quantize(*words: object) -> None:
    tool = llama_cpp_tool("llama-quantize")
    subprocess.run([str(w) for w in (tool, *words)], check=True, capture_output=True, timeout=MINUTES * 60)


def _w8a8(out: Path) -> None:
    run([sys.executable, HERE / "make_w8a8.py", path_of("int8-body"), out])


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


Maker = tuple[Callable[[], str], Callable[[Path], None]]
MODELS: dict[str, Maker] = {
    "bf16": (lambda: "smollm2-bf16", _converted),
    "int4": _compressed("bf16", "bench-int4"),
    "int8": _compressed("bf16", "bench-int8"),
    "int8-body": _compressed("bf16", "bench-int8-body"),
    "w8a8": (lambda: "smollm2-w8a8", _w8a8),
    "bf16.gguf": (lambda: "smollm2-bf16.gguf", _requantized),
    "q4_0": (lambda: "smollm2-q4_0.gguf", _pure("bf16.gguf", "Q4_0")),
    "q8_0": (lambda: "smollm2-q8_0.gguf", _pure("bf16.gguf", "Q8_0")),
    "1b-bf16": (lambda: "1b-bf16", _random),
    "1b-int4": _compressed("1b-bf16", "bench-int4-rtn"),
    "1b-bf16.gguf": (lambda: "1b-bf16.gguf", _random_gguf),
    "1b-q4_0": (lambda: "1b-q4_0.gguf", _pure("1b-bf16.gguf", "Q4_0")),
}
"""Name -> file name in the cache, and what makes it."""
