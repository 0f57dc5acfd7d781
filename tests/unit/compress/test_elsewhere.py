"""Blocks made by others, in any order, by what a process can be told: the bytes of a run that made them itself."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer.checkpoint import open_checkpoint
from gossamer.compress.calibration import Calibration, token_hash
from gossamer.compress.elsewhere import Spread
from gossamer.compress.pipeline import Result, compress
from gossamer.compress.recipe import parse_recipe
from gossamer.errors import CompressionError
from tiny_llama import make_folder

NARROW = {"method": "wanda-sp", "ratio": 0.25, "heads": "keep", "multiple": 8}
LOCAL = {"method": "recover-local", "inputs": "teacher", "tokens": 24 * 8}
ROUNDED = {"method": "rtn", "bits": 4, "group_size": 16, "embedding": {"bits": 8, "group_size": "channel"}}
WALKED = {"method": "gptq", "bits": 4, "group_size": 8}
LOW_RANK = {"method": "svd", "ratio": 0.6, "multiple": 4, "min_rank": 4}

Works = Iterable[tuple[str, Callable[[], Any]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "model", num_hidden_layers=4, attention_bias=True)


def run(model: Path, out: Path, *stages: dict[str, Any], spread: Spread | None = None) -> Result:
    text = {"source": "self", "sequences": 12, "length": 24}
    recipe = parse_recipe({"version": 1, "name": "r", "calibration": text, "stages": list(stages)}, "test")
    tokens = torch.randint(0, 300, (12, 24), generator=torch.Generator().manual_seed(0))
    record = {"kind": "self", "sha256": token_hash(tokens), "sequences": 12, "length": 24, "seed": 0}
    calibration = Calibration(tokens, {**record, "line_hashes": [], "details": {"source": "self"}})
    return compress(open_checkpoint(model), recipe, out, calibration, spread=spread)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


class Others:
    """Other processes that share nothing but files, and end in another order than they began."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after, self.done = stop_after, list[str]()

    def __call__(self, works: Works) -> Iterator[tuple[str, Any]]:
        told = [(name, pickle.dumps(work)) for name, work in works]
        for name, work in reversed(told):
            if len(self.done) == self.stop_after:
                raise KeyboardInterrupt
            self.done.append(name)
            yield name, pickle.loads(work)()


BLOCKS = [f"block-{i:04d}" for i in (3, 2, 1, 0)]


@pytest.mark.parametrize(
    ("stages", "elsewhere"),
    [
        ([ROUNDED], BLOCKS),
        ([{"method": "rotate"}, ROUNDED], BLOCKS),
        ([LOW_RANK], BLOCKS),
        ([NARROW, LOCAL, WALKED], BLOCKS),
        ([{"method": "depth", "ratio": 0.25}, LOCAL, ROUNDED], [*BLOCKS[1:], *BLOCKS[1:]]),
        ([NARROW, LOCAL | {"inputs": "student"}], []),
        ([WALKED], []),
    ],
)
def test_others_make_the_same_bytes_in_any_order(
    model: Path, tmp_path: Path, stages: list[dict[str, Any]], elsewhere: list[str]
) -> None:
    others = Others()
    here, there = run(model, tmp_path / "here", *stages), run(model, tmp_path / "there", *stages, spread=others)
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert there.layers == here.layers
    assert others.done == elsewhere
    assert not (tmp_path / ".there.work").exists()


@pytest.mark.parametrize("stages", [[ROUNDED], [NARROW, LOCAL]], ids=["rtn", "recover-local"])
def test_blocks_that_others_have_made_are_not_made_again(
    model: Path, tmp_path: Path, stages: list[dict[str, Any]]
) -> None:
    run(model, tmp_path / "here", *stages)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "there", *stages, spread=Others(stop_after=2))
    again = Others(stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "there", *stages, spread=again)
    assert again.done == BLOCKS[2:3]
    result = run(model, tmp_path / "there", *stages)  # and here, without them
    assert result.resumed >= 3
    assert files(tmp_path / "there") == files(tmp_path / "here")


def test_streams_lie_on_disk_for_blocks_that_are_asked_for_and_no_longer(model: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def in_turn(works: Works) -> Iterator[tuple[str, Any]]:
        for name, work in works:
            seen.append(len(list((tmp_path / ".out.work").rglob("*-streams.safetensors"))))
            yield name, work()

    run(model, tmp_path / "out", NARROW, LOCAL, spread=in_turn)
    assert seen == [1, 1, 1, 1]


def test_a_process_that_sees_another_model_under_that_path_makes_nothing(model: Path, tmp_path: Path) -> None:
    mine = make_folder(tmp_path / "mine", num_hidden_layers=4)

    def after_a_change(works: Works) -> Iterator[tuple[str, Any]]:
        told = list(works)
        weights = mine / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
        yield from ((name, work()) for name, work in told)

    with pytest.raises(CompressionError, match="not everywhere the same model"):
        run(mine, tmp_path / "out", ROUNDED, spread=after_a_change)
    assert not (tmp_path / "out").exists()


def test_errors_of_others_are_those_of_the_run(tmp_path: Path) -> None:
    bad = make_folder(tmp_path / "bad", num_hidden_layers=4)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressionError, match=r"model\.layers\.2\.mlp\.up_proj\.weight has 1 weights that are NaN"):
        run(bad, tmp_path / "out", ROUNDED, spread=Others())
