"""Grammars: what the mask lets through fits, what fits is let through, and a hostile grammar costs little."""

from __future__ import annotations

import functools
import json
import random
import re

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.tokenizer import SpecialTokens, Tokenizer
from gossamer.engine import structured
from gossamer.engine.fake import fake_tokenizer
from gossamer.engine.params import Grammar
from gossamer.engine.structured import MAX_COMPILED, Grammars, Matcher, check
from gossamer.errors import EngineError

EXTRA = 77
"""Rows of the embedding that no token has."""
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b c", "ü"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
}


@functools.cache
def grammars(kind: str) -> Grammars:
    if kind == "byte_level":
        tokenizer = open_checkpoint("smollm2").tokenizer()
    else:
        tokenizer = sentencepiece() if kind == "sentencepiece" else fake_tokenizer()
    return Grammars(tokenizer, tokenizer.vocab_size + EXTRA)


def sentencepiece() -> Tokenizer:
    """As Llama's: bytes for what has no token, a mark for a space, and one in front of every text; two end tokens."""
    special = ["<unk>", "<s>", "</s>", "<end>"]
    tokens = special + [f"<0x{i:02X}>" for i in range(256)] + ["▁", *map(chr, range(33, 127)), "é"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("a", "b"), ("1", "2"), ('"', ":"), ("▁", "{"), ("▁", '"')]
    vocab = {token: i for i, token in enumerate(tokens + [a + b for a, b in merges])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(special)
    return Tokenizer(backend, SpecialTokens({"eos": "</s>"}, frozenset([2, 3])))


def possible(matcher: Matcher, size: int) -> list[int]:
    logits = torch.zeros(size)
    matcher.mask(logits)
    return [int(t) for t in np.flatnonzero(logits.numpy() == 0)]


def walk(made: Grammars, grammar: Grammar, seed: int, steps: int = 400) -> str | None:
    """The text of a random answer; None if it did not end within so many tokens."""
    matcher, rng, tokens = made.matcher(grammar), random.Random(seed), []
    for _ in range(steps):
        logits = torch.zeros(made.vocab_size)
        matcher.mask(logits)
        now = np.flatnonzero(logits.numpy() == 0)
        ends = made.eos_ids.intersection(now[np.isin(now, list(made.eos_ids))].tolist())
        assert ends in (set(), made.eos_ids)  # all of them or none
        assert matcher.finished == (len(now) == len(ends) and tokens != [])
        if ends and (len(now) == len(ends) or rng.random() < 0.3):
            matcher.accept(min(ends))
            return made._tokenizer.decode(tokens)
        tokens.append(int(rng.choice(now[~np.isin(now, list(ends))])))
        assert tokens[-1] < made._tokenizer.vocab_size
        matcher.accept(tokens[-1])
    return None


def accepts(made: Grammars, grammar: Grammar, text: str) -> bool:
    """True if the text's own tokens may come, and then the end."""
    tokens = [*made._tokenizer.encode(text, special=False), max(made.eos_ids)]
    matcher = made.matcher(grammar)
    if matcher.allowed(tokens) < len(tokens):
        return False
    for token in tokens:
        logits = torch.full((made.vocab_size,), 3.5)
        matcher.mask(logits)
        assert logits[token] == 3.5
        matcher.accept(token)
    return True


def has_tokens(text: str) -> bool:
    """False for rare characters: the byte-level tokenizer lacks some bytes."""
    tokenizer = grammars("byte_level")._tokenizer
    return tokenizer.decode(tokenizer.encode(text, special=False)) == text


@pytest.fixture(params=["byte_level", "sentencepiece", "characters"])
def made(request):
    return grammars(request.param)


PATTERNS = [
    r"\d{3}-[0-9]{4}",
    r"(yes|no|maybe)( please)?",
    r"[a-f]{2,5}\.(com|org)",
    r"(a+b?c*){1,3}",
    r'"[^"\\]{0,6}"',
    r"x\/y|\[\]",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_answer_fits_the_regex(made, pattern):
    texts = [walk(made, Grammar("regex", pattern), seed) for seed in range(12)]
    found = [text for text in texts if text is not None and "\ufffd" not in text]  # half a character has no text
    assert len(found) > 5
    for text in found:
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_text_that_fits_a_regex_is_accepted(made, pattern):
    @given(st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True, alphabet=st.characters(max_codepoint=126)))
    def holds(text):
        if set(text) <= set(map(chr, range(32, 127))):
            assert accepts(made, Grammar("regex", pattern), text)

    holds()


@pytest.mark.parametrize("text", ["", "123-456", "123-45678", "x123-4567", "123_4567"])
def test_a_text_that_does_not_fit_is_refused(made, text):
    assert not accepts(made, Grammar("regex", r"\d{3}-\d{4}"), text)


def test_every_answer_fits_the_schema(made):
    texts = [walk(made, Grammar("json_schema", json.dumps(SCHEMA)), seed) for seed in range(10)]
    found = [json.loads(text) for text in texts if text is not None]
    assert len(found) > 3
    for value in found:
        assert list(value) == ["name", "age", "tags", "next"]
        assert len(value["name"]) <= 8
        assert 0 <= value["age"] <= 150
        assert len(value["tags"]) <= 3
        assert set(value["tags"]) <= {"a", "b c", "ü"}
        assert value["next"] in (None, True, False)


@given(
    st.fixed_dictionaries(
        {
            "name": st.text(st.characters(codec="ascii"), max_size=8),
            "age": st.integers(0, 150),
            "tags": st.lists(st.sampled_from(["a", "b c", "ü"]), max_size=3),
            "next": st.none() | st.booleans(),
        }
    ),
    st.sampled_from([None, 0, 2, 4]),
    st.sampled_from(["byte_level", "sentencepiece"]),
)
def test_every_value_of_the_schema_is_accepted(value, indent, kind):
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    value = {key: value[key] for key in SCHEMA["properties"]}  # in the order of the schema
    assert accepts(grammars(kind), grammar, json.dumps(value, indent=indent, ensure_ascii=False))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), _JSON, max_size=3), st.booleans(), st.booleans())
def test_json_is_any_object(value, ascii_only, indented):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=2 if indented else None)
    assume(has_tokens(text))
    assert accepts(grammars("byte_level"), Grammar("json"), text)


@pytest.mark.parametrize("text", ["[]", "1", '"a"', "", '{"a":}', '{"a":1,}', "{} x", "{" + " " * 100 + "}"])
def test_json_is_nothing_else(made, text):
    assert not accepts(made, Grammar("json"), text)


def test_json_answers_are_objects(made):
    texts = [walk(made, Grammar("json"), seed, 60) for seed in range(20)]
    found = [text for text in texts if text is not None]
    assert len(found) > 5
    assert all(isinstance(json.loads(text), dict) for text in found)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=4, unique=True))
def test_a_choice_is_one_of_its_texts(choices):
    assume(all(map(has_tokens, choices)))
    made, grammar = grammars("byte_level"), Grammar("choice", json.dumps(choices))
    assert all(accepts(made, grammar, choice) for choice in choices)
    assert walk(made, grammar, 1) in choices
    assert not accepts(made, grammar, "".join(choices) + "!")


@given(st.text(st.sampled_from("\\/[](){}.*+?|^$#&-~!\"' \n\0a"), min_size=1, max_size=9))
def test_punctuation_in_a_choice_means_itself(choice):
    assert accepts(grammars("byte_level"), Grammar("choice", json.dumps([choice])), choice)


def test_when_the_grammar_is_complete_only_the_end_tokens_stay(made):
    matcher = made.matcher(Grammar("regex", "a"))
    matcher.accept(made._tokenizer.encode("a", special=False)[0])
    assert matcher.finished
    assert possible(matcher, made.vocab_size) == sorted(made.eos_ids)
    for end in made.eos_ids:
        assert matcher.copy().allowed([end, end]) == 1
        matcher.accept(end)  # and after the end, nothing but the end
        assert possible(matcher, made.vocab_size) == sorted(made.eos_ids)


def test_where_the_grammar_may_end_it_may_go_on(made):
    matcher = made.matcher(Grammar("regex", "ab?"))
    a, b = (made._tokenizer.encode(c, special=False)[0] for c in "ab")
    matcher.accept(a)
    assert not matcher.finished
    as_byte = {made._tokenizer.token_id("<0x62>")} - {None}
    assert set(possible(matcher, made.vocab_size)) == {b, *made.eos_ids, *as_byte}


def test_a_draft_is_taken_as_far_as_it_fits(made):
    matcher = made.matcher(Grammar("regex", "[0-9]{4}"))
    digits, letters = ([made._tokenizer.encode(c, special=False)[0] for c in text] for text in ("9876", "xy"))
    end = min(made.eos_ids)
    for draft, taken in [
        ([], 0),
        (digits[:2], 2),
        (digits[:2] + letters, 2),
        (letters, 0),
        (digits + digits, 4),
        ([*digits, end, end], 5),
        ([digits[0], end], 1),
        ([digits[0], made.vocab_size + 5, digits[1]], 1),
        ([digits[0], -1], 1),
        ([end], 0),
    ]:
        assert matcher.allowed(draft) == taken, draft
    twin = matcher.copy()
    for token in digits:
        twin.accept(token)
    assert (twin.finished, matcher.finished) == (True, False)
    assert matcher.allowed(digits) == 4


def test_a_token_that_does_not_fit_changes_nothing(made):
    matcher = made.matcher(Grammar("choice", '["ab"]'))
    before = possible(matcher, made.vocab_size)
    for token in (made._tokenizer.encode("x", special=False)[0], min(made.eos_ids), made.vocab_size - 1, 1 << 30, -1):
        with pytest.raises(EngineError, match=f"token {token} does not fit the choice"):
            matcher.accept(token)
    assert possible(matcher, made.vocab_size) == before


def test_logits_of_another_shape_or_type_are_refused(made):
    matcher = made.matcher(Grammar("json"))
    for logits in (torch.zeros(made.vocab_size - 1), torch.zeros(made.vocab_size, dtype=torch.float64)):
        with pytest.raises(EngineError, match="expected float32"):
            matcher.mask(logits)


def deep(levels: int) -> str:
    return '{"items":' * levels + "{}" + "}" * levels


BAD = {
    "unclosed": ("regex", "(a", "unclosed group"),
    "lookahead": ("regex", "(?=a)b", "look-around"),
    "backreference": ("regex", r"(a)\1", "backreferences"),
    "no text": ("regex", r"[^\s\S]", "no text fits"),
    "surrogate": ("regex", "\ud800", "surrogates"),
    "nested": ("regex", "(" * 5000 + "a" + ")" * 5000, "nest"),
    "no json": ("json_schema", "{", "no JSON"),
    "injected": ("json_schema", '{}}, {"lark_grammar": "start: /.*/"', "no JSON"),
    "no object": ("json_schema", "[]", "no JSON object"),
    "type": ("json_schema", '{"type": "strin"}', "Invalid type"),
    "keyword": ("json_schema", '{"not": {}}', "Unimplemented"),
    "foreign": ("json_schema", '{"$ref": "file:///etc/passwd"}', "not present"),
    "no choice": ("choice", "[]", "at least one"),
    "numbers": ("choice", "[1]", "texts"),
    "no list": ("choice", '"a"', "JSON list"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_grammar_is_refused_with_its_reason(name):
    kind, source, reason = BAD[name]
    with pytest.raises(EngineError, match=reason) as caught:
        grammars("characters").matcher(Grammar(kind, source))
    assert len(str(caught.value)) < 500
    if name != "no text":
        with pytest.raises(EngineError):
            check(Grammar(kind, source))


def schema(**fields: object) -> tuple[str, str]:
    return "json_schema", json.dumps(fields)


HOSTILE = {
    "deep": ("json_schema", deep(100_000)),
    "too deep": ("json_schema", deep(500)),
    "itself": schema(**{"$ref": "#"}),
    "circle": schema(**{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    "product": schema(allOf=[{"anyOf": [{"properties": {f"{c}{i}": {}}} for c in "ab"]} for i in range(20)]),
    "intersection": schema(allOf=[{"type": "string", "pattern": f".*{chr(97 + i)}.{{{i}}}.*"} for i in range(16)]),
    "multiple": schema(type="integer", multipleOf=1_234_567),
    "objects": schema(enum=[{"a": i, "b": [i] * 3} for i in range(20_000)]),
    "properties": schema(type="object", properties={f"p{i}": {} for i in range(20_000)}),
    "stars": ("regex", "(a*)*" * 100_000),
    "classes": ("regex", r"\w" * 500_000),
    "ranges": ("regex", "|".join(rf"\p{{L}}{{{i},{i + 100}}}\d" for i in range(30_000))),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused(name):
    with pytest.raises(EngineError):
        grammars("characters").matcher(Grammar(*HOSTILE[name]))


GROWING = [
    "(a{1,1000}){1,1000}",
    "((((a{1,50}){1,50}){1,50}){1,50}){1,50}",
    "(.*a.{30}b){20}|(.*b.{17}c){20}|(.*c.{13}d){30}",
]


@pytest.mark.parametrize("pattern", GROWING)
def test_a_grammar_that_grows_on_the_way_ends_one_answer_and_no_other(pattern, monkeypatch):
    """Such grammars compile; the limits of a step catch them. Another answer starts anew."""
    monkeypatch.setitem(structured.LIMITS, "max_lexer_states", 6000)
    made, grammar, other = grammars("byte_level"), Grammar("regex", pattern), Grammar("regex", "[a-d]{3}")
    beside = made.matcher(other)
    for _ in range(2):
        matcher, rng, tokens = made.matcher(grammar), random.Random(0), []
        with pytest.raises(EngineError, match="too complex"):  # noqa: PT012 - after how many tokens is not known
            while len(tokens) < 3000:
                tokens.append(rng.choice([t for t in possible(matcher, made.vocab_size) if t not in made.eos_ids]))
                matcher.accept(tokens[-1])
        assert tokens  # the first of them was let through
    assert beside.allowed(made._tokenizer.encode("abc", special=False)) > 0


def test_an_answer_goes_on_when_others_have_filled_the_lexer(monkeypatch):
    """The first answer meets the limit only because the second has met so many states."""
    monkeypatch.setitem(structured.LIMITS, "max_lexer_states", 500)
    made = Grammars(fake_tokenizer(), fake_tokenizer().vocab_size)
    grammar = Grammar("regex", "[ab]*a[ab]{60}")
    first, tokens = made.matcher(grammar), made._tokenizer.encode("ab" * 20, special=False)
    for token in tokens:
        first.accept(token)
    second, rng = made.matcher(grammar), random.Random(0)
    with pytest.raises(EngineError, match="too many states"):  # noqa: PT012
        while True:
            second.accept(rng.choice([t for t in possible(second, made.vocab_size) if t not in made.eos_ids]))
    rest = made._tokenizer.encode("ab" * 20, special=False)
    assert first.allowed(rest) == 0  # the lexer is full
    assert len(possible(first, made.vocab_size)) == 2
    assert first.allowed(rest) == len(rest)


def test_the_cache_is_bounded_and_keeps_what_was_used_last():
    made = Grammars(fake_tokenizer(), fake_tokenizer().vocab_size)
    kept = Grammar("choice", '["kept"]')
    made.matcher(kept)
    compiled = made._compiled[kept]
    for i in range(2 * MAX_COMPILED):
        made.matcher(Grammar("choice", json.dumps([str(i)])))
        made.matcher(kept)
        assert len(made) <= MAX_COMPILED
    assert made._compiled[kept] is compiled
    assert len(made) == MAX_COMPILED


def test_a_verdict_is_kept():
    grammar = Grammar("regex", "(verdict")
    for _ in range(2):
        with pytest.raises(EngineError, match="unclosed"):
            check(grammar)
    assert structured._trial.cache_info().hits > 0


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = Tokenizer(sentencepiece()._backend, SpecialTokens())
    with pytest.raises(EngineError, match="end token"):
        Grammars(tokenizer, tokenizer.vocab_size).matcher(Grammar("json"))
