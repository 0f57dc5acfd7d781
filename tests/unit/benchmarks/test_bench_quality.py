"""The parts of the quality benchmark that run no peer: its rows, its reader of the GPTQ layout, orders and the page."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import bench_quality
import peers
import quality_make
import quality_report
import quality_rows
import quality_unpack
from gossamer.compress.calibration import Calibration, token_hash
from gossamer.compress.recipe import CalibrationSpec
from quality_make import Failed, Workshop
from quality_records import Records
from quality_rows import FLOAT, LLAMA, OURS, Row

TEXT = "a text"


def result(key: str = "gossamer/a", kld: float = 0.1, **changes: Any) -> dict[str, Any]:
    """A row's result as bench_quality makes it."""
    row = {
        "key": key, "maker": key.split("/")[0], "method": "gptq", "bits": 4, "grid": "g64", "act_order": None,
        "on_source_grid": False, "options": {}, "reason": None, "bits_per_weight": 4.5, "stored_bytes": 76e6,
        "seconds": 12.0, "inside_seconds": None, "peak_bytes": 1.5e9, "foreign_cores": 0.0, "version": "1",
        "quality": {TEXT: {"kld_mean": kld, "kld_p99": 1.0, "perplexity": 20.0, "top1_agreement": 0.8}},
    }  # fmt: skip
    return row | changes


def titles(found: list[quality_report.Finding]) -> dict[str, bool]:
    return {finding.title: finding.held for finding in found}


# Rows


def test_every_row_has_a_name_of_its_own_and_a_maker_that_exists() -> None:
    rows = [*quality_rows.CONTROLS, *quality_rows.our_rows(), *quality_rows.PEERS]
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        assert row.maker in (FLOAT, OURS, LLAMA, *quality_make.WORKERS)
        assert row.maker in (FLOAT, OURS) or row.maker in peers.PEERS
    for worker in quality_make.WORKERS.values():
        assert (Path(quality_make.__file__).parent / worker).is_file()


def test_every_shipped_recipe_that_quantizes_is_a_row_with_its_method_and_grid() -> None:
    rows = {row.key: row for row in quality_rows.our_rows()}
    gptq, rtn = rows["gossamer/int4-gptq"], rows["gossamer/int4-rtn"]
    assert (gptq.method, gptq.bits, gptq.act_order, gptq.options["calibrated"]) == ("gptq", 4, True, True)
    assert (rtn.method, rtn.act_order, rtn.options["calibrated"]) == ("rtn", None, False)
    assert gptq.grid == rtn.grid != rows["gossamer/int3-rtn"].grid
    assert gptq.grid == rows["gossamer/quality-int4-gptq-inorder"].grid
    assert gptq.grid != rows["gossamer/int4-gptq-head8"].grid


@pytest.mark.parametrize("name", ["wanda-sparse50", "int4-sparse50", "low-rank-int8"])
def test_what_prunes_or_factorizes_is_a_row_if_it_is_asked_for(name: str) -> None:
    assert f"gossamer/{name}" not in {row.key for row in quality_rows.our_rows()}
    assert f"gossamer/{name}" in {row.key for row in quality_rows.our_rows([name])}


def test_rows_that_rotate_or_tune_beside_quantizing_are_rows() -> None:
    rows = {row.key for row in quality_rows.our_rows()}
    assert {"gossamer/int4-rotated-gptq", "gossamer/int4-tuned", "gossamer/mixed-4.5"} <= rows


def test_a_recipe_that_does_what_a_shipped_one_does_is_no_second_row(tmp_path: Path) -> None:
    file = tmp_path / "again.yaml"
    file.write_text("version: 1\nname: again\nstages: [{method: rtn, bits: 4, group_size: 64}]\n")
    other = tmp_path / "other.yaml"
    other.write_text("version: 1\nname: other\nstages: [{method: rtn, bits: 4, group_size: 96}]\n")
    keys = [row.key for row in quality_rows.our_rows([str(file), str(other)])]
    assert "gossamer/int4-rtn" in keys
    assert "gossamer/again" not in keys
    assert "gossamer/other" in keys


def test_a_grid_of_ours_is_that_of_a_peer_if_all_its_options_are_the_same() -> None:
    ours = quality_rows.recipe_row("int4-rtn").grid
    assert ours == next(row for row in quality_rows.PEERS if row.key == "llmcompressor/rtn-4").grid


def test_a_recipe_that_cannot_be_read_is_a_row_that_says_why(tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text("version: 1\nname: odd\nstages: [{method: gptk}]\n")
    row = quality_rows.recipe_row(str(file))
    assert row.key == "gossamer/odd"
    assert row.reason is not None
    assert "gptk" in row.reason


@pytest.mark.parametrize(
    ("grid", "held"),
    [
        ({"bits": 4, "group_size": 32, "symmetric": False}, True),
        ({"bits": 4, "group_size": 16, "symmetric": False}, True),
        ({"bits": 4, "group_size": 64, "symmetric": False}, False),
        ({"bits": 4, "group_size": 32, "symmetric": True}, False),
        ({"bits": 3, "group_size": 32, "symmetric": False}, False),
    ],
)
def test_the_grid_that_the_source_file_lies_on_is_known(tmp_path: Path, grid: dict[str, Any], held: bool) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps({"version": 1, "name": "r", "stages": [{"method": "rtn", **grid}]}))
    assert quality_rows.recipe_row(str(file)).on_source_grid is held
    file.write_text(json.dumps({"version": 1, "name": "r", "stages": [{"method": "rtn", "embedding": grid}]}))
    assert quality_rows.recipe_row(str(file)).on_source_grid is held


def test_rows_are_chosen_by_patterns_and_a_wrong_name_is_said() -> None:
    rows = list(quality_rows.PEERS)
    assert {row.maker for row in quality_rows.chosen(rows, ["llama.cpp/*"])} == {LLAMA}
    assert [row.key for row in quality_rows.chosen(rows, ["auto-round/*-2"])] == ["auto-round/auto-round-2"]
    with pytest.raises(ValueError, match=r"llama\.cpp/q5"):
        quality_rows.chosen(rows, ["llama.cpp/q5"])


def test_a_quick_run_has_a_row_of_each_road() -> None:
    rows = [*quality_rows.CONTROLS, *quality_rows.our_rows(), *quality_rows.PEERS]
    found = {row.maker for row in quality_rows.chosen(rows, quality_rows.QUICK)}
    assert found == {FLOAT, OURS, LLAMA, "llmcompressor"}


# The GPTQ layout


def packed(codes: list[list[int]], bits: int) -> Tensor:
    """int32 words of codes [in][out] by plain arithmetic: column by column, one long integer cut into words."""
    columns = []
    for column in zip(*codes, strict=True):
        number = sum(code << (bits * i) for i, code in enumerate(column))
        words = [(number >> (32 * w)) & 0xFFFFFFFF for w in range(len(column) * bits // 32)]
        columns.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("less", [0, 1])
@pytest.mark.parametrize("ordered", [False, True])
def test_weights_of_the_gptq_layout_are_those_that_its_codes_stand_for(bits: int, less: int, ordered: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    columns, rows, groups = 64, 32, 2
    codes = torch.randint(0, 1 << bits, (columns, rows), generator=generator)
    zeros = torch.randint(1, 1 << bits, (groups, rows), generator=generator)
    scales = torch.rand(groups, rows, generator=generator).half()
    group = torch.randint(0, groups, (columns,), generator=generator) if ordered else torch.arange(columns) // 32
    weight = quality_unpack.weight_of(
        packed(codes.tolist(), bits),
        packed((zeros - less).T.tolist(), bits).T,
        scales,
        group.int() if ordered else None,
        bits,
        less,
    )
    for column, row in ((0, 0), (13, 7), (31, 31), (63, 5)):
        g = int(group[column])
        expected = (int(codes[column, row]) - int(zeros[g, row])) * float(scales[g, row])
        assert float(weight[row, column]) == expected
    assert weight.shape == (rows, columns)


def test_a_folder_is_unpacked_whole(tmp_path: Path) -> None:
    source, out = tmp_path / "packed", tmp_path / "float"
    source.mkdir()
    grid = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"}
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": grid}))
    (source / "tokenizer.json").write_text("{}")
    (source / "quantize_config.json").write_text("{}")
    codes = [[(i + o) % 16 for o in range(8)] for i in range(32)]
    tensors = {
        "a.qweight": packed(codes, 4),
        "a.qzeros": torch.full((1, 1), 0x77777777, dtype=torch.int32),
        "a.scales": torch.full((1, 8), 0.5).half(),
        "a.g_idx": torch.zeros(32, dtype=torch.int32),
        "norm.weight": torch.ones(8).bfloat16(),
    }
    save_file(tensors, source / "model.safetensors")
    quality_unpack.unpack_folder(source, out)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert {path.name for path in out.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    found = load_file(out / "model.safetensors")
    assert set(found) == {"a.weight", "norm.weight"}
    assert float(found["a.weight"][3, 2]) == (5 - 8) * 0.5
    assert found["norm.weight"].dtype == torch.float32


# Making


def test_stored_bytes_count_every_tensor_of_the_model_and_no_calibration(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 5, dtype=torch.int32), "b": torch.zeros(7).bfloat16()}
    save_file(tensors, tmp_path / "model.safetensors")
    save_file({"tokens": torch.zeros(100)}, tmp_path / "calibration.safetensors")
    assert quality_make.stored_bytes(tmp_path) == 3 * 5 * 4 + 7 * 2


def test_a_process_is_measured_from_start_to_end(tmp_path: Path) -> None:
    code = "x = bytearray(200_000_000); x[::4096] = b'1' * len(x[::4096]); print('{\"seconds\": 2.5}')"
    cost = quality_make.measured([sys.executable, "-c", code], tmp_path / "log", 1.0, {})
    assert cost.peak_bytes > 200_000_000
    assert cost.seconds > 0
    assert cost.foreign_cores >= 0
    assert quality_make.inside_seconds(cost.output) == 2.5


def test_a_process_leaves_what_it_leaves_in_its_own_folder(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "open('left.log', 'w')"]
    quality_make.measured(words, tmp_path / "log", 1.0, {}, tmp_path)
    assert (tmp_path / "left.log").exists()


def test_a_process_that_fails_gives_its_last_words(tmp_path: Path) -> None:
    code = "raise SystemExit('no accelerator here')"
    with pytest.raises(Failed, match="no accelerator here"):
        quality_make.measured([sys.executable, "-c", code], tmp_path / "log", 1.0, {})


def test_a_process_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    file = tmp_path / "child"
    code = (
        "import subprocess, sys, time; code = 'import time; time.sleep(60)'; "
        f"child = subprocess.Popen([sys.executable, '-c', code]); open({str(file)!r}, 'w').write(str(child.pid)); "
        "time.sleep(60)"
    )
    with pytest.raises(Failed, match="longer"):
        quality_make.measured([sys.executable, "-c", code], tmp_path / "log", 2.0 / 60, {})
    status = Path(f"/proc/{file.read_text()}/stat")
    until = time.monotonic() + 10
    while status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z" and time.monotonic() < until:
        time.sleep(0.05)
    assert not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.parametrize("output", ["", "no number", "[1]", '{"other": 1}', '{"seconds": null}'])
def test_a_maker_that_says_no_seconds_has_none(output: str) -> None:
    assert quality_make.inside_seconds(output) is None


class FakeShop(Workshop):
    """Makes rows without a model: what is made counts how often."""

    def __init__(self, work: Path) -> None:
        self.work, self.threads, self.iterations = work, 1, 40
        self.spec = CalibrationSpec(source="self")
        self.fingerprint = "f"
        self.calibration = Calibration(torch.zeros(1, 8, dtype=torch.int64), {})
        self.times = 0

    def _float(self, row: Row, folder: Path) -> quality_make.Made:
        self.times += 1
        if row.options.get("fails"):
            raise LookupError("nothing there")
        save_file({"a": torch.zeros(8)}, folder / "model.safetensors")
        return self._made(folder, None)


def test_a_row_is_made_again_only_if_something_of_it_changed(tmp_path: Path) -> None:
    shop = FakeShop(tmp_path)
    first = shop.make(Row("float/a", FLOAT, "none", None, options={"model": "x"}))
    assert shop.make(Row("float/a", FLOAT, "none", None, options={"model": "x"})) == first
    assert shop.times == 1
    shop.make(Row("float/a", FLOAT, "none", None, options={"model": "y"}))
    assert shop.times == 2
    shop.make(Row("float/a", FLOAT, "none", None, options={"model": "y"}), again=True)
    assert shop.times == 3
    shop.calibration = Calibration(torch.ones(1, 8, dtype=torch.int64), {})
    shop.make(Row("float/a", FLOAT, "none", None, options={"model": "y"}))
    assert shop.times == 4


def test_a_row_that_fails_is_tried_again_and_the_others_go_on(tmp_path: Path) -> None:
    shop = FakeShop(tmp_path)
    rows = [
        Row("float/bad", FLOAT, "none", None, options={"fails": True}),
        Row("float/good", FLOAT, "none", None),
        Row("gossamer/odd", OURS, "unknown", None, reason="RecipeError: no such method"),
    ]
    for _ in range(2):
        made = bench_quality.make_all(shop, rows, again=False)
    assert str(made["float/bad"]) == "nothing there"
    assert isinstance(made["float/good"], quality_make.Made)
    assert str(made["gossamer/odd"]) == "RecipeError: no such method"
    assert shop.times == 3


def test_the_tokens_of_a_row_are_part_of_what_it_is() -> None:
    ones, zeros = torch.ones(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)
    assert token_hash(ones) != token_hash(zeros)


# Orders, comparisons, targets


def test_orders_compare_rows_of_one_grid_and_say_which_is_broken() -> None:
    found = titles(
        quality_report.orders(
            [
                result("gossamer/gptq", 0.2),
                result("gossamer/rtn", 0.4, method="rtn"),
                result("gossamer/awq", 0.5, method="awq"),
                result("gossamer/rtn-g32", 0.01, method="rtn", grid="g32"),
            ]
        )
    )
    assert found == {
        "GPTQ <= RTN: gossamer/gptq and gossamer/rtn": True,
        "AWQ <= RTN: gossamer/awq and gossamer/rtn": False,
    }


def test_learned_methods_must_beat_gptq_at_three_bits_and_below_only() -> None:
    rows = [
        result("auto-round/4", 0.5, method="auto-round", bits=4),
        result("gptqmodel/4", 0.4, bits=4),
        result("auto-round/3", 0.5, method="auto-round", bits=3, grid="3"),
        result("gptqmodel/3", 0.5, bits=3, grid="3"),
    ]
    assert titles(quality_report.orders(rows)) == {"learned block by block < GPTQ: auto-round/3 and gptqmodel/3": False}
    rows[2] = result("auto-round/3", 0.49, method="auto-round", bits=3, grid="3")
    assert all(titles(quality_report.orders(rows)).values())


def test_ours_and_the_peers_are_ordered_apart() -> None:
    rows = [result("gossamer/gptq", 0.5), result("llmcompressor/rtn", 0.1, method="rtn")]
    assert quality_report.orders(rows) == []


def test_act_order_and_the_bits_of_llama_cpp_are_ordered_too() -> None:
    rows = [
        result("gossamer/ordered", 0.3, act_order=True),
        result("gossamer/plain", 0.2, act_order=False),
        result("llama.cpp/q8_0", 0.01, bits=8, bits_per_weight=8.5, method="blocks"),
        result("llama.cpp/q2_k", 0.4, bits=2, bits_per_weight=5.1, method="blocks"),
    ]
    assert titles(quality_report.orders(rows)) == {
        "with act-order <= without: gossamer/ordered and gossamer/plain": False,
        "llama.cpp: more bits, less divergence: llama.cpp/q8_0 and llama.cpp/q2_k": True,
    }


def test_an_order_must_hold_on_every_text() -> None:
    both = [result("gossamer/gptq", 0.2), result("gossamer/rtn", 0.4, method="rtn")]
    for row, kld in zip(both, (0.3, 0.2), strict=True):
        row["quality"]["another"] = {**row["quality"][TEXT], "kld_mean": kld}
    (found,) = quality_report.orders(both)
    assert not found.held
    assert found.figures == f"{TEXT}: 0.2000 and 0.4000; another: 0.3000 and 0.2000"


def test_a_peer_is_compared_with_the_best_of_ours_that_takes_no_more_bits() -> None:
    peer = result("llama.cpp/q4_0", 0.4, bits_per_weight=4.5)
    rows = [
        result("gossamer/large", 0.01, bits_per_weight=4.51),
        result("gossamer/best", 0.27, bits_per_weight=4.504),
        result("gossamer/worse", 0.5, bits_per_weight=4.0),
        result("gossamer/grid", 0.0, on_source_grid=True),
        result("gossamer/bad", 0.0, reason="it failed"),
        peer,
    ]
    (found,) = quality_report.comparisons(rows)
    assert found.held
    assert "gossamer/best" in found.title
    assert "ratio 0.68" in found.figures
    rows[1] = result("gossamer/best", 0.29, bits_per_weight=4.5)
    assert not quality_report.comparisons(rows)[0].held
    peer["bits"] = 8
    assert quality_report.comparisons(rows)[0].held  # no worse is enough above 4 bits


def test_a_peer_is_compared_with_the_best_of_ours_on_its_own_grid_whatever_its_bits() -> None:
    peer = result("auto-round/a", 0.2, grid="g")
    rows = [
        result("gossamer/worse", 0.19, grid="g"),
        result("gossamer/best", 0.18, grid="g", bits_per_weight=9.0),
        result("gossamer/other", 0.01, grid="h"),
        result("gossamer/trained", 0.01, grid="g", options={"trained_tokens": 262144}),
        result("llama.cpp/q4_0", 0.1, grid=""),
        peer,
    ]
    (found,) = quality_report.on_one_grid(rows)
    assert found.held
    assert "gossamer/best" in found.title
    peer["quality"]["another"] = {"kld_mean": 0.1}
    rows[1]["quality"]["another"] = {"kld_mean": 0.11}
    assert not quality_report.on_one_grid(rows)[0].held
    assert quality_report.on_one_grid([rows[2], peer]) == []


def test_a_peer_with_fewer_bits_than_any_of_ours_is_not_beaten() -> None:
    rows = [result("gossamer/a", 0.0, bits_per_weight=4.6), result("llama.cpp/q4_0", 0.4, bits_per_weight=4.5)]
    (found,) = quality_report.comparisons(rows)
    assert not found.held
    assert found.figures == "nothing of ours takes so few bits"


@pytest.mark.parametrize(("kld", "perplexity", "held"), [(0.1, 21.6, True), (0.101, 21.6, False), (0.1, 21.7, False)])
def test_targets_hold_only_with_both_figures(kld: float, perplexity: float, held: bool) -> None:
    ours = result("gossamer/a", kld, bits_per_weight=4.6)
    ours["quality"][TEXT]["perplexity"] = perplexity
    found = quality_report.targets([result("float/folder", 0.0), ours])
    assert [finding.held for finding in found] == [held, False, False]


def test_what_trained_on_more_text_than_the_peers_had_counts_for_targets_alone() -> None:
    trained = result("gossamer/a", 0.05, options={"trained_tokens": 262144}, bits_per_weight=4.5)
    rows = [result("float/folder", 0.0), trained, result("llama.cpp/q4_0", 0.4, bits_per_weight=4.5)]
    assert quality_report.comparisons(rows)[0].figures == "nothing of ours takes so few bits"
    assert quality_report.targets(rows)[0].held
    assert quality_report.remark(trained) == "trained on 262,144 tokens"


def test_a_recipe_whose_quantizer_reads_some_of_its_text_trains_on_all_of_it(tmp_path: Path) -> None:
    stages = "[{method: gptq, sequences: 8}, {method: qat, steps: 1}]"
    (tmp_path / "r.yaml").write_text(
        f"version: 1\nname: r\ncalibration: {{sequences: 64, length: 128}}\nstages: {stages}\n"
    )
    assert quality_rows.recipe_row(str(tmp_path / "r.yaml")).options["trained_tokens"] == 64 * 128
    (tmp_path / "plain.yaml").write_text("version: 1\nname: r\nstages: [{method: gptq}, {method: qat, steps: 1}]\n")
    assert "trained_tokens" not in quality_rows.recipe_row(str(tmp_path / "plain.yaml")).options


def test_the_page_has_a_line_for_every_row_the_failed_ones_too() -> None:
    failed = result("llmcompressor/awq-4", reason="no accelerator | here", quality={})
    unread = result("gossamer/b", quality={TEXT: {"reason": "CorruptCheckpoint: no such layout"}})
    busy = result("gossamer/d", foreign_cores=1.25)
    results = [result(), failed, unread, result("gossamer/c", on_source_grid=True), busy]
    run = {
        "command": "python benchmarks/bench_quality.py",
        "created": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "a CPU", "isa": "avx2", "cores": 2, "os": "Linux", "threads": 2},
        "protocol": {
            "tokens": 1000, "context": 64, "scored": 32, "parameters": 10, "sequences": 2, "length": 8, "texts": [TEXT]
        },
        "results": results,
        "comparisons": [],
        "grids": [],
        "targets": [{"title": "t", "held": False, "figures": "f"}],
        "orders": [{"title": "o", "held": True, "figures": "f"}],
    }  # fmt: skip
    page = quality_report.page(json.loads(json.dumps(run)))
    assert "| gossamer/a | 4.50 | 76.0 | 0.1000 | 1.00 | 20.00 | 80.0% | 12 | - | 1.50 |  |" in page
    assert "failed: no accelerator \\| here |" in page
    assert "failed: CorruptCheckpoint: no such layout |" in page
    assert "on the source's grid |" in page
    assert "others used 1.2 cores while it was made |" in page
    assert "- **broken**: t (f)" in page
    assert "- held: o (f)" in page
    assert "already 4-bit" in page
    assert quality_report.good(results) == [results[0], *results[3:]]


def test_the_command_on_the_page_names_no_folder_of_the_machine() -> None:
    words = ["--corpus", "/somewhere/text.txt", "--only", "llama.cpp/*", "--write"]
    assert bench_quality.shown(words) == ["--corpus", "text.txt", "--only", "llama.cpp/*", "--write"]


# Rows of an earlier run


class FakeJudge:
    """Says what decides a judgement, and judges nothing."""

    def __init__(self, tokens: int = 10) -> None:
        self.tokens = tokens

    def protocol(self, text: str) -> dict[str, Any]:
        return {"text": text, "tokens": self.tokens}


def test_a_row_is_another_if_its_options_its_tokens_or_its_judge_are(tmp_path: Path) -> None:
    def of(model: str = "x", tokens: int = 10, calibration: int = 0) -> str:
        row = Row("float/a", FLOAT, "none", None, options={"model": model})
        judge: Any = FakeJudge(tokens)
        texts: Any = ["a text"]
        shop = FakeShop(tmp_path)
        shop.calibration = Calibration(torch.full((1, 8), calibration), {})
        return bench_quality.identity(row, shop, judge, texts)

    assert of() == of()
    assert len({of(), of("y"), of(tokens=11), of(calibration=1)}) == 4


def test_a_row_does_not_depend_on_where_its_recipe_lies(tmp_path: Path) -> None:
    keys = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        (folder / "r.yaml").write_text("version: 1\nname: r\nstages: [{method: rtn, bits: 4, group_size: 96}]\n")
        keys.append(FakeShop(tmp_path / "work").key_of(quality_rows.recipe_row(str(folder / "r.yaml"))))
    assert keys[0] == keys[1]


def test_a_row_that_was_kept_is_found_again_and_a_failed_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert Records.load(None).results == Records.load(file).results == {}
    records, good = Records(out=file), result()
    records.keep(good, "one")
    records.keep(result(reason="no accelerator here"), "two")
    records.keep(result(quality={TEXT: {"reason": "it cannot be read"}}), "three")
    assert Records.load(file).results == {"one": good}


def test_a_line_that_a_crash_cut_off_loses_no_other(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    records, good = Records(out=file), result()
    records.keep(good, "one")
    file.write_bytes(file.read_bytes()[:-9])
    assert Records.load(file).results == {}
    records.keep(good, "two")
    assert Records.load(file).results == {"two": good}


def test_tokens_are_kept_once_and_found_by_what_was_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    few, many = (CalibrationSpec(sequences=n, length=8) for n in (2, 3))
    Records(out=file).keep_tokens(few, torch.arange(16).view(2, 8))
    Records.load(file, out=file).keep_tokens(few, torch.zeros(2, 8, dtype=torch.int64))
    records = Records.load(file)
    assert len(file.read_text().splitlines()) == 1
    assert torch.equal(records.tokens_for(few), torch.arange(16).view(2, 8))
    assert records.tokens_for(many) is None


def test_a_result_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    made = quality_make.Made(str(tmp_path), str(tmp_path), 10, 1.0, None, 5, 0.0, "1", "a CPU", "2026-01-02")
    row = Row("gossamer/a", OURS, "rtn", 4, options={"recipe": str(tmp_path / "a.yaml"), "calibrated": False})
    found = bench_quality.result_of(row, made, {"gossamer/a": {TEXT: {"kld_mean": 0.1}}}, 20)
    assert str(tmp_path) not in json.dumps(found)
    assert (found["bits_per_weight"], found["options"]) == (4.0, {"calibrated": False})


@pytest.mark.parametrize(
    ("created", "said"),
    [
        ([], ""),
        (["2026-01-02T03:04:05+00:00"] * 2, "2026-01-02"),
        (["2026-01-03T00:00:00", "2026-01-02T00:00:00"], "2026-01-02 to 2026-01-03"),
    ],
)
def test_the_page_says_on_which_days_its_rows_were_made(created: list[str], said: str) -> None:
    assert quality_report.days([result(), *(result(created=day) for day in created)]) == said


def test_the_table_says_which_of_several_machines_a_row_was_made_on() -> None:
    one, two = (result(machine=name) for name in ("a CPU, 2 cores", "another, 4 cores"))
    assert quality_report.places([one, one]) == "a CPU, 2 cores"
    assert "machine" not in quality_report.table([one, one], [TEXT])
    assert quality_report.places([one, two]) == "A: a CPU, 2 cores; B: another, 4 cores"
    lines = quality_report.table([one, two, one], [TEXT]).splitlines()[2:]
    assert [line.split("|")[-2].strip() for line in lines] == ["machine A", "machine B", "machine A"]
