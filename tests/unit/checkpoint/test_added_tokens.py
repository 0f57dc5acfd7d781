"""Tokens that were added to a SentencePiece model after it was made, and what else configs say of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenizer import model_file, pieces

from gossamer.checkpoint import Tokenizer, open_checkpoint
from gossamer.checkpoint.tokenizer import tokenizer_from_folder
from gossamer.errors import GossamerError, TokenizerError

SIZE = len(pieces().texts)
IM_END, IM_START, PAD = SIZE, SIZE + 1, SIZE + 2
CONFIG = {"bos_token": "<s>", "eos_token": "<|im_end|>", "add_bos_token": False}
KEYS = (
    "bos_token", "eos_token", "pad_token", "chat_template", "added_tokens_decoder", "additional_special_tokens",
    "add_bos_token", "add_eos_token", "auto_map", "tokenizer_class", "legacy",
)  # fmt: skip


def folder(path: Path, *, added: Any = None, older: Any = None, generation: Any = None, **config: Any) -> Path:
    """The files of a tokenizer that has a tokenizer.model and no tokenizer.json."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.model").write_bytes(model_file(pieces()))
    files = {
        "tokenizer_config.json": {**CONFIG, **config},
        "added_tokens.json": added,
        "special_tokens_map.json": older,
        "generation_config.json": generation,
    }
    for name, content in files.items():
        if content is not None:
            (path / name).write_text(json.dumps(content))
    return path


def opened(path: Path, vocab_size: int | None = SIZE + 3) -> Tokenizer:
    return tokenizer_from_folder(path, {"vocab_size": vocab_size})


def row(text: str, **flags: bool) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "rstrip": False, "normalized": False, "special": True, **flags}


def tokens(tokenizer: Tokenizer, text: str) -> list[str | None]:
    return [tokenizer.token(i) for i in tokenizer.encode(text)]


def test_tokens_of_added_tokens_json_are_met_anywhere_in_a_text(tmp_path: Path) -> None:
    tokenizer = opened(folder(tmp_path, added={"<|im_start|>": IM_START, "<|im_end|>": IM_END, "[PAD]": PAD}))
    assert tokens(tokenizer, "<|im_start|>hello") == ["<|im_start|>", "\u2581hello"]
    assert tokens(tokenizer, "hello<|im_end|>") == ["\u2581hello", "<|im_end|>"]
    assert (tokenizer.eos_ids, tokenizer.vocab_size) == ({IM_END}, SIZE + 3)
    # Only tokens that a config names are no text, as transformers has it.
    assert tokenizer.special_ids == {0, 1, 2, IM_END}


def test_a_token_that_the_older_map_names_is_special(tmp_path: Path) -> None:
    older = {"pad_token": {"content": "[PAD]"}, "additional_special_tokens": ["<|im_start|>"]}
    added = {"<|im_end|>": IM_END, "<|im_start|>": IM_START, "[PAD]": PAD}
    tokenizer = opened(folder(tmp_path, added=added, older=older))
    assert tokenizer.special_ids == {0, 1, 2, IM_END, IM_START, PAD}
    assert tokenizer.pad_id == PAD
    assert tokenizer.decode(tokenizer.encode("<|im_start|>hello[PAD]")) == "hello"


def test_tokens_of_the_tokenizer_config_have_its_flags_and_win(tmp_path: Path) -> None:
    decoder = {
        "0": row("<unk>"),
        str(PAD): row("[PAD]", lstrip=True, special=False),
        str(IM_START): row("<|im_start|>", rstrip=True, normalized=True),
        str(IM_END): row("<|im_end|>"),
    }
    added = {"<|im_end|>": IM_END, "other": IM_START}
    tokenizer = opened(folder(tmp_path, added=added, added_tokens_decoder=decoder))
    assert tokens(tokenizer, "<|im_start|>  hello  [PAD]") == ["<|im_start|>", "\u2581hello", "[PAD]"]
    assert tokenizer.token_id("other") is None
    assert tokenizer.special_ids == {0, 1, 2, IM_END, IM_START}


def test_a_config_may_want_no_space_after_an_added_token(tmp_path: Path) -> None:
    added = {"<|im_end|>": IM_END, "<|im_start|>": IM_START}
    tokenizer = opened(folder(tmp_path, added=added, legacy=False))
    assert tokens(tokenizer, "<|im_start|>hello world") == ["<|im_start|>", "hello", "\u2581world"]
    assert tokens(tokenizer, "hello<|im_end|> world") == ["\u2581hello", "<|im_end|>", "\u2581world"]


def test_added_tokens_stay_when_the_tokenizer_is_saved(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = opened(folder(tmp_path / "m", added={"<|im_end|>": IM_END, "<|im_start|>": IM_START}))
    ours.save(tmp_path)
    text = "<|im_start|>hello world<|im_end|>"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == ours.encode(text)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"added": {"<|im_end|>": IM_END + 1}}, f"id {IM_END + 1}"),
        ({"added": {"<|im_end|>": 7}}, "id 7"),
        ({"added": {"hello": IM_END}}, "hello"),
        ({"added": {"": IM_END}}, f"id {IM_END}"),
        ({"added": {"<|im_end|>": "x"}}, "'x'"),
        ({"added": {"<|im_end|>": -1}}, "-1"),
        ({"added_tokens_decoder": []}, None),
        ({"added_tokens_decoder": [1]}, "list"),
        ({"added_tokens_decoder": {"x": row("a")}}, "'x'"),
        ({"added_tokens_decoder": {"9" * 5000: row("a")}}, "99"),
        ({"added_tokens_decoder": {str(IM_END): "<|im_end|>"}}, str(IM_END)),
        ({"added_tokens_decoder": {str(IM_END): {"content": 5}}}, str(IM_END)),
        ({"added_tokens_decoder": {str(IM_END): row("hello")}}, "hello"),
    ],
)
def test_an_added_token_out_of_place_is_a_typed_error(tmp_path: Path, files: dict[str, Any], named: str | None) -> None:
    folder(tmp_path, **files)
    if named is None:
        assert opened(tmp_path).vocab_size == SIZE
        return
    with pytest.raises(TokenizerError, match=named) as caught:
        opened(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_an_end_that_the_model_cannot_give_is_none(tmp_path: Path) -> None:
    folder(tmp_path, added={"<|im_end|>": IM_END}, generation={"eos_token_id": [2, SIZE, SIZE + 1, 999_999]})
    assert opened(tmp_path, vocab_size=SIZE).eos_ids == {2}
    assert opened(tmp_path, vocab_size=SIZE + 1).eos_ids == {2, IM_END}
    assert opened(tmp_path, vocab_size=None).eos_ids == {2, IM_END, SIZE + 1, 999_999}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["content", "special", "0", str(SIZE)]), inner)
        | st.fixed_dictionaries({"name": st.just("default") | inner, "template": inner})
    ),
    max_leaves=12,
)
named_templates = st.lists(st.fixed_dictionaries({"name": json_values, "template": json_values}), max_size=3)
added_rows = st.dictionaries(
    st.sampled_from(["1", str(SIZE), str(SIZE + 1), "x"]),
    st.fixed_dictionaries({"content": st.just("<s>") | json_values}),
)
configs = st.one_of(
    st.dictionaries(st.sampled_from(KEYS), json_values, max_size=3),
    st.fixed_dictionaries({"chat_template": named_templates, "added_tokens_decoder": added_rows}),
)


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    config=configs,
    older=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=1),
    added=st.dictionaries(st.text(max_size=4), st.integers(SIZE - 1, SIZE + 1) | json_values, max_size=2),
)
def test_a_tokenizer_config_of_any_json_opens_and_saves_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tiny: Any, kind: str, config: Any, older: Any, added: Any
) -> None:
    model = tmp_path_factory.getbasetemp() / f"any-{kind}"
    if not model.exists():
        tiny.folder(model)
        if kind == "tokenizer.model":
            (model / "tokenizer.json").unlink()
            (model / kind).write_bytes(model_file(pieces()))
    for name, content in (("tokenizer_config", config), ("special_tokens_map", older), ("added_tokens", added)):
        (model / f"{name}.json").write_text(json.dumps(content))
    out = tmp_path_factory.getbasetemp() / "saved"
    out.mkdir(exist_ok=True)
    try:
        tokenizer = open_checkpoint(model).tokenizer()
        tokenizer.encode("hello")
        tokenizer.save(out)
        json.loads((out / "tokenizer_config.json").read_bytes())
        tokenizer.render_chat([])
    except GossamerError as error:
        refusal = error.message
        assert refusal
