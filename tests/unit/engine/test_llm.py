"""Generation: a request gets the same in any batch, any chunks, any way to hold weights; bad requests are named."""

from __future__ import annotations

import pytest
import torch

from gossamer.checkpoint import Tokenizer, memory, open_checkpoint
from gossamer.checkpoint.load import load_decoder, resident_bytes
from gossamer.engine import LLM, SamplingParams, isa_in_use, reference, runner, sampling_bytes
from gossamer.engine import llm as llm_module
from gossamer.engine.backend import BLOCK_SIZE, cache_bytes
from gossamer.errors import DoesNotFit, EngineError
from gossamer.formats.linear import DenseLinear, PackedLinear

PROMPTS = ["a", "The quick brown fox jumps over the lazy dog", "hello", "0123456789" * 4, "xyz"]


@pytest.fixture(scope="module")
def llm(tiny_model):
    return LLM(tiny_model, "float")


@pytest.fixture(scope="module")
def packed(tiny_packed):
    return LLM(tiny_packed, backend="reference")


def by_hand(llm: LLM, prompt: str, count: int) -> list[int]:
    """Greedy decoding without cache, batch or chunks: the whole text through the decoder for every token."""
    tokens = llm.tokenizer.encode(prompt)
    for _ in range(count):
        tokens.append(int(llm.backend.decoder(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] in llm.tokenizer.eos_ids:
            break
    return tokens[len(llm.tokenizer.encode(prompt)) :]


def test_greedy_tokens_are_those_of_the_plain_decoder(llm):
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=20))
    assert [list(o.tokens) for o in outputs] == [by_hand(llm, p, 20) for p in PROMPTS]
    assert len({o.tokens for o in outputs}) == len(PROMPTS)


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=12), SamplingParams(12, 1.0, top_p=0.9, seed=4)])
def test_alone_or_in_a_batch_is_the_same(llm, params):
    assert llm.generate(PROMPTS, params) == [llm.generate([p], params)[0] for p in PROMPTS]


def test_sequences_of_different_length_leave_the_batch_one_by_one(llm):
    each = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (7, 1, 12, 3, 9)]
    outputs = llm.generate(PROMPTS, each)
    assert [len(o.tokens) for o in outputs] == [7, 1, 12, 3, 9]
    assert outputs == [llm.generate([p], q)[0] for p, q in zip(PROMPTS, each, strict=True)]


def test_small_waves_change_nothing(llm, tiny_model):
    params = SamplingParams(max_tokens=8)
    assert LLM(tiny_model, "float", max_batch=2).generate(PROMPTS, params) == llm.generate(PROMPTS, params)


def test_chunks_of_a_prompt_change_nothing(llm, monkeypatch):
    prompts = [list(range(3, 43)), [5, 6, 7], [9] * 30]
    whole = logits_after(llm, prompts)
    for chunk, tokens in ((7, 2048), (512, 16), (7, 9), (1, 1)):
        monkeypatch.setattr(runner, "CHUNK", chunk)
        monkeypatch.setattr(runner, "CHUNK_TOKENS", tokens)
        assert (whole - logits_after(llm, prompts)).abs().max() < 1e-4


def logits_after(llm: LLM, prompts: list[list[int]]) -> torch.Tensor:
    with runner.Rows(llm.pool, prompts, [len(p) for p in prompts]) as rows:
        return rows.forward()


def test_a_finished_answer_gives_its_blocks_back(llm):
    llm.generate(PROMPTS, SamplingParams(max_tokens=3))
    assert llm.engine.blocks.used == 0
    for token in llm.stream("hello"):  # and so does one that is not wanted any more
        assert token.id >= 0
        assert llm.engine.blocks.used > 0
        break
    assert llm.engine.blocks.used == 0
    llm.engine.check_idle()


def test_two_streams_at_once_are_what_they_are_alone(tiny_model):
    llm = LLM(tiny_model, "float")
    first, second = SamplingParams(12, 1.0, seed=3, ignore_eos=True), SamplingParams(30, ignore_eos=True)
    alone = [[t.id for t in llm.stream(p, q)] for p, q in (("hello", first), ("The quick brown fox", second))]
    llm.pool.release()
    both = llm.stream("hello", first), llm.stream("The quick brown fox", second)
    found: list[list[int]] = [[next(both[0]).id], []]
    for _ in range(30):
        for tokens, stream in zip(found, both, strict=True):
            tokens += [t.id for t in [next(stream, None)] if t is not None]
    assert found == alone


def test_what_somebody_else_asks_of_its_engine_is_no_obstacle(tiny_model):
    llm = LLM(tiny_model, backend="reference")
    llm.engine.add("mine", [5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True))
    assert llm.generate([[1, 2, 3]], SamplingParams(max_tokens=9, ignore_eos=True))[0].tokens
    assert not llm.engine.holds("mine")


def test_logits_stay_in_the_backend_where_only_the_likeliest_is_asked_for(llm, monkeypatch):
    asked = []
    forward = llm.backend.forward
    monkeypatch.setattr(llm.backend, "argmax", lambda batch: asked.append("argmax") or forward(batch).argmax(-1))
    monkeypatch.setattr(llm.backend, "forward", lambda batch: asked.append("forward") or forward(batch))
    llm.generate(["a", "b"], SamplingParams(max_tokens=2))
    assert asked == ["argmax"] * 2
    llm.generate(["a"], SamplingParams(max_tokens=3, min_tokens=2))
    assert asked[2:] == ["forward", "forward", "argmax"]
    llm.generate(["a", "b"], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=1, temperature=1.0)])
    assert asked[5:] == ["forward", "argmax"]


def test_streamed_text_is_the_completed_text(llm):
    params = SamplingParams(max_tokens=30, temperature=1.5, seed=1, ignore_eos=True)
    tokens = list(llm.stream("hello", params))
    completion = llm.generate(["hello"], params)[0]
    assert "".join(t.text for t in tokens) == completion.text
    assert tuple(t.id for t in tokens) == completion.tokens
    assert [t.finish_reason for t in tokens] == [None] * 29 + ["length"]


def test_a_stop_text_never_shows_in_the_stream(llm):
    params = {"max_tokens": 40, "temperature": 1.0, "seed": 2, "ignore_eos": True}
    free = llm.generate(["hello"], SamplingParams(**params))[0].text
    stop = free[10:13]
    stopped = list(llm.stream("hello", SamplingParams(**params, stop=(stop,))))
    assert "".join(t.text for t in stopped) == free[: free.index(stop)]
    assert stopped[-1].finish_reason == "stop"


def test_an_end_token_stops_unless_it_comes_too_early(llm, monkeypatch):
    plain = llm.generate(["hello"], SamplingParams(max_tokens=10))[0]
    end = plain.tokens[2]
    monkeypatch.setattr(Tokenizer, "eos_ids", frozenset({end}))
    ended = llm.generate(["hello"], SamplingParams(max_tokens=10))[0]
    assert ended.tokens == plain.tokens[: plain.tokens.index(end) + 1]
    assert ended.finish_reason == "stop"
    late = llm.generate(["hello"], SamplingParams(max_tokens=10, min_tokens=4))[0]
    assert len(late.tokens) >= 4
    assert end not in late.tokens[:4]
    assert llm.generate(["hello"], SamplingParams(max_tokens=10, ignore_eos=True))[0].tokens == plain.tokens


def test_the_context_ends_an_answer(llm):
    output = llm.generate([[5] * 90], SamplingParams(max_tokens=50, ignore_eos=True))[0]
    assert (len(output.tokens), output.finish_reason, output.prompt_tokens) == (6, "length", 90)


def test_a_prompt_longer_than_the_context_names_both_lengths(llm):
    with pytest.raises(EngineError, match=r"prompt 1: 96 tokens do not fit a context of 96"):
        llm.generate(["ok", [5] * 96])
    with pytest.raises(EngineError, match=r"120 tokens do not fit a context of 96"):
        llm.stream([5] * 120)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([""], "prompt 0: the prompt is empty"), ([[]], "empty"), ([[999]], "token 999"), ([[-1]], "token -1"),
     ([["a"]], "token 'a'"), ("text", "list of prompts")],
)  # fmt: skip
def test_bad_prompts_are_named(llm, prompts, message):
    with pytest.raises(EngineError, match=message):
        llm.generate(prompts)


def test_no_prompts_give_no_completions(llm):
    assert llm.generate([]) == []


def test_params_for_each_prompt_must_be_as_many(llm):
    with pytest.raises(EngineError, match="1 sampling params for 2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()])


def test_a_request_that_memory_can_never_hold_is_refused_with_the_numbers(tiny_model, monkeypatch):
    llm = LLM(tiny_model, "float")
    monkeypatch.setattr(memory, "available_memory", lambda: 10_000)
    monkeypatch.setattr(llm_module, "available_memory", lambda: 10_000)
    with pytest.raises(EngineError, match="5 tokens and an answer of up to 20 do not fit the KV cache of 16 tokens"):
        llm.generate(["hello"], SamplingParams(max_tokens=20))
    assert not llm.engine.has_work
    assert len(llm.generate(["hello"], SamplingParams(max_tokens=8, ignore_eos=True))[0].tokens) == 8


TOKEN_BYTES = 4 * 2 * 2 * 2 * 16
"""Float32 keys and values, layers, heads, width."""


def test_a_request_that_does_not_fit_beside_the_weights_is_refused_before_they_are_loaded(tiny_model, monkeypatch):
    weights = resident_bytes(open_checkpoint(tiny_model), torch.float32, packed=True)
    free = weights + TOKEN_BYTES * 64 - 1  # four blocks
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    monkeypatch.setattr(llm_module, "available_memory", lambda: free)
    loaded = []
    real = reference.load_decoder
    monkeypatch.setattr(reference, "load_decoder", lambda *a, **k: loaded.append(1) or real(*a, **k))
    with pytest.raises(DoesNotFit, match=rf"cache for 50 tokens \(0.0 MB\) takes {(free + 1) / 1e6:.1f} MB") as caught:
        LLM(tiny_model, backend="reference", reserve_tokens=50)
    assert "--max-tokens" in caught.value.hint
    assert not loaded
    LLM(tiny_model, backend="reference", reserve_tokens=48)
    assert loaded


def test_no_more_is_reserved_than_the_context_holds(tiny_model, monkeypatch):
    enough = resident_bytes(open_checkpoint(tiny_model), torch.float32, packed=True) + TOKEN_BYTES * 96
    monkeypatch.setattr(memory, "available_memory", lambda: enough)
    monkeypatch.setattr(llm_module, "available_memory", lambda: enough)
    LLM(tiny_model, backend="reference", reserve_tokens=1 << 20)


def test_weights_that_do_not_fit_by_themselves_are_not_blamed_on_the_request(tiny_model, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    monkeypatch.setattr(llm_module, "available_memory", lambda: 1000)
    with pytest.raises(DoesNotFit, match="its weights") as caught:
        LLM(tiny_model, reserve_tokens=50)
    assert "--max-tokens" not in caught.value.hint


@pytest.fixture
def sizes(monkeypatch):
    """How many rows were sampled together, wave by wave."""
    found = []

    class Counted(runner.Rows):
        def __init__(self, pool, prompts, limits):
            found.append(len(prompts))
            super().__init__(pool, prompts, limits)

    monkeypatch.setattr(llm_module, "Rows", Counted)
    return found


def test_where_memory_is_short_prompts_wait_for_one_another(llm, tiny_model, monkeypatch):
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    expected = llm.generate(PROMPTS, params)
    monkeypatch.setattr(llm_module, "available_memory", lambda: 2 * TOKEN_BYTES * BLOCK_SIZE * 6)
    short = LLM(tiny_model, "float")
    assert short.generate(PROMPTS, params) == expected
    assert short.engine.blocks.num_blocks == 6
    assert short.engine.stats().preemptions > 0


def test_chat_answers_the_templated_messages(llm):
    messages = [{"role": "user", "content": "hi"}]
    tokens = llm.chat_tokens(messages)
    assert llm.tokenizer.decode(tokens, skip_special=False) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    params = SamplingParams(max_tokens=5)
    assert llm.chat(messages, params) == llm.generate([tokens], params)[0]


# How weights are held


def test_stored_weights_compute_what_expanded_ones_do(tiny_packed, packed):
    expanded = load_decoder(packed.checkpoint)
    tokens = torch.randint(3, 200, (3, 30))
    few = torch.randint(3, 200, (1, 2))
    for x in (tokens, few):  # many tokens and few take different kernels
        a, b = expanded(x), packed.backend.decoder(x)
        assert a.std() > 0.1
        assert (a - b).abs().max() < 1e-4 * a.abs().max()


def test_stored_weights_generate_what_expanded_ones_do(tiny_packed, packed):
    params = SamplingParams(max_tokens=12)
    assert packed.generate(PROMPTS, params) == LLM(tiny_packed, "float").generate(PROMPTS, params)


def test_packed_weights_stay_packed_and_a_tied_head_shares_them(packed):
    decoder, checkpoint = packed.backend.decoder, packed.checkpoint
    assert isinstance(decoder.head, PackedLinear)
    assert decoder.embed.table is decoder.head
    assert isinstance(decoder.blocks[0].v, PackedLinear)
    assert decoder.blocks[0].v.zero.dtype == torch.int8
    held = sum(t.nbytes for t in {t.data_ptr(): t for t in decoder.state_dict().values()}.values())
    # scales are float32 in memory, bf16 in the file; zero points are a byte each, packed in the file
    assert checkpoint.weight_bytes() < held < 1.3 * checkpoint.weight_bytes()


def test_bfloat16_weights_stay_bfloat16(tiny_model):
    decoder = load_decoder(open_checkpoint(tiny_model), packed=True)
    assert isinstance(decoder.blocks[1].gate, DenseLinear)
    assert decoder.embed.weight is decoder.head.weight
    assert decoder.head.weight.dtype == torch.bfloat16
    expanded = load_decoder(open_checkpoint(tiny_model))
    tokens = torch.randint(3, 200, (2, 20))
    assert (decoder(tokens) - expanded(tokens)).abs().max() < 1e-4


def test_a_tied_embedding_is_loaded_once(llm):
    assert llm.backend.decoder.head.weight is llm.backend.decoder.embed.weight
    assert not any(p.is_meta for p in llm.backend.decoder.parameters())


def test_loading_reports_progress_and_refuses_what_does_not_fit(tiny_model, monkeypatch):
    seen = []
    checkpoint = open_checkpoint(tiny_model)
    load_decoder(checkpoint, progress=lambda label, done, total: seen.append((label, done, total)))
    assert seen[0] == ("loading", 0, seen[0][2])
    assert seen[-1] == ("loading", seen[0][2], seen[0][2])
    needed = resident_bytes(checkpoint, torch.float32, packed=False)
    assert needed == 4 * checkpoint.parameters()
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    with pytest.raises(DoesNotFit, match=f"{needed / 1e6:,.1f} MB"):
        load_decoder(checkpoint)
    load_decoder(checkpoint, packed=True)  # half the size: fits


# Text that the model writes by itself


def test_sampled_tokens_are_deterministic_by_seed_and_from_the_model(llm):
    a, b, other = (llm.sample_tokens(3, 20, seed=s) for s in (1, 1, 2))
    assert a.dtype == torch.int64
    assert a.shape == (3, 20)
    assert torch.equal(a, b)
    assert not a.is_inference()  # whoever gets it may write into it
    assert not torch.equal(a, other)


def test_nearly_cold_samples_are_the_greedy_continuation_of_the_start_token(llm):
    sampled = llm.sample_tokens(2, 15, seed=0, temperature=1e-4)
    greedy = llm.generate([[llm.start_token]], SamplingParams(max_tokens=15, ignore_eos=True))[0]
    assert sampled.tolist() == [list(greedy.tokens)] * 2


def test_first_samples_follow_the_distribution_after_the_start_token(llm):
    probabilities = llm.backend.decoder(torch.tensor([[llm.start_token]]))[0, 0].softmax(-1)
    n = 4000
    shares = llm.sample_tokens(n, 1, seed=5)[:, 0].bincount(minlength=len(probabilities)) / n
    assert (shares - probabilities).abs().max() < 5 * 0.5 / n**0.5


def test_many_samples_take_no_more_memory_than_one_wave(llm, monkeypatch, sizes):
    steps = []
    whole = llm.sample_tokens(7, 10, seed=3)
    monkeypatch.setattr(llm_module, "WAVE_BYTES", 3 * cache_bytes(TOKEN_BYTES, 1, 10) + 1)
    waves = llm.sample_tokens(7, 10, seed=3, progress=lambda label, done, total: steps.append((done, total)))
    assert sizes == [7, 3, 3, 1]
    assert torch.equal(whole, waves)
    assert steps == [(n, 30) for n in range(1, 31)]
    monkeypatch.setattr(llm_module, "WAVE_BYTES", 1 << 30)
    llm.sample_tokens(70, 1, seed=3)
    assert sizes[4:] == [32, 32, 6]


def test_waves_do_not_depend_on_what_is_free(llm, monkeypatch):
    llm.pool.release()
    monkeypatch.setattr(memory, "available_memory", lambda: cache_bytes(TOKEN_BYTES, 5, 10) - 1)
    with pytest.raises(DoesNotFit):
        llm.sample_tokens(5, 10, seed=3)


def test_sampling_takes_the_weights_and_the_cache_of_one_wave(packed, monkeypatch):
    monkeypatch.setattr(llm_module, "kv_bytes_per_token", lambda checkpoint: TOKEN_BYTES)
    weights = resident_bytes(packed.checkpoint, torch.float32, packed=True)
    logits = packed.config.vocab_size * llm_module.BYTES_PER_LOGIT
    row = TOKEN_BYTES * 32 + logits  # 20 tokens take two blocks
    assert sampling_bytes(packed.checkpoint, 3, 20) == weights + 3 * row
    assert sampling_bytes(packed.checkpoint, 1000, 20) == weights + llm_module.MAX_BATCH * row
    long = llm_module.WAVE_BYTES // TOKEN_BYTES // 2 + 1  # not even two of them in a wave
    assert sampling_bytes(packed.checkpoint, 1000, long) == weights + cache_bytes(TOKEN_BYTES, 1, long) + logits


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_samples(llm, monkeypatch, broken):
    monkeypatch.setattr(type(llm.backend.decoder), "logits", lambda self, x: torch.full((len(x), 259), broken))
    with pytest.raises(EngineError, match="not finite"):
        llm.sample_tokens(2, 5, seed=0)


def test_samples_at_a_tiny_temperature_are_the_greedy_ones(llm):
    assert torch.equal(llm.sample_tokens(1, 8, seed=0, temperature=1e-45), llm.sample_tokens(1, 8, 0, 1e-6))


def test_the_instruction_set_in_use_is_named(monkeypatch):
    assert isa_in_use() in {"portable", "avx2", "avx512", "reference"}
    monkeypatch.setenv("GOSSAMER_KERNELS", "reference")
    assert isa_in_use() == "reference"


@pytest.mark.parametrize(
    "arguments", [(0, 5, 0), (2, 0, 0), (2, 97, 0), (2, 5, -1), (True, 5, 0), (2, 5, 0, 0.0), (2, 5, 0, float("nan"))]
)
def test_samples_that_cannot_be_are_refused(llm, arguments):
    with pytest.raises(EngineError):
        llm.sample_tokens(*arguments)


@pytest.mark.slow
def test_smollm2_answers_the_same_in_a_batch():
    llm = LLM("smollm2")
    prompts = ["The capital of France is", "Water boils at a temperature of", "def fibonacci(n):"]
    params = SamplingParams(max_tokens=8)
    together = llm.generate(prompts, params)
    assert "Paris" in together[0].text
    assert together == [llm.generate([p], params)[0] for p in prompts]
