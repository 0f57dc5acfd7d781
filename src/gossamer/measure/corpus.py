"""Texts to judge a model on, and the check that none of them calibrated it.

Three sources: the language topics that every CPython carries (`default`), WikiText-2 from the hub (`wikitext2`), any
UTF-8 file. Knows no tokens: a corpus is a name and a string. Texts of other Python versions differ, so the name of the
default corpus carries the version, and every record the sha256.
"""

from __future__ import annotations

import platform
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import settings
from ..checkpoint.textprint import line_hashes, text_sha256
from ..errors import Contaminated, MeasureError, UnknownName

NAMES = ("default", "wikitext2")
TOLERATED_SHARE = 0.01
"""Share of a corpus's long lines that may stand in a calibration text: licences and quotations recur everywhere."""

_WIKITEXT2 = ("ggml-org/ci", "wikitext-2-raw-v1.zip", "wikitext-2-raw/wiki.test.raw")


@dataclass(frozen=True)
class Corpus:
    """A text and the name that records give it."""

    name: str
    text: str

    @cached_property
    def sha256(self) -> str:
        return text_sha256(self.text)


def load_corpus(source: str | Path) -> Corpus:
    """`default`, `wikitext2` or a UTF-8 file. Raises UnknownName (no such file), MeasureError (unreadable)."""
    if source == "default":
        return _pydoc_topics()
    if source == "wikitext2":
        return _wikitext2()
    path = Path(source)
    if not path.is_file():
        raise UnknownName("corpus", str(source), NAMES)
    return Corpus(path.name, _decode(path.read_bytes(), str(path)))


def check_contamination(
    corpus: Corpus, manifest: Mapping[str, Any] | None, model: str, judged: str | None = None
) -> None:
    """Raises Contaminated if a text that calibrated `model` is this one, or shares lines with it or its judged part.

    `judged` is the part that is scored, where that is not all: a few known pages are little of a book, but may be all
    of its beginning. Texts that calibrated what the model was made from count as its own.
    """
    texts = _calibrations(manifest)
    known = {line for text in texts for line in text.get("line_hashes") or ()}
    shares = {"": 1.0 if _is_one_of(corpus, texts) else _share(corpus.text, known)}
    if judged is not None:
        shares["the judged part of "] = _share(judged, known)
    part, share = max(shares.items(), key=lambda entry: entry[1])
    if share > TOLERATED_SHARE:
        raise Contaminated(
            f"{model} was calibrated on {share:.1%} of {part}corpus {corpus.name}: "
            "its perplexity there would flatter it",
            hint="judge it on another text with --corpus, or calibrate on another one",
        )


def _calibrations(manifest: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """What calibrated a model and the models that it was made from, as its manifest tells."""
    manifest = manifest or {}
    own, base = manifest.get("calibration"), manifest.get("base") or {}
    return [*([own] if own else []), *(base.get("calibrations") or [])]


def _is_one_of(corpus: Corpus, texts: list[Mapping[str, Any]]) -> bool:
    prints = [print_ for t in texts for print_ in (t.get("sha256"), (t.get("details") or {}).get("text_sha256"))]
    return corpus.sha256 in prints


def _share(text: str, known: set[str]) -> float:
    """Share of the distinct long lines of a text that are known."""
    lines = line_hashes(text) if known else []
    return len(known.intersection(lines)) / max(len(lines), 1)


def _pydoc_topics() -> Corpus:
    from pydoc_data.topics import topics  # type: ignore[import-untyped,unused-ignore]

    return Corpus(f"pydoc-topics-{platform.python_version()}", "\n".join(topics[key] for key in sorted(topics)))


def _wikitext2() -> Corpus:
    """The raw test split as one file, with its line breaks as they are (the form that llama.cpp measures on)."""
    from huggingface_hub import hf_hub_download

    repository, archive, member = _WIKITEXT2
    try:
        path = hf_hub_download(repository, archive, repo_type="dataset", local_files_only=settings.offline())
        with zipfile.ZipFile(path) as file:
            return Corpus("wikitext2-test", _decode(file.read(member), f"{path}:{member}"))
    except zipfile.BadZipFile as error:
        raise MeasureError(f"{path} is no zip file: {error}", hint="delete it and try again") from error
    except MeasureError:
        raise
    except Exception as error:  # whatever an HTTP stack raises: offline, proxy, gated, moved
        raise MeasureError(
            f"WikiText-2 (hub data set {repository}, {archive}) cannot be had: {_first_line(error)}",
            hint="go online and unset HF_HUB_OFFLINE, or name a local copy with --corpus FILE",
        ) from error


def _decode(data: bytes, path: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MeasureError(f"{path} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}") from error
    if not text.strip():
        raise MeasureError(f"{path} is empty")
    return text


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
