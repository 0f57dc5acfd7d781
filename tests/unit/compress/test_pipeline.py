"""The pipeline on a tiny model: what comes out, what survives a kill, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gossamer.checkpoint import journal, open_checkpoint
from gossamer.checkpoint.atomic import Lock
from gossamer.checkpoint.load import load_decoder
from gossamer.compress import assembly, pipeline
from gossamer.compress.calibration import Calibration, token_hash
from gossamer.compress.pipeline import Later, compress
from gossamer.compress.plan import check_fit, make_plan
from gossamer.compress.recipe import Recipe, parse_recipe
from gossamer.compress.units import Units
from gossamer.errors import (
    CompressionError,
    DoesNotFit,
    NumericalError,
    OutputExists,
    OutputLocked,
    RecipeError,
    ResumeMismatch,
    ShapeMismatch,
    UsageError,
)
from tiny_llama import make_folder

SHAPE = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model", **SHAPE)


def recipe(method: str = "gptq", seed: int = 0, **options: Any) -> Recipe:
    stage = {"method": method, "bits": 4, "group_size": 32, **options}
    return parse_recipe({"version": 1, "name": "r", "calibration": {"seed": seed}, "stages": [stage]}, "test")


def calibration(seed: int = 0) -> Calibration:
    tokens = torch.randint(0, 300, (4, 48), generator=torch.Generator().manual_seed(seed))
    record = {"kind": "self", "sha256": token_hash(tokens), "sequences": 4, "length": 48, "seed": seed}
    return Calibration(tokens, {**record, "line_hashes": [], "details": {"source": "self"}})


def digest(folder: Path) -> str:
    """One hash over the names and bytes of all files of a folder."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def logits(path: Path, rounded: bool = False) -> torch.Tensor:
    """Float32 logits [1, 40, vocab]; `rounded`: with every block's weights rounded to bf16 first."""
    decoder = load_decoder(open_checkpoint(path))
    for weight in decoder.blocks.parameters() if rounded else ():
        weight.copy_(weight.bfloat16().float())
    return decoder(torch.arange(40).unsqueeze(0))


def leave_unfinished(*arguments: Any, **options: Any) -> None:
    """A compression that ends when all its blocks are done and nothing is put together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline._Run, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compress(*arguments, **options)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 3},
        {"bits": 2, "symmetric": False},
        {"bits": 8, "group_size": "channel"},
        {"bits": 4, "symmetric": False, "clip": "mse"},
        {"group_size": "auto"},
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "plain",
)
def test_transformers_reads_the_same_folder_with_the_same_logits(
    model: Path, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    out = tmp_path / "out"
    compress(open_checkpoint(model), recipe(method, **options), out, calibration())
    # transformers 5.23 keeps room for zero points of another shape than compressed-tensors 0.20 packs them in, unless
    # it unpacks while loading.
    way = {} if options.get("symmetric", True) else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **way)
    with torch.no_grad():
        found = theirs(torch.arange(40).unsqueeze(0)).logits
    # While loading they round each weight to bf16 (relative 2^-9); later they do not, and neither do we.
    assert (found - logits(out, rounded=bool(way))).abs().max() < 1e-4 * found.abs().max()


def test_more_bits_and_gptq_lose_less(model: Path, tmp_path: Path) -> None:
    reference = logits(model)
    errors = {}
    for method, bits in (("rtn", 8), ("rtn", 4), ("rtn", 2)):
        compress(open_checkpoint(model), recipe(method, bits=bits), tmp_path / f"{method}{bits}", calibration())
        errors[bits] = float((logits(tmp_path / f"{method}{bits}") - reference).square().mean())
    assert errors[8] < errors[4] < errors[2]


def test_the_artifact_says_what_it_is(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = compress(open_checkpoint(model), recipe(), out, calibration())
    manifest = json.loads((out / "gossamer.json").read_text())
    assert manifest["recipe"] == recipe().canonical()
    assert manifest["calibration"]["sha256"] == calibration().record["sha256"]
    assert manifest["base"]["fingerprint"] == open_checkpoint(model).fingerprint()
    assert len(result.layers) == 4 * 7
    assert all(0 < layer["relative_error"] < 0.1 for layer in result.layers)
    assert result.layers[0]["bits_per_weight"] == pytest.approx(4 + 16 / 32 + 128 / (64 * 64))  # codes, scales, shape
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("stage", [{"method": "gptq"}, {"method": "efficientqat"}, {"method": "awq"}])
def test_a_stage_may_read_the_first_sequences_alone(model: Path, tmp_path: Path, stage: dict[str, Any]) -> None:
    whole = calibration()
    few = Calibration(whole.tokens[:2], whole.record | {"sha256": token_hash(whole.tokens[:2]), "sequences": 2})
    made = {"part": ({"sequences": 2}, whole), "few": ({}, few), "all": ({}, whole)}
    part, alone, every = (
        load_file(
            compress(open_checkpoint(model), recipe(**stage, **limit), tmp_path / name, text).path / "model.safetensors"
        )
        for name, (limit, text) in made.items()
    )
    assert all(torch.equal(tensor, alone[name]) for name, tensor in part.items())
    assert any(not torch.equal(tensor, every[name]) for name, tensor in part.items())


def test_two_runs_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        compress(open_checkpoint(model), recipe(), tmp_path / name, calibration())
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_the_same_command_again_does_nothing_and_another_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(open_checkpoint(model), recipe(), out, calibration())
    assert compress(open_checkpoint(model), recipe(), out, calibration()).existed
    with pytest.raises(OutputExists, match=r"stages\[0\].bits was 4, is now 3"):
        compress(open_checkpoint(model), recipe(bits=3), out, calibration())
    compress(open_checkpoint(model), recipe(bits=3), out, calibration(), overwrite=True)
    assert json.loads((out / "gossamer.json").read_text())["recipe"]["stages"][0]["bits"] == 3


def test_a_folder_that_is_not_ours_is_never_replaced_in_silence(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OutputExists):
            compress(open_checkpoint(model), recipe("rtn"), tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_a_model_is_never_written_over_itself(model: Path, tmp_path: Path) -> None:
    compress(open_checkpoint(model), recipe("rtn"), tmp_path / "out")
    before = digest(tmp_path / "out")
    with pytest.raises(OutputExists, match="is the model that is read"):
        compress(open_checkpoint(tmp_path / "out"), recipe("rtn", bits=3), tmp_path / "out", overwrite=True)
    assert digest(tmp_path / "out") == before


def test_what_a_run_killed_at_its_very_end_leaves_is_swept(model: Path, tmp_path: Path) -> None:
    compress(open_checkpoint(model), recipe("rtn"), tmp_path / "out")
    (tmp_path / ".out.work").mkdir()
    assert compress(open_checkpoint(model), recipe("rtn"), tmp_path / "out").existed
    assert not (tmp_path / ".out.work").exists()


def test_a_failed_overwrite_keeps_the_old_artifact(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compress(open_checkpoint(model), recipe("rtn"), out)
    before = digest(out)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assembly, "write_weights", full)
    with pytest.raises(DoesNotFit):
        compress(open_checkpoint(model), recipe("rtn", bits=3), out, overwrite=True)
    assert digest(out) == before


def test_an_artifact_keeps_its_name_until_its_replacement_is_whole(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compress(open_checkpoint(model), recipe("rtn"), out)
    before, write = digest(out), assembly.write_weights
    seen = []

    def look(*arguments: Any) -> Any:
        seen.append(digest(out))
        return write(*arguments)

    monkeypatch.setattr(assembly, "write_weights", look)
    compress(open_checkpoint(model), recipe("rtn", bits=3), out, overwrite=True)
    assert seen == [before]
    assert digest(out) != before
    assert not list(tmp_path.glob(".out*"))


def test_a_kill_between_the_two_renames_of_an_overwrite_loses_nothing(model: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.work"
    compress(open_checkpoint(model), recipe("rtn"), out)
    before = digest(out)
    work.mkdir()
    out.rename(work / "replaced")
    assert compress(open_checkpoint(model), recipe("rtn"), out, restart=True).existed
    assert digest(out) == before


def test_unfinished_work_of_another_recipe_outlives_the_command_that_made_the_artifact(
    model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compress(open_checkpoint(model), recipe("rtn"), out)
    leave_unfinished(open_checkpoint(model), recipe("rtn", bits=3), out, overwrite=True)
    assert compress(open_checkpoint(model), recipe("rtn"), out).existed
    assert compress(open_checkpoint(model), recipe("rtn", bits=3), out, overwrite=True).resumed == 4


def test_nothing_is_calibrated_for_an_output_that_will_be_refused_or_is_there(model: Path, tmp_path: Path) -> None:
    def never() -> Calibration:
        raise AssertionError

    out = tmp_path / "out"
    compress(open_checkpoint(model), recipe(), out, calibration())
    assert compress(open_checkpoint(model), recipe(), out, Later(never)).existed
    with pytest.raises(OutputExists, match="seed was 0, is now 1"):
        compress(open_checkpoint(model), recipe(seed=1), out, Later(never))
    with Lock(tmp_path / "other"), pytest.raises(OutputLocked):
        compress(open_checkpoint(model), recipe(), tmp_path / "other", Later(never))
    with pytest.raises(DoesNotFit, match="--calibration FILE"):
        compress(open_checkpoint(model), recipe(), tmp_path / "other", Later(never, memory=1 << 60))


def test_a_method_that_needs_tokens_says_so(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gptq needs calibration"):
        compress(open_checkpoint(model), recipe(), tmp_path / "out")


def test_tokens_of_another_vocabulary_are_refused(model: Path, tmp_path: Path) -> None:
    text = calibration()
    text.tokens[1, 2] = open_checkpoint(model).config.vocab_size
    with pytest.raises(CompressionError, match="are not of this model"):
        compress(open_checkpoint(model), recipe(), tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_what_is_made_from_an_artifact_remembers_the_texts_that_calibrated_it(model: Path, tmp_path: Path) -> None:
    paths = [model, *(tmp_path / name for name in "abc")]
    for i, method in enumerate(("gptq", "rtn", "gptq")):
        compress(open_checkpoint(paths[i]), recipe(method, bits=8), paths[i + 1], calibration(i))
    base = json.loads((tmp_path / "c" / "gossamer.json").read_text())["base"]
    assert [c["sha256"] for c in base["calibrations"]] == [calibration(0).record["sha256"]]
    assert base["name"] == "b"  # and no folder of this machine


def test_packed_again_without_its_embedding_it_is_an_ordinary_folder(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    compress(open_checkpoint(model), recipe("rtn", bits=8, head={"bits": 8, "group_size": 32}), tmp_path / "packed")
    compress(open_checkpoint(tmp_path / "packed"), recipe("rtn", bits=8), tmp_path / "out")
    ours = logits(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert (theirs(torch.arange(40).unsqueeze(0)).logits - ours).abs().max() < 1e-4 * ours.abs().max()


def test_a_kill_amid_the_last_clean_up_leaves_nothing_that_stops_the_next_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def remove_one(folder: Path) -> None:
        min(folder.glob("block-*")).unlink()
        raise Killed

    out = tmp_path / "out"
    monkeypatch.setattr(journal.shutil, "rmtree", remove_one)
    with pytest.raises(Killed):
        compress(open_checkpoint(model), recipe(), out, calibration())
    monkeypatch.undo()
    whole = digest(out)
    out.rename(tmp_path / "moved")
    compress(open_checkpoint(model), recipe(), out, calibration())
    assert digest(out) == whole


def test_killed_at_twenty_random_points_it_resumes_to_the_same_bytes(model: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads that it does not have
    started = time.monotonic()
    compress(open_checkpoint(model), recipe(), tmp_path / "whole", calibration())
    whole, seconds = digest(tmp_path / "whole"), time.monotonic() - started
    out, rng, kills = tmp_path / "out", random.Random(0), 0
    for _ in range(20):
        pid = os.fork()
        if pid == 0:  # the child must never go on as a second test run, whatever happens in it
            try:
                compress(open_checkpoint(model), recipe(), out, calibration())
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.0, 1.2 * seconds))
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL)
        kills += code == -signal.SIGKILL
        assert not out.exists() or digest(out) == whole
        if out.exists():
            for path in sorted(out.rglob("*"), reverse=True):
                path.unlink()
            out.rmdir()
    assert kills >= 3
    result = compress(open_checkpoint(model), recipe(), out, calibration())
    assert digest(out) == whole
    assert not result.existed


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_block_boundary_resumes_to_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Stops after each unit in turn; at most the block in work is done again."""
    options = {"method": method, "embedding": {"bits": 8, "group_size": 32}}
    compress(open_checkpoint(model), recipe(**options), tmp_path / "whole", calibration())
    write = Units.write

    class Stopped(Exception):
        pass

    def write_and_stop(self: Any, *args: Any) -> None:
        write(self, *args)
        raise Stopped

    monkeypatch.setattr(Units, "write", write_and_stop)
    for _ in range(5):
        with pytest.raises(Stopped):
            compress(open_checkpoint(model), recipe(**options), tmp_path / "out", calibration())
    monkeypatch.setattr(Units, "write", write)
    result = compress(open_checkpoint(model), recipe(**options), tmp_path / "out", calibration())
    assert result.resumed == 5
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize("change", ["recipe", "model", "corpus", "seed"])
def test_resume_of_other_work_stops_and_names_the_difference(model: Path, tmp_path: Path, change: str) -> None:
    out = tmp_path / "out"
    leave_unfinished(open_checkpoint(model), recipe(), out, calibration())
    other = make_folder(tmp_path / "other", seed=1, **SHAPE) if change == "model" else model
    wanted = {"recipe": recipe(bits=3), "seed": recipe(seed=1)}.get(change, recipe())
    text = calibration(0 if change == "recipe" else 1)  # another model or seed brings other samples along
    names = {
        "recipe": "bits was 4, is now 3",
        "model": "model was",
        "corpus": "calibration was",
        "seed": "seed was 0, is now 1",
    }
    with pytest.raises(ResumeMismatch, match=names[change]):
        compress(open_checkpoint(other), wanted, out, text)
    compress(open_checkpoint(other), wanted, out, text, restart=True)
    assert out.exists()


def test_a_second_run_on_one_output_gets_a_lock_error(model: Path, tmp_path: Path) -> None:
    with Lock(tmp_path / "out"), pytest.raises(OutputLocked, match=str(os.getpid())):
        compress(open_checkpoint(model), recipe("rtn"), tmp_path / "out")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_nan_in_the_checkpoint_is_named_and_leaves_nothing(tmp_path: Path, method: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_folder(tmp_path / "model", **SHAPE)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"model.layers.2.mlp.up_proj.weight has 1 weights"):
        compress(open_checkpoint(folder), recipe(method), tmp_path / "out", calibration())
    assert not (tmp_path / "out").exists()


def test_packed_embedding_runs_here_and_is_refused_by_transformers(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    compress(open_checkpoint(model), recipe("rtn", bits=8, head={"bits": 8, "group_size": 32}), out)
    reference = logits(model)
    assert (logits(out) - reference).abs().max() < 0.1 * reference.abs().max()
    small = open_checkpoint(out)
    assert small.format("model.embed_tokens.weight").name == "int8-g32"
    with pytest.raises(ValueError, match="gossamer_llama"):
        AutoModelForCausalLM.from_pretrained(out)


def test_different_grids_for_a_tied_head_are_refused(model: Path, tmp_path: Path) -> None:
    options = {"head": {"bits": 8, "group_size": 32}, "embedding": {"bits": 4, "group_size": 32}}
    with pytest.raises(RecipeError, match="head is its embedding"):
        compress(open_checkpoint(model), recipe("rtn", **options), tmp_path / "out")


def test_untied_head_is_packed_and_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_folder(tmp_path / "model", tie_word_embeddings=False, **SHAPE)
    compress(open_checkpoint(folder), recipe("rtn", head={"bits": 8, "group_size": 32}), tmp_path / "out")
    ours = logits(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        difference = theirs(torch.arange(40).unsqueeze(0)).logits - ours
    assert difference.abs().max() < 0.02 * ours.abs().max()


def test_group_size_that_does_not_divide_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ShapeMismatch, match=r"(?s)48 does not divide.*nearest.*auto"):
        compress(open_checkpoint(model), recipe(group_size=48), tmp_path / "out", calibration())
    assert list(tmp_path.iterdir()) == [model]


def test_plan_says_the_size_that_comes_out(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model)
    for options in ({}, {"bits": 3, "symmetric": False}, {"head": {"bits": 8, "group_size": 64}}):
        planned = make_plan(checkpoint.config, recipe("rtn", **options), checkpoint.dtype)
        compress(checkpoint, recipe("rtn", **options), tmp_path / "out", overwrite=True)
        assert open_checkpoint(tmp_path / "out").weight_bytes() == planned.output_bytes


def test_what_does_not_fit_is_said_with_both_numbers_and_the_way_out(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    planned = make_plan(checkpoint.config, recipe(), checkpoint.dtype)
    with pytest.raises(DoesNotFit, match=r"(?s)0\.10 GB are free.*--calibration-sequences"):
        check_fit(planned, memory=10**8, disk=10**12, needs_statistics=True)
    sampling = make_plan(checkpoint.config, recipe(), checkpoint.dtype, sampling_bytes=10**9)
    assert sampling.peak_bytes > 10**9 > planned.peak_bytes
    with pytest.raises(DoesNotFit, match=r"(?s)0\.10 GB are free.*--calibration FILE"):
        check_fit(sampling, memory=10**8, disk=10**12, needs_statistics=True)
    with pytest.raises(DoesNotFit, match=r"(?s)of disk.*--out"):
        check_fit(planned, memory=10**12, disk=10, needs_statistics=True)


def test_one_long_sequence_and_a_packed_head_are_planned_for(model: Path) -> None:
    config = open_checkpoint(model).config

    def peak(sequences: int, length: int, **options: Any) -> int:
        plain = recipe(**options).model_dump(mode="json")
        plain["calibration"] |= {"sequences": sequences, "length": length}
        return make_plan(config, parse_recipe(plain, "test"), torch.bfloat16).peak_bytes

    assert peak(1, 65536) > peak(128, 512) + 65536 * 128 * 4  # a sequence is never split
    assert peak(1, 64, head={"bits": 8, "group_size": 32}) > peak(1, 64)
