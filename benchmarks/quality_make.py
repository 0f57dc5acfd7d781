"""Makes the model files of the quality benchmark, each in a process of its own whose time and peak memory are taken.

What was made before from the same model, tokens, options and code is used again, with the figures of that time. Peers
are given the tokens that ours calibrates on; llama.cpp, which takes only text, the text that they spell.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import cpu_models
import gossamer
import peers
import quality_unpack
from cpu_sides import Watch
from gossamer.checkpoint import open_checkpoint
from gossamer.cli.compress import recipes_folder
from gossamer.compress.calibration import Calibration, calibrate, token_hash
from gossamer.compress.recipe import CalibrationSpec, load_recipe
from gossamer.engine import LLM
from gossamer.measure.records import machine_block
from quality_rows import FLOAT, LLAMA, OURS, Row

HERE = Path(__file__).parent
PACKAGE = Path(gossamer.__file__).parent
WORKERS = {
    "llmcompressor": "quality_llmcompressor.py",
    "gptqmodel": "quality_gptqmodel.py",
    "auto-round": "quality_auto_round.py",
}
"""Peers that are Python packages, and what runs in their environments."""
GPTQ_LAYOUT = ("gptqmodel", "auto-round")
"""Those whose folders our reader does not read."""


class Failed(Exception):
    """A row that could not be made; the message says why in one line."""


@dataclass(frozen=True)
class Made:
    """One model file: where it is, where its weights can be read as floats, and what it cost."""

    path: str
    judged: str
    stored_bytes: int
    seconds: float | None
    """Of the whole process, libraries and loading counted; None for the float model."""
    inside_seconds: float | None
    """Of the method alone, where the maker says so."""
    peak_bytes: int | None
    foreign_cores: float | None
    """Cores that others kept busy meanwhile: with many, the seconds say little."""
    version: str | None
    machine: str
    """Whose time it is."""
    created: str


@dataclass(frozen=True)
class Cost:
    """What the operating system says of a process that has ended well."""

    seconds: float
    peak_bytes: int
    foreign_cores: float
    output: str


class Workshop:
    """Everything that rows are made from, and where they are put."""

    def __init__(
        self,
        work: Path,
        threads: int,
        spec: CalibrationSpec,
        minutes: float,
        iterations: int,
        tokens: Tensor | None = None,
    ) -> None:
        """`tokens`, if given, are what the model would sample for the specification."""
        self.work, self.threads, self.spec = work, threads, spec
        self.minutes, self.iterations = minutes, iterations
        work.mkdir(parents=True, exist_ok=True)
        self.base = cpu_models.path_of("bf16")
        checkpoint = open_checkpoint(self.base)
        self.parameters = checkpoint.parameters()
        self.fingerprint = checkpoint.fingerprint()
        self.calibration = self._calibrate(tokens)
        self.tokens = work / "calibration.safetensors"
        save_file({"tokens": self.calibration.tokens.int().contiguous()}, self.tokens)

    def make(self, row: Row, again: bool = False) -> Made:
        """The row's file, made if it is not there or `again`. Raises Failed."""
        if row.reason is not None:
            raise Failed(row.reason)
        folder = self.work / "models" / row.key.replace("/", "-")
        note = folder / "made.json"
        maker = {FLOAT: self._float, OURS: self._ours, LLAMA: self._llama}.get(row.maker, self._torch_peer)
        try:
            key = self.key_of(row)
            known = json.loads(note.read_text()) if note.exists() else {}
            if known.get("key") == key and not again:
                return Made(**known["made"])
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            made = maker(row, folder)
        except MAKING as error:
            raise Failed(short(error)) from error
        note.write_text(json.dumps({"key": key, "made": asdict(made)}, indent=1))
        return made

    def _calibrate(self, tokens: Tensor | None) -> Calibration:
        """The model's own samples, put where `gossamer compress` takes and keeps them."""
        checkpoint = open_checkpoint(self.base)

        def sample(*shape: int) -> Tensor:
            return LLM(checkpoint).sample_tokens(*shape) if tokens is None else tokens

        return calibrate(self.spec, checkpoint, sample)

    def key_of(self, row: Row) -> str:
        """Hash of all that decides what the row's file holds and costs. Raises GossamerError."""
        parts: dict[str, Any] = {
            "model": self.fingerprint,
            "tokens": token_hash(self.calibration.tokens),
            "options": {**row.options, "recipe": None, "threads": self.threads},
        }
        if row.maker == OURS:
            parts["recipe"] = load_recipe(row.options["recipe"], recipes_folder()).canonical()
            parts["code"] = code_hash("compress", "formats", "model", "checkpoint", "kernels")
        elif row.maker == LLAMA:
            parts["code"] = peers.LLAMA_CPP
        elif row.maker in WORKERS:
            parts["iterations"] = self.iterations
            parts["code"] = [(HERE / file).read_text() for file in (WORKERS[row.maker], "quality_unpack.py")]
            parts["version"] = peers.PINNED[row.maker]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _made(self, path: Path, cost: Cost | None, judged: Path | None = None, version: str | None = None) -> Made:
        """Facts of a finished file."""
        return Made(
            path=str(path),
            judged=str(judged or path),
            stored_bytes=stored_bytes(path),
            seconds=None if cost is None else round(cost.seconds, 2),
            inside_seconds=None if cost is None else inside_seconds(cost.output),
            peak_bytes=None if cost is None else cost.peak_bytes,
            foreign_cores=None if cost is None else round(cost.foreign_cores, 2),
            version=version,
            machine=machine_name(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _float(self, row: Row, folder: Path) -> Made:
        return self._made(cpu_models.path_of(row.options["model"]), None)

    def _ours(self, row: Row, folder: Path) -> Made:
        out = folder / "model"
        words = ["compress", self.base, "--recipe", row.options["recipe"], "--out", out, "--restart", "--quiet"]
        like_peers = row.options["calibrated"] and "trained_tokens" not in row.options
        if like_peers:
            spec = self.spec
            words += ["--calibration", spec.source, "--calibration-sequences", spec.sequences]
            words += ["--calibration-length", spec.length, "--seed", spec.seed]
        cost = self._measured([sys.executable, "-m", "gossamer", *words], folder)
        used = (open_checkpoint(out).manifest or {}).get("calibration") or {}
        if like_peers and used.get("sha256") != token_hash(self.calibration.tokens):
            raise Failed("it was calibrated on other tokens than the peers")
        return self._made(out, cost, version=importlib.metadata.version("gossamer"))

    def _torch_peer(self, row: Row, folder: Path) -> Made:
        """A row of one of WORKERS, which may leave logs where it runs."""
        out = folder / "model"
        options = json.dumps({**row.options, "threads": self.threads, "iterations": self.iterations})
        worker = HERE / WORKERS[row.maker]
        places = [path.absolute() for path in (peers.python_of(row.maker), worker, self.base, self.tokens, out)]
        cost = self._measured([*places, options], folder, cwd=folder)
        judged = out
        if row.maker in GPTQ_LAYOUT:
            judged = folder / "float"
            quality_unpack.unpack_folder(self._folder_with_config(out), judged)
        return self._made(self._folder_with_config(out), cost, judged, peers.PINNED[row.maker].split("==")[1])

    def _folder_with_config(self, out: Path) -> Path:
        """`out`, or the only folder in it that holds a model: some peers add one for the scheme."""
        if (out / "config.json").exists():
            return out
        found = list(out.glob("*/config.json"))
        if len(found) != 1:
            raise Failed(f"it wrote no model into {out}")
        return found[0].parent

    def _llama(self, row: Row, folder: Path) -> Made:
        """A GGUF file by llama.cpp's quantizer; the time of its importance matrix counts."""
        source, out = cpu_models.path_of("bf16.gguf"), folder / "model.gguf"
        spent = Cost(0.0, 0, 0.0, "")
        flags = list(row.options["flags"])
        if row.options["matrix"]:
            matrix, spent = self._importance_matrix(source)
            flags += ["--imatrix", matrix]
        tool = peers.llama_cpp_tool("llama-quantize")
        cost = self._measured([tool, *flags, source, out, row.options["kind"], self.threads], folder)
        most = max(spent.peak_bytes, cost.peak_bytes), max(spent.foreign_cores, cost.foreign_cores)
        both = Cost(spent.seconds + cost.seconds, *most, "")
        return self._made(out, both, version=peers.LLAMA_CPP)

    def _importance_matrix(self, source: Path) -> tuple[Path, Cost]:
        """llama.cpp's statistics of the calibration text, made once, and what they cost."""
        name = f"imatrix-{token_hash(self.calibration.tokens)[:12]}"
        folder = self.work / "models" / name
        matrix, note = folder / "imatrix.gguf", folder / "cost.json"
        if not note.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            text = folder / "calibration.txt"
            tokenizer = open_checkpoint(self.base).tokenizer()
            text.write_text("\n".join(tokenizer.decode(row) for row in self.calibration.tokens.tolist()))
            words = ["-m", source, "-f", text, "-o", matrix, "-c", self.spec.length, "-t", self.threads, "--no-ppl"]
            cost = self._measured([peers.llama_cpp_tool("llama-imatrix"), *words], folder)
            note.write_text(json.dumps({**asdict(cost), "output": ""}))
        return matrix, Cost(**json.loads(note.read_text()))

    def _measured(self, words: Iterable[object], folder: Path, cwd: Path | None = None) -> Cost:
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "GOSSAMER_THREADS")}
        return measured(words, folder / "make.log", self.minutes, {**threads, "HF_HUB_OFFLINE": "1"}, cwd)


MAKING = (Failed, subprocess.SubprocessError, OSError, gossamer.errors.GossamerError, LookupError, ValueError)
"""What may happen while a row is made."""


def measured(
    words: Iterable[object], log: Path, minutes: float, environment: Mapping[str, str], cwd: Path | None = None
) -> Cost:
    """Run a command, in `cwd`, and take its time and peak memory; what it prints goes to the log too. Raises Failed.

    The peak is that of the largest of its processes, as the operating system keeps it.
    """
    command = [str(word) for word in words]
    output = log.with_suffix(".out")
    watch = Watch()
    with log.open("wb") as errors, output.open("wb") as text:
        began = time.monotonic()
        process = subprocess.Popen(
            command, stdout=text, stderr=errors, stdin=subprocess.DEVNULL,
            env={**os.environ, **environment}, cwd=cwd, start_new_session=True,
        )  # fmt: skip
        try:
            status, peak = _wait(process.pid, began + minutes * 60)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            os.waitpid(process.pid, 0)
            raise
        finally:
            process.returncode = 0  # it was waited for here
        seconds = time.monotonic() - began
    printed = output.read_text(errors="replace")
    if status:
        raise Failed(_last_words(log.read_text(errors="replace")) or _last_words(printed) or f"exit status {status}")
    return Cost(seconds, peak, watch.foreign_cores(), printed)


def _wait(pid: int, until: float) -> tuple[int, int]:
    """Exit status and peak bytes of a child. Raises Failed when its time is over."""
    while time.monotonic() < until:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
        time.sleep(0.05)
    raise Failed("it took longer than it was given")


def _last_words(text: str) -> str:
    """The last line of what a program said, with letters in it, short enough for a table."""
    lines = [line.strip() for line in text.splitlines() if any(c.isalpha() for c in line)]
    return lines[-1][:300] if lines else ""


def short(error: BaseException) -> str:
    """One line for a table."""
    said = getattr(error, "stderr", None)
    return _last_words(said if isinstance(said, str) else str(error)) or type(error).__name__


def inside_seconds(output: str) -> float | None:
    """What a worker says in its last line, if it does."""
    lines = output.strip().splitlines()
    try:
        return round(float(json.loads(lines[-1])["seconds"]), 2)
    except (IndexError, KeyError, TypeError, ValueError):
        return None


def machine_name() -> str:
    """The processor, what of its instructions matters to matrix products, and how many cores there are."""
    machine = machine_block()
    return f"{machine['cpu']} ({machine['isa']}), {machine['cores']} cores"


def stored_bytes(path: Path) -> int:
    """Bytes of all tensors of a model as its files hold them: of a folder, the files that begin with `model`."""
    if path.is_file():
        return open_checkpoint(path).weight_bytes()
    return sum(_tensor_bytes(file) for file in sorted(path.glob("model*.safetensors")))


def _tensor_bytes(file: Path) -> int:
    """Bytes of the tensors of one safetensors file, without its header."""
    with safe_open(file, "pt") as tensors:
        parts = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118 (it is no mapping)
        return sum(math.prod(part.get_shape()) * BYTES[part.get_dtype()] for part in parts)


BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
"""Bytes of an element, by the name that safetensors gives its type."""


@functools.cache
def code_hash(*folders: str) -> str:
    """Hash of the package's Python files in these folders."""
    digest = hashlib.sha256()
    for file in sorted(file for folder in folders for file in (PACKAGE / folder).rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
