"""Recipes: what is accepted, and what the errors say."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from gossamer.checkpoint.manifest import Base, Manifest, write_manifest
from gossamer.compress.recipe import MAX_BYTES, artifact_folder, load_recipe, parse_recipe
from gossamer.errors import RecipeError, UnknownName

SHIPPED = Path(__file__).parents[3] / "recipes"


def recipe(**stage: Any) -> dict[str, Any]:
    return {"version": 1, "name": "r", "stages": [{"method": "gptq", **stage}]}


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_loads_under_its_own_name(path: Path) -> None:
    loaded = load_recipe(path.stem, SHIPPED)
    assert loaded.name == path.stem
    assert loaded.description


def test_canonical_form_is_a_recipe_that_means_the_same() -> None:
    first = parse_recipe(recipe(bits=3), "test")
    again = parse_recipe(first.canonical(), "test")
    assert again.canonical() == first.canonical()
    assert first.canonical()["stages"][0]["act_order"] is True


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        (recipe(bitz=4), "unknown key 'bitz'", "bits"),
        (recipe(embedding={"bits": 8, "groupsize": 64}), "unknown key 'embedding.groupsize'", "group_size"),
        ({**recipe(), "stage": []}, "unknown key 'stage'", "stages"),
        ({"version": 1, "name": "r", "stages": [{"method": "gptqq"}]}, "stage 1: unknown method 'gptqq'", "gptq"),
        (recipe(bits=7), "bits is 7", "2, 3, 4, 5, 6 or 8"),
        (recipe(head={"bits": 7}), "stage 1 (gptq): head: bits is 7", "5, 6 or 8"),
        (recipe(format="nf5"), "format: input should be 'int', 'nf4'", None),
        (recipe(format="mxfp4", group_size=64), "mxfp4 has group_size 32, not 64", None),
        (recipe(format="fp8", bits=4), "fp8 has bits 8, not 4", None),
        (recipe(double_quant=True), "double_quant is for nf4 and fp4, not for int", None),
        (recipe(layers={"down": {"bitz": 8}}), "unknown key 'layers.down.bitz'", "bits"),
        (recipe(layers={"down": {"bits": 7}}), "layers.down: bits is 7", None),
        (recipe(layers=[1]), "layers", None),
        (recipe(bits=99), "bits", None),
        (recipe(bits="4"), "bits", None),
        (recipe(group_size="row"), "group_size", None),
        (recipe(group_size=0), "group_size is 0", "positive"),
        (recipe(damping=-1.0), "damping", None),
        ({**recipe(), "version": 2}, "version is 2", None),
        ({"version": 1, "name": "r", "stages": []}, "stages", None),
        ({"version": 1, "name": "../x", "stages": [{"method": "rtn"}]}, "name", None),
        ({"version": 1, "name": "r", "stages": [{"method": "rtn"}, {"method": "gptq"}]}, "both quantize", "one"),
        ([1, 2], "a recipe is a mapping", None),
        ({"version": 1, "name": "r", "stages": 5}, "stages is a list of methods, not 5", "stages:"),
        ({"version": 1, "name": "r", "stages": True}, "stages is a list of methods, not True", "stages:"),
        ({"version": 1, "name": "r", "stages": {"method": "rtn"}}, "stages is a list of methods", "stages:"),
        ({"version": 1, "name": "r", "stages": "rtn"}, "stages is a list of methods, not 'rtn'", "stages:"),
        ({"version": 1, "name": "r"}, "stages is a list of methods, not None", "stages:"),
        ({"version": 1, "name": "r", "stages": ["rtn"]}, "stages.0: input should be a valid dictionary", None),
        ({"version": 1, "name": "r", "stages": [[]]}, "stages.0: input should be a valid dictionary", None),
        ({**recipe(), "calibration": {"seed": 2**63}}, "calibration.seed", None),
        ({**recipe(), "calibration": {"seed": -1}}, "calibration.seed", None),
    ],
)
def test_a_bad_recipe_is_refused_with_the_place_and_the_way_out(data: Any, message: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, "test")
    assert message in caught.value.message
    if hint is not None:
        assert hint in (caught.value.hint or "")


def test_unknown_shipped_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownName, match="int4-gptq"):
        load_recipe("int4-gtpq", SHIPPED)


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text", ["a: [", "!!python/object/apply:os.system ['true']", "\x00", "[" * 10_000, "#" * (MAX_BYTES + 1)]
)
def test_text_that_is_not_a_recipe_is_a_typed_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(write(tmp_path, text), SHIPPED)


@pytest.mark.parametrize(
    "value",
    [
        "2024-13-45",
        "9" * 5000,
        "0x" + "f" * 5000,
        "1:" * 20_000 + "1",
        "1:" * 300 + "1.0",
        "!!int x",
        "!!int ''",
        "!!float x",
        "!!timestamp x",
        "!!bool x",
        "!!map x",
        "!!binary x",
    ],
    ids=lambda value: value[:12],
)
@pytest.mark.parametrize(
    "line", ["description: {}", "calibration: {{seed: {}}}", "stages: [{{method: rtn, bits: {}}}]"]
)
def test_a_scalar_that_yaml_cannot_make_is_a_typed_error_naming_file_and_line(
    tmp_path: Path, line: str, value: str
) -> None:
    path = write(tmp_path, "version: 1\nname: r\n" + line.format(value) + "\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, SHIPPED)
    assert str(path) in caught.value.message
    assert "line 3" in caught.value.message


@pytest.mark.parametrize(
    "where", ["version: {}", "version: 1\nstages: {}", "version: 1\nname: {}\nstages: [{{method: rtn}}]"]
)
def test_aliases_that_stand_for_gigabytes_are_refused_at_once_in_few_words(tmp_path: Path, where: str) -> None:
    levels = ["&a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    path = write(tmp_path, where.format("[" + ", ".join(levels) + "]"))
    started = time.monotonic()
    with pytest.raises(RecipeError, match="has no aliases") as caught:
        load_recipe(path, SHIPPED)
    assert time.monotonic() - started < 1
    assert len(str(caught.value)) < 1000


def test_a_message_shows_little_of_a_large_value() -> None:
    wide: Any = ["x"] * 10
    for _ in range(8):
        wide = [wide] * 10  # 10^9 strings, if it were written out
    for data in ({"version": wide}, {**recipe(), "name": wide}, {**recipe(), "stages": {"a": wide}}, recipe(bits=wide)):
        with pytest.raises(RecipeError) as caught:
            parse_recipe(data, "test")
        assert len(str(caught.value)) < 1000


def artifact(folder: Path, name: str) -> Path:
    """A folder that records a recipe and nothing else."""
    folder.mkdir()
    recorded = parse_recipe({"version": 1, "name": name, "stages": [{"method": "rtn"}]}, "test").canonical()
    write_manifest(folder, Manifest(base=Base(name="m", fingerprint="f"), recipe=recorded))
    return folder


def test_a_shipped_name_is_not_shadowed_by_what_lies_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    artifact(tmp_path / "int4-gptq", "replayed")
    artifact(tmp_path / "small", "replayed")
    (tmp_path / "int8-rtn").write_text("version: 1\nname: mine\nstages: [{method: rtn}]\n")
    assert load_recipe("int4-gptq", SHIPPED).name == "int4-gptq"
    assert artifact_folder("int4-gptq", SHIPPED) is None
    assert load_recipe("int8-rtn", SHIPPED).name == "int8-rtn"
    for name in ("./int4-gptq", "int4-gptq/", tmp_path / "int4-gptq", "small"):
        assert load_recipe(name, SHIPPED).name == "replayed"
        assert artifact_folder(name, SHIPPED) == Path(name)
    assert load_recipe("./int8-rtn", SHIPPED).name == "mine"
    assert artifact_folder("./int8-rtn", SHIPPED) is None


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("self", "self"),
        ("hub:org/data/a/b.json", "hub:org/data/a/b.json"),
        ("/home/me/secret/text.txt", "text.txt"),
        ("../text.txt", "text.txt"),
        ("/data/self", "./self"),
        ("x/hub:y", "./hub:y"),
    ],
)
def test_canonical_form_names_no_folder_of_the_machine(source: str, written: str) -> None:
    first = parse_recipe({**recipe(), "calibration": {"source": source}}, "test")
    assert first.canonical()["calibration"]["source"] == written
    assert first.calibration.source == source  # still opens the file
    assert parse_recipe(first.canonical(), "test").canonical() == first.canonical()


def test_a_layers_own_grid_takes_the_keys_that_it_does_not_give_from_the_stage() -> None:
    stage = {"bits": 3, "group_size": 32, "symmetric": False, "layers": {"down": {"bits": 6}, "o": {"format": "nf4"}}}
    options = parse_recipe(recipe(**stage), "test").quantizer().options
    down, o = options.layers["down"], options.layers["o"]
    assert (down.bits, down.group_size, down.symmetric) == (6, 32, False)
    assert (o.format, o.bits, o.group_size, o.symmetric) == ("nf4", 4, 64, True)
    assert parse_recipe(parse_recipe(recipe(**stage), "test").canonical(), "test").quantizer().options == options


@pytest.mark.parametrize(
    ("kind", "bits", "group_size"), [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("fp8", 8, "channel"), ("nf4", 4, 64)]
)
def test_a_codebook_decides_its_own_bits_and_groups(kind: str, bits: int, group_size: object) -> None:
    options = parse_recipe(recipe(format=kind), "test").quantizer().options
    assert (options.bits, options.group_size) == (bits, group_size)
