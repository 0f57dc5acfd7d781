"""The backend without a model: it counts, and finds out whoever gives it a wrong block."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from gossamer.engine.backend import BLOCK_SIZE, Batch
from gossamer.engine.fake import CHARACTERS, EOS, FakeBackend, fake_config, fake_tokenizer
from gossamer.errors import EngineError


def batch(rows: list[tuple[list[int], int, list[int]]]) -> Batch:
    """A step of sequences: tokens, how many are in the cache already, and blocks; all results are wanted."""
    tokens = [token for fed, _, _ in rows for token in fed]
    tables = np.zeros((len(rows), max(len(blocks) for _, _, blocks in rows)), np.int32)
    for table, (_, _, blocks) in zip(tables, rows, strict=True):
        table[: len(blocks)] = blocks
    return Batch(
        np.array(tokens, np.int32),
        np.cumsum([0, *(len(fed) for fed, _, _ in rows)], dtype=np.int32),
        np.array([cached + len(fed) for fed, cached, _ in rows], np.int32),
        tables,
        np.arange(len(tokens), dtype=np.int32),
    )


@pytest.fixture
def backend():
    made = FakeBackend(fake_config(vocab_size=50, max_positions=64))
    made.reserve(8)
    return made


def test_after_each_token_comes_the_next_number(backend):
    assert backend.argmax(batch([([3, 7, 49], 0, [5]), ([20], 0, [1])])).tolist() == [4, 8, 0, 21]


def test_logits_are_the_same_for_all_numbers_but_the_next_three(backend):
    logits = backend.forward(batch([([48], 0, [0])]))
    expected = torch.zeros(1, 50)
    expected[0, [49, 0, 1]] = torch.tensor([8.0, 4.0, 2.0])
    assert torch.equal(logits, expected)


def test_what_was_read_before_is_in_the_cache(backend):
    backend.forward(batch([(list(range(20)), 0, [3, 6])]))
    assert backend.argmax(batch([([20], 20, [3, 6])])).tolist() == [21]


def test_a_place_that_was_never_written_is_an_error(backend):
    backend.forward(batch([([1, 2, 3], 0, [3])]))
    for blocks, cached in (([2], 3), ([3], 4), ([3, 4], BLOCK_SIZE + 1)):
        with pytest.raises(EngineError, match="never written"):
            backend.forward(batch([([9], cached, blocks)]))


def test_a_batch_that_makes_no_sense_is_an_error(backend):
    for rows in ([([50], 0, [0])], [([1], 0, [8])], [([1] * 65, 0, [0, 1, 2, 3, 4])]):
        with pytest.raises(EngineError):
            backend.forward(batch(rows))


def test_contents_are_lost_when_it_grows_or_is_given_back(backend):
    for blocks in (9, 0):
        backend.reserve(9 if blocks else 0)
        assert backend.num_blocks == blocks
        backend.reserve(9)
        with pytest.raises(EngineError, match="never written"):
            backend.forward(batch([([9], 3, [1])]))
        backend.forward(batch([([1, 2, 3], 0, [1])]))
    backend.reserve(4)  # it has more already: nothing is lost
    backend.forward(batch([([9], 3, [1])]))


def test_it_keeps_its_batches_if_asked_and_takes_its_time():
    backend = FakeBackend(delay=0.01, token_delay=0.005)
    backend.reserve(1)
    step = batch([([1, 2], 0, [0])])
    backend.forward(step)
    assert backend.batches == []
    backend.record = True
    began = time.perf_counter()
    backend.forward(step)
    assert time.perf_counter() - began >= 0.02  # sleeping is never shorter than asked
    assert backend.batches == [step]


def test_it_has_no_hidden_states(backend):
    with pytest.raises(EngineError, match="no hidden states"):
        backend.hidden(batch([([1], 0, [0])]))
    with pytest.raises(EngineError, match="no head"):
        backend.head(torch.zeros(1, 2))
    assert (backend.weight_bytes, backend.describe()) == (0, "counts")


class TestTokenizer:
    def test_each_character_is_a_token(self):
        tokenizer = fake_tokenizer()
        text = "".join(CHARACTERS)
        assert tokenizer.encode(text) == list(range(len(text)))
        assert tokenizer.decode(range(len(text))) == text
        assert set("aZ0 ~\n") <= set(CHARACTERS)
        assert tokenizer.vocab_size == fake_config().vocab_size == len(CHARACTERS) + 1

    def test_the_last_one_ends_an_answer(self):
        tokenizer = fake_tokenizer()
        assert tokenizer.eos_ids == {len(CHARACTERS)}
        assert tokenizer.encode(f"a{EOS}")[-1] == len(CHARACTERS)
        assert tokenizer.decode([0, len(CHARACTERS)]) == "0"
        stream = tokenizer.stream()
        assert [stream.push(token) for token in (10, 11, len(CHARACTERS))] == ["a", "b", ""]

    def test_it_has_a_chat_template_unless_not_wanted(self):
        prompt = fake_tokenizer().chat([{"role": "user", "content": "hi"}])
        assert fake_tokenizer().decode(prompt) == "user: hi\n> "
        assert fake_tokenizer(chat=False).chat_template is None
