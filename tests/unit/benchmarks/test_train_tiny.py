"""Tiny models of every family are trained, open like any other, and learn from nothing that they are judged on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import bench_families
import train_tiny
from bench_families import ORDERS, ROWS, Found, Order
from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder
from gossamer.checkpoint.textprint import line_hashes
from gossamer.compress.recipe import parse_recipe
from gossamer.errors import OutputExists
from gossamer.measure.corpus import load_corpus
from train_tiny import RECORD, Schedule, Size, Text, train

SIZE = Size(vocab_size=300, hidden_size=32, layers=2, heads=2, context=16)
SCHEDULE = Schedule(steps=12, batch=4, learning_rate=1e-2)
SENTENCE = "Return the sum of the values, which are numbers.\n"
TEXT = Text([SENTENCE] * 40, [SENTENCE] * 20)


@pytest.mark.parametrize("family", bench_families.FAMILIES)
def test_a_trained_family_opens_and_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = train(family, out := tmp_path / "model", TEXT, SIZE, SCHEDULE)
    checkpoint = open_checkpoint(out)
    assert checkpoint.config.family == family
    assert checkpoint.parameters() == found["parameters"]
    assert (out / RECORD).is_file()
    assert found["validation"] < 0.95 * math.log(SIZE.vocab_size)
    tokens = torch.tensor([checkpoint.tokenizer().encode(TEXT.held_out[0], special=False)[: SIZE.context]])
    oracle = AutoModelForCausalLM.from_pretrained(out).float().eval()
    with torch.inference_mode():
        expected = oracle(input_ids=tokens).logits
        assert (load_decoder(checkpoint)(tokens) - expected).abs().max() < 1e-4


def test_equal_seeds_give_equal_models_and_others_do_not(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train("opt", tmp_path / name, TEXT, SIZE, Schedule(steps=2, seed=seed))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputExists):
        train("opt", tmp_path, TEXT, SIZE, SCHEDULE)


def test_nothing_that_is_judged_is_learned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    judged = next(line for line in load_corpus("default").text.splitlines() if len(line.strip()) > 60)
    modules = []
    for i in range(2 * train_tiny.HELD_OUT):
        modules.append(tmp_path / f"{i}.py")
        modules[-1].write_text(f'"""Number {i}.\n\n{judged}\n"""\n\ndef f():\n    """Function {i}."""\n')
    monkeypatch.setattr(train_tiny, "_modules", lambda: iter(modules))
    text = train_tiny.docstrings()
    assert len(text.learned) == 2 * (len(modules) - 2)
    assert text.held_out == ["Number 15.\n", "Function 15.\n", "Number 31.\n", "Function 31.\n"]
    assert not set(line_hashes("\n".join(text.learned))) & set(line_hashes(load_corpus("default").text))


def test_the_judged_text_is_no_module_that_is_read() -> None:
    assert not any("pydoc_data" in file.parts for file in train_tiny._modules())


def test_a_unigram_model_is_scored_by_its_smoothed_counts() -> None:
    learned, held_out = torch.tensor([0, 0, 1]), torch.tensor([0, 2])
    assert train_tiny.unigram(learned, held_out, 3) == pytest.approx(-(math.log(3 / 6) + math.log(1 / 6)) / 2)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_a_recipe(row: str) -> None:
    assert parse_recipe({"version": 1, "name": row, "stages": [ROWS[row]]}, row).name == row


def test_orders_speak_of_rows() -> None:
    assert {name for order in ORDERS for name in (order.less, order.more)} <= ROWS.keys()


@pytest.mark.parametrize(
    ("order", "held"),
    [
        (Order("", "a", "b"), True),
        (Order("", "b", "a"), False),
        (Order("", "a", "b", 0.5), False),
        (Order("", "a", "b", 1.2, mutual=True), False),
        (Order("", "a", "b", 1.3, mutual=True), True),
        (Order("", "a", "missing"), None),
    ],
)
def test_an_order_is_held_by_the_figures(order: Order, held: bool | None) -> None:
    assert order.holds({"a": 0.8, "b": 1.0}) is held


def test_the_page_says_where_an_order_does_not_hold() -> None:
    def found(family: str, wanda: float) -> Found:
        kld = {"magnitude-50": 1.0, "wanda-50": wanda}
        records = {row: {"status": "ok", "results": {"kld_mean": value}} for row, value in kld.items()}
        return Found(family, {}, records, {}, {"slicegpt-20": "norms"})

    both = [found("opt", 0.1), found("bloom", 0.7)]
    said = bench_families.sentences(both)
    assert "- Not in bloom, but in another: Wanda < half of magnitude." in said
    assert not any("Not in opt" in line for line in said)
    assert "| Wanda < half of magnitude | holds: 0.1 and 1 | **not**: 0.7 and 1 |" in bench_families.orders_table(both)
    assert bench_families.refusals(both[0]) == "- slicegpt-20 is refused: norms."
