"""The pipeline with methods of every kind: what each is given, what reaches the output, what a kill may not change."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import fake_methods
import pytest
import torch
import torch.nn.functional as F
from fake_methods import SEEN, linear_names, register
from safetensors.torch import load_file
from torch import Tensor

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.compress.calibration import Calibration, token_hash
from gossamer.compress.method import GridMethod
from gossamer.compress.pipeline import Result, compress
from gossamer.compress.plan import make_plan
from gossamer.compress.recipe import Recipe, parse_recipe
from gossamer.compress.registry import METHODS
from gossamer.compress.units import Units
from gossamer.errors import CompressionError, RecipeError, ResumeMismatch, UsageError
from gossamer.model.decoder import Block, Decoder
from tiny_llama import make_folder

SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
HEAD = {"bits": 8, "group_size": 32}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    register(monkeypatch)
    return make_folder(tmp_path / "model", attention_bias=True, **SHAPE)


def recipe(*stages: str | dict[str, Any]) -> Recipe:
    full = [{"method": s} if isinstance(s, str) else s for s in stages]
    for stage in full:
        if issubclass(METHODS[stage["method"]], GridMethod):
            stage.setdefault("group_size", 32)
    return parse_recipe({"version": 1, "name": "r", "stages": full}, "test")


def calibration() -> Calibration:
    tokens = torch.randint(0, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    record = {"kind": "self", "sha256": token_hash(tokens), "sequences": 4, "length": 24, "seed": 0}
    return Calibration(tokens, {**record, "line_hashes": [], "details": {"source": "self"}})


def run(model: Path, wanted: Recipe, out: Path) -> Result:
    return compress(open_checkpoint(model), wanted, out, calibration())


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stream(decoder: Decoder, tokens: Tensor) -> list[Tensor]:
    """Outputs of each block in turn [sequences, time, hidden]."""
    x, outputs = decoder.embed(tokens), []
    rotation = decoder.rotation(torch.arange(tokens.shape[1]).expand(tokens.shape))
    for block in decoder.blocks:
        x = block(x, rotation)
        outputs.append(x)
    return outputs


EVERY_KIND = [
    pytest.param(("fake-gradient",), id="gradient"),
    pytest.param(({"method": "fake-fold", "head": HEAD},), id="block"),
    pytest.param(("fake-double", "gptq"), id="transform"),
    pytest.param(({"method": "rtn", "symmetric": False, "head": HEAD}, "fake-tune"), id="tuner"),
    pytest.param(("rtn", {"method": "fake-tune", "latent": True}, "fake-tune"), id="two tuners"),
    pytest.param(("fake-double", "fake-fold", "fake-tune"), id="all"),
    pytest.param(("fake-drop", "fake-coarse", "fake-repair", "gptq", "fake-tune"), id="parts"),
]


@pytest.mark.slow
@pytest.mark.parametrize("stages", EVERY_KIND)
def test_stopped_after_every_unit_in_turn_it_resumes_to_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: tuple[Any, ...]
) -> None:
    write, wanted = Units.write, recipe(*stages)
    run(model, wanted, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def write_and_stop(self: Units, *args: Any, **named: Any) -> None:
        write(self, *args, **named)
        raise Stopped

    monkeypatch.setattr(Units, "write", write_and_stop)
    stops = 0
    while not (tmp_path / "out").exists():
        try:
            run(model, wanted, tmp_path / "out")
        except Stopped:
            stops += 1
        assert stops < 40
    assert stops >= 3
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_a_kill_before_a_units_line_is_written_changes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is there, the line is not: the unit is not done, and is made again over the same file."""
    from gossamer.checkpoint.journal import Journal

    wanted, add = recipe("fake-gradient", "fake-tune"), Journal.add
    run(model, wanted, tmp_path / "whole")

    class Stopped(Exception):
        pass

    for n in (2, 5, 6, 7, 9, 11):  # of squares, of the slope, of a block, of a training, of its end
        calls = iter(range(1, 100))

        def stop_at_nth(self: Journal, *args: Any, calls: Any = calls, n: int = n) -> None:
            if next(calls) == n:
                raise Stopped
            add(self, *args)

        monkeypatch.setattr(Journal, "add", stop_at_nth)
        with pytest.raises(Stopped):
            run(model, wanted, tmp_path / "out")
        monkeypatch.setattr(Journal, "add", add)
        run(model, wanted, tmp_path / "out")
        assert files(tmp_path / "out") == files(tmp_path / "whole")
        for path in sorted((tmp_path / "out").iterdir()):
            path.unlink()
        (tmp_path / "out").rmdir()


@pytest.mark.parametrize("stages", [("fake-gradient", "fake-tune"), ("fake-double", "fake-fold")], ids="+".join)
def test_killed_at_random_points_it_resumes_to_the_same_bytes(
    model: Path, tmp_path: Path, stages: tuple[str, ...]
) -> None:
    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads that it does not have
    wanted, started = recipe(*stages), time.monotonic()
    run(model, wanted, tmp_path / "whole")
    seconds, rng, kills = time.monotonic() - started, random.Random(0), 0
    for _ in range(6):
        pid = os.fork()
        if pid == 0:  # the child must never go on as a second test run, whatever happens in it
            try:
                run(model, wanted, tmp_path / "out")
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.0, 0.6 * seconds))
        os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL)
        kills += code == -signal.SIGKILL
        assert not (tmp_path / "out").exists() or files(tmp_path / "out") == files(tmp_path / "whole")
    assert kills >= 1
    run(model, wanted, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_block_method_is_given_the_originals_stream_and_the_compressed_models_inputs(
    model: Path, tmp_path: Path
) -> None:
    run(model, recipe({"method": "fake-fold", "bits": 2}), tmp_path / "out")
    tokens = calibration().tokens
    original = stream(load_decoder(open_checkpoint(model)), tokens)
    compressed = stream(load_decoder(open_checkpoint(tmp_path / "out")), tokens)
    for i, target in enumerate(SEEN["target"]):
        assert (target - original[i]).abs().max() < 1e-4 * original[i].abs().max()
    for i, x in enumerate(SEEN["x"][1:]):
        assert (x - compressed[i]).abs().max() < 1e-4 * compressed[i].abs().max()
    assert (compressed[1] - original[1]).abs().max() > 0.01 * original[1].abs().max()  # at 2 bits they are not the same


def test_folding_reaches_the_stored_norms_and_biases(model: Path, tmp_path: Path) -> None:
    wanted = recipe({"method": "fake-fold", "bits": 8})
    result = run(model, wanted, tmp_path / "out")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for i in range(3):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"model.layers.{i}.{norm}.weight"
            assert torch.equal(after[name], 2 * before[name])
        name = f"model.layers.{i}.self_attn.o_proj.bias"
        assert torch.allclose(after[name], before[name] + SEEN["drawn"][i])
        name = f"model.layers.{i}.self_attn.q_proj.bias"
        assert torch.equal(after[name], before[name])
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    assert len(set(SEEN["drawn"])) == 3
    assert all(0 < layer["relative_error"] < 1 for layer in result.layers)


def test_a_block_method_that_forgets_a_layer_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match=r"fake-forget left model\.layers\.0\.self_attn\.q_proj undecided"):
        run(model, recipe("fake-forget"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gradients_are_those_of_the_mean_loss_of_each_sequence(model: Path, tmp_path: Path) -> None:
    run(model, recipe("fake-gradient"), tmp_path / "out")
    decoder = load_decoder(open_checkpoint(model))
    squares: dict[tuple[int, str], Tensor] = {}
    weights = {
        (i, r): getattr(b, r).weight.requires_grad_() for i, b in enumerate(decoder.blocks) for r in linear_names(0)
    }
    for row in calibration().tokens:
        x = decoder.embed(row.unsqueeze(0))
        rotation = decoder.rotation(torch.arange(len(row)).unsqueeze(0))
        for block in decoder.blocks:
            x = Block.forward(block, x, rotation)
        logits = F.linear(decoder.final_norm(x), decoder.embed.weight)[0]
        F.cross_entropy(logits[:-1], row[1:]).backward()
        for key, weight in weights.items():
            squares[key] = squares.get(key, 0) + weight.grad.square() / 4
            weight.grad = None
    points = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
    expected = [torch.cat([squares[i, role] for role in roles]) for i in range(3) for roles in points]
    assert len(SEEN["gradient"]) == len(expected)
    for found, wanted in zip(SEEN["gradient"], expected, strict=True):
        assert wanted.max() > 0
        assert (found - wanted).abs().max() < 1e-4 * wanted.max()


def test_a_transform_changes_what_is_quantized_and_nothing_that_names_the_model(model: Path, tmp_path: Path) -> None:
    wanted = recipe("fake-double", {"method": "rtn", "bits": 8})
    run(model, wanted, tmp_path / "out")
    plain = recipe({"method": "rtn", "bits": 8})
    compress(open_checkpoint(model), plain, tmp_path / "plain")
    doubled, usual = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "plain")
    for role, factor in (("up", 2.0), ("down", 0.5), ("q", 1.0)):
        name = f"{linear_names(1)[role]}.weight"
        assert torch.equal(doubled.tensor(name), factor * usual.tensor(name))
    manifest = json.loads((tmp_path / "out" / "gossamer.json").read_text())
    assert manifest["base"]["fingerprint"] == open_checkpoint(model).fingerprint()
    assert [s["method"] for s in manifest["recipe"]["stages"]] == ["fake-double", "rtn"]


def test_a_transform_is_read_a_tensor_at_a_time(model: Path, tmp_path: Path) -> None:
    from gossamer.compress.pipeline import transformed

    transformed(open_checkpoint(model), recipe("fake-double", "rtn"))
    assert "read" not in SEEN


@pytest.mark.slow
@pytest.mark.parametrize("stage", [{}, {"symmetric": False}, {"bits": 3}, {"format": "nf4"}], ids=str)
@pytest.mark.parametrize("latent", [False, True], ids=["scales", "weights"])
def test_a_tuner_begins_with_the_stored_model_and_ends_closer_to_the_original(
    model: Path, tmp_path: Path, stage: dict[str, Any], latent: bool
) -> None:
    quantizer = {"method": "rtn", "bits": 4, **stage}
    compress(open_checkpoint(model), recipe(quantizer), tmp_path / "before")
    tuner = {"method": "fake-tune", "latent": latent, "steps": 24}
    run(model, recipe(quantizer, tuner), tmp_path / "after")
    tokens = calibration().tokens
    wanted = load_decoder(open_checkpoint(model))(tokens).log_softmax(-1)

    def loss(folder: Path) -> Tensor:
        found = load_decoder(open_checkpoint(folder))(tokens).log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1).mean(-1)

    before = loss(tmp_path / "before")
    assert SEEN["loss"][0] == pytest.approx(float(before[0]), rel=1e-3)  # straight from the stored tensors
    assert loss(tmp_path / "after").mean() < 0.95 * before.mean()
    assert (tmp_path / "after" / "tuned.txt").read_bytes() == b"done"
    first, last = (load_file(tmp_path / n / "model.safetensors") for n in ("before", "after"))
    assert not torch.equal(first["model.norm.weight"], last["model.norm.weight"])
    codes = "model.layers.0.mlp.up_proj.weight_packed"
    assert torch.equal(first[codes], last[codes]) != latent


def test_a_tuner_killed_amid_its_steps_goes_on_where_it_was(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe("rtn", {"method": "fake-tune", "steps": 5})
    run(model, wanted, tmp_path / "whole")
    whole = SEEN.pop("loss")
    monkeypatch.setattr(fake_methods.Tune, "stop_after", 2)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(model, wanted, tmp_path / "out")
    monkeypatch.undo()
    register(monkeypatch)
    run(model, wanted, tmp_path / "out")
    assert SEEN["loss"] == whole[4:]  # the earlier steps are not taken again
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_layers_have_their_own_grids_the_longest_name_first(model: Path, tmp_path: Path) -> None:
    layers = {
        "down": {"bits": 8},
        "*.layers.1.*": {"bits": 6},
        "model.layers.1.mlp.down_proj": {"bits": 3, "group_size": 64},
        "v": {"format": "nf4"},
    }
    for name, method in (("a", "rtn"), ("b", "gptq"), ("c", "fake-fold")):
        run(model, recipe({"method": method, "layers": layers}), tmp_path / name)
        stored = open_checkpoint(tmp_path / name)

        def form(role: str, block: int, stored: Any = stored) -> str:
            return stored.format(f"{linear_names(block)[role]}.weight").name

        assert [form("q", i) for i in range(3)] == ["int4-g32", "int6-g32", "int4-g32"]
        assert [form("down", i) for i in range(3)] == ["int8-g32", "int3-g64", "int8-g32"]
        assert [form("v", i) for i in range(3)] == ["nf4-g64", "int6-g32", "nf4-g64"]


def test_a_replayed_recipe_means_the_same_layers(model: Path, tmp_path: Path) -> None:
    layers = {"zz*": {"bits": 8}, "down": {"bits": 8}, "*": {"bits": 6}}
    wanted = recipe({"method": "rtn", "layers": {k: v for k, v in layers.items() if k != "zz*"}})
    run(model, wanted, tmp_path / "out")
    recorded = json.loads((tmp_path / "out" / "gossamer.json").read_text())["recipe"]
    config = open_checkpoint(model).config
    again = make_plan(config, parse_recipe(recorded, "test"), torch.bfloat16)
    assert again.formats == make_plan(config, wanted, torch.bfloat16).formats


@pytest.mark.parametrize("key", ["dwon", "*.layers.9.*", "model.layers.1.mlp.down"])
def test_a_key_of_layers_that_means_no_layer_is_refused_before_any_work(model: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(RecipeError, match="neither a role nor a pattern") as caught:
        run(model, recipe({"method": "rtn", "layers": {key: {"bits": 8}}}), tmp_path / "out")
    assert "down" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize(
    ("stages", "reason", "hint"),
    [
        (("rtn", "fake-double"), r"stage 2 \(fake-double\) changes float weights, but stage 1 \(rtn\)", "before rtn"),
        (("fake-tune", "rtn"), r"stage 1 \(fake-tune\) trains a compressed model, but nothing", "after rtn"),
        (("fake-double",), "no stage compresses", "gptq"),
        (("fake-fold", "gptq"), "both quantize the same weights", "one"),
        (("rtn", "fake-drop"), r"stage 2 \(fake-drop\) changes float weights, but stage 1 \(rtn\)", "before rtn"),
        (("fake-coarse", "fake-coarse"), r"stage 2 \(fake-coarse\) makes whole matrices anew", "keep one"),
        (("fake-coarse", "fake-drop"), r"stage 2 \(fake-drop\) makes whole matrices anew", "before fake-coarse"),
        (("fake-repair", "rtn"), r"stage 1 \(fake-repair\) brings back what", "before fake-repair"),
        (("fake-drop", "fake-double"), r"stage 2 \(fake-double\) only prepares", "remove"),
        (("fake-drop", {"method": "rtn", "budget": 4.5}), "a budget is measured on the model that", "two steps"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_orders_that_make_no_sense_are_refused_with_the_reason(
    model: Path, stages: tuple[Any, ...], reason: str, hint: str
) -> None:
    with pytest.raises(RecipeError, match=reason) as caught:
        recipe(*stages)
    assert hint in (caught.value.hint or "")


def test_a_model_without_a_block_is_compared_with_the_original_that_has_it(model: Path, tmp_path: Path) -> None:
    run(model, recipe("fake-drop", "fake-coarse", "fake-repair"), tmp_path / "out")
    original = load_decoder(open_checkpoint(model))
    outputs = stream(original, calibration().tokens)
    assert SEEN["deciding over"] == [3]
    assert len(SEEN["target"]) == 2
    for found, wanted in zip(SEEN["target"], (outputs[1], outputs[2]), strict=True):  # block 0 stands for 0 and 1
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    made = open_checkpoint(tmp_path / "out")
    assert made.config.num_layers == 2
    for i, was in enumerate((0, 2)):
        weight = open_checkpoint(model).tensor(f"{linear_names(was)['up']}.weight")
        stored = made.tensor(f"{linear_names(i)['up']}.weight")
        assert torch.allclose(stored, weight.sign() * weight.abs().mean())
        assert torch.equal(made.tensor(f"model.layers.{i}.input_layernorm.weight"), torch.full((64,), 2.0))
    assert not list(tmp_path.glob(".out*"))


def test_a_part_compresses_what_the_part_before_has_made(model: Path, tmp_path: Path) -> None:
    run(model, recipe("fake-drop", "gptq"), tmp_path / "at-once")
    run(model, recipe("fake-drop"), tmp_path / "shorter")
    run(tmp_path / "shorter", recipe("gptq"), tmp_path / "then")
    at_once, then = (load_file(tmp_path / n / "model.safetensors") for n in ("at-once", "then"))
    assert at_once.keys() == then.keys()
    assert all(torch.equal(at_once[name], then[name]) for name in then)
    manifest = json.loads((tmp_path / "at-once" / "gossamer.json").read_text())
    assert [s["method"] for s in manifest["recipe"]["stages"]] == ["fake-drop", "gptq"]
    assert manifest["base"]["fingerprint"] == open_checkpoint(model).fingerprint()


def test_a_run_whose_later_part_has_changed_is_not_resumed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.compress.pipeline.make_units", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(model, recipe("fake-drop", {"method": "rtn", "bits": 4}), tmp_path / "out")
    monkeypatch.undo()
    register(monkeypatch)
    with pytest.raises(ResumeMismatch, match=r"stages\[1\].bits was 4, is now 8"):
        run(model, recipe("fake-drop", {"method": "rtn", "bits": 8}), tmp_path / "out")


def test_every_kind_but_rounding_asks_for_tokens(model: Path, tmp_path: Path) -> None:
    for stages in (("fake-gradient",), ("fake-fold",), ("rtn", "fake-tune")):
        assert recipe(*stages).needs_calibration()
        with pytest.raises(UsageError, match=f"{stages[-1]} needs calibration"):
            compress(open_checkpoint(model), recipe(*stages), tmp_path / "out")
    assert not recipe("fake-double", "rtn").needs_calibration()


def test_the_plan_counts_what_each_kind_takes(model: Path) -> None:
    config = open_checkpoint(model).config

    def plan(*stages: str | dict[str, Any]) -> Any:
        return make_plan(config, recipe(*stages), torch.bfloat16)

    hungry, gradient, tuned = plan("gptq"), plan("fake-gradient"), plan("rtn", "fake-tune")
    weights = sum(r * c for layer in config.layers for r, c in layer.linear_shapes(config.hidden_size).values())
    assert set(gradient.phases) == {"quantizing", "gradients"}
    assert gradient.scratch_bytes > 4 * weights  # one float for each weight lies on disk
    assert gradient.peak_bytes == max(gradient.phases.values()) >= hungry.peak_bytes
    assert set(tuned.phases) == {"quantizing", "fake-tune"}
    assert tuned.disk_bytes > plan("rtn").disk_bytes
    parts = plan("fake-drop", "rtn")
    assert set(parts.phases) == {"fake-drop", "quantizing"}
    assert parts.input_bytes == hungry.input_bytes
    assert parts.output_bytes < plan("rtn").output_bytes  # a block is gone
    assert parts.scratch_bytes > 2 * 2 * weights // 3  # the shorter model in bfloat16
    fold = plan("fake-fold")
    stream = 4 * 32 * 512 * config.hidden_size
    assert fold.peak_bytes > 2 * stream + fake_methods.Folding(fold_options()).peak_bytes(config, 0, 32, 512)


def fold_options() -> Any:
    return recipe("fake-fold").quantizer().options
