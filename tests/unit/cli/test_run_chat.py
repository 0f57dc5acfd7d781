"""`gossamer run` and `gossamer chat`: answers on stdout, everything else on stderr."""

from __future__ import annotations

import io
import json
import os

import pytest
import torch

from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import resident_bytes
from gossamer.cli import chat, main
from gossamer.engine import LLM, SamplingParams, Token, isa_in_use
from gossamer.errors import ChatTemplateError, DoesNotFit, EngineError

SHORT = ["--max-tokens", "8"]


@pytest.fixture(scope="module")
def expected(tiny_model):
    """The answer to `hello`, and the tokens of its prompt in the chat template."""
    llm = LLM(tiny_model)
    return llm.chat([{"role": "user", "content": "hello"}], SamplingParams(max_tokens=8))


def test_run_prints_the_answer_on_stdout_and_the_rest_on_stderr(tiny_model, expected, capsys):
    assert main(["run", str(tiny_model), "hello", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert out == expected.text + "\n"
    assert f"{expected.prompt_tokens} + {len(expected.tokens)} tokens" in err


@pytest.mark.parametrize("command", ["run", "chat"])
def test_the_backend_and_why_it_was_taken_are_a_remark(tiny_model, capsys, monkeypatch, command):
    prompt = ["hello"] if command == "run" else []
    type_lines(monkeypatch)
    assert main([command, str(tiny_model), *prompt, *SHORT, "--backend", "reference"]) == 0
    assert f"backend reference ({isa_in_use()}, exact activations): as asked" in capsys.readouterr().err
    type_lines(monkeypatch)
    assert main([command, str(tiny_model), *prompt, *SHORT, "--weights", "float"]) == 0
    assert ": weights are expanded to floats" in capsys.readouterr().err


def test_a_backend_that_cannot_be_had_is_an_error(tiny_model, capsys):
    assert main(["run", str(tiny_model), "hello", "--backend", "cpu", "--weights", "float"]) == 1
    assert "the cpu backend cannot be had" in capsys.readouterr().err
    assert main(["run", str(tiny_model), "hello", "--backend", "gpu"]) == 2


def test_run_quiet_says_nothing_else(tiny_model, expected, capsys):
    assert main(["run", str(tiny_model), "hello", *SHORT, "-q"]) == 0
    assert capsys.readouterr() == (expected.text + "\n", "")


def test_run_json_is_one_record(tiny_model, expected, capsys):
    assert main(["run", str(tiny_model), "hello", *SHORT, "--json", "-q"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] == expected.text
    assert record["tokens"] == len(expected.tokens)
    assert record["prompt_tokens"] == expected.prompt_tokens
    assert record["finish_reason"] == expected.finish_reason
    assert record["ttft_s"] > 0


def test_run_reads_the_prompt_from_stdin(tiny_model, expected, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert main(["run", str(tiny_model), "-", *SHORT, "-q"]) == 0
    assert capsys.readouterr().out == expected.text + "\n"


def test_run_raw_skips_the_template(tiny_model, capsys):
    llm = LLM(tiny_model)
    completion = llm.generate(["hello"], SamplingParams(max_tokens=8))[0]
    assert main(["run", str(tiny_model), "hello", *SHORT, "--raw", "--json", "-q"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["prompt_tokens"], record["text"]) == (5, completion.text)


def test_run_passes_every_sampling_option_on(tiny_model, capsys):
    params = SamplingParams(8, temperature=1.3, top_p=0.9, top_k=50, min_p=0.01, seed=7, stop=("Q", "Z"))
    completion = LLM(tiny_model, "float").chat([{"role": "user", "content": "hello"}], params)
    options = "--temperature 1.3 --top-p 0.9 --top-k 50 --min-p 0.01 --seed 7 --stop Q --stop Z --weights float"
    assert main(["run", str(tiny_model), "hello", *SHORT, *options.split(), "-q"]) == 0
    assert capsys.readouterr().out == completion.text + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--max-tokens", "0"], "max_tokens is 0"),
        (["--weights", "half"], "--weights"),
        (["--stop", ""], "stop contains ''"),
        (["--stop", os.fsdecode(b"\xff")], "a stop text is not UTF-8"),
    ],
)
@pytest.mark.parametrize("command", [["run", "no-such-model", "hello"], ["chat", "no-such-model"]])
def test_bad_options_are_refused_as_wrong_requests_before_anything_is_loaded(command, options, message, capsys):
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err


def test_run_refuses_an_empty_prompt(tiny_model, capsys):
    assert main(["run", str(tiny_model), ""]) == 2
    assert "the prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_run_says_that_a_prompt_is_not_utf_8(tiny_model, capsys, monkeypatch, errors):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8", errors))
    assert main(["run", str(tiny_model), "-", *SHORT]) == 2
    assert "the prompt is not UTF-8 at character 4" in capsys.readouterr().err
    assert main(["run", str(tiny_model), os.fsdecode(b"caf\xe9"), *SHORT]) == 2
    assert "the prompt is not UTF-8" in capsys.readouterr().err


def test_a_prompt_that_begins_with_a_dash_goes_after_two(tiny_model, capsys):
    completion = LLM(tiny_model).generate(["-hello"], SamplingParams(max_tokens=8))[0]
    assert main(["run", str(tiny_model), "--raw", "-q", *SHORT, "--", "-hello"]) == 0
    assert capsys.readouterr().out == completion.text + "\n"


@pytest.mark.parametrize(("command", "tokens"), [("run", "32"), ("chat", "8")])
def test_what_does_not_fit_beside_the_weights_is_refused_before_they_are_loaded(
    tiny_model, capsys, monkeypatch, command, tokens
):
    enough = resident_bytes(open_checkpoint(tiny_model), torch.float32, packed=True)
    monkeypatch.setattr("gossamer.checkpoint.memory.available_memory", lambda: enough + 100)
    monkeypatch.setattr("gossamer.engine.llm.available_memory", lambda: enough + 100)
    monkeypatch.setattr("gossamer.engine.llm.choose", None)
    prompt = ["hello"] if command == "run" else []
    assert main([command, str(tiny_model), *prompt, *SHORT]) == 1
    err = capsys.readouterr().err
    assert f"the KV cache for {tokens} tokens" in err
    assert "--max-tokens" in err


def test_run_names_a_model_that_is_not_there(capsys):
    assert main(["run", "smollm", "hello"]) == 2
    assert "did you mean 'smollm2'?" in capsys.readouterr().err


def type_lines(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_chat_answers_piped_lines(tiny_model, expected, capsys, monkeypatch):
    type_lines(monkeypatch, "hello", "", "/quit", "never read")
    assert main(["chat", str(tiny_model), *SHORT, "--temperature", "0", "-q"]) == 0
    assert capsys.readouterr() == (expected.text + "\n", "")


def test_chat_remembers_until_reset(tiny_model, expected, capsys, monkeypatch):
    type_lines(monkeypatch, "hello", "/reset", "hello", "hello")
    assert main(["chat", str(tiny_model), *SHORT, "--temperature", "0", "-q"]) == 0
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": expected.text},
        {"role": "user", "content": "hello"},
    ]
    second = LLM(tiny_model).chat(messages, SamplingParams(max_tokens=8))
    assert second.text != expected.text
    assert capsys.readouterr().out == f"{expected.text}\n{expected.text}\n{second.text}\n"


def test_chat_explains_itself_on_stderr(tiny_model, capsys, monkeypatch):
    type_lines(monkeypatch, "/help", "/unknown")
    assert main(["chat", str(tiny_model)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("/reset") == 3


def test_chat_says_that_a_question_is_too_long_and_goes_on(tiny_model, expected, capsys, monkeypatch):
    type_lines(monkeypatch, "x" * 200, "hello")
    assert main(["chat", str(tiny_model), *SHORT, "--temperature", "0", "-q"]) == 0
    out, err = capsys.readouterr()
    assert out == expected.text + "\n"
    assert "context of the model 96" in err


def test_a_question_that_is_too_long_leaves_the_conversation_as_it_was(tiny_model):
    conversation = chat.Conversation(LLM(tiny_model), SamplingParams(max_tokens=8))
    conversation.prompt("hello")
    conversation.answered("yes")
    before = list(conversation.messages)
    with pytest.raises(EngineError, match="the question has"):
        conversation.prompt("x" * 200)
    assert conversation.messages == before


@pytest.mark.parametrize("error", [ChatTemplateError("no such role"), DoesNotFit("no room")])
@pytest.mark.parametrize("where", ["chat_tokens", "stream"])
def test_a_question_that_fails_is_dropped_and_the_chat_goes_on(tiny_model, expected, capsys, monkeypatch, error, where):
    real, calls = getattr(LLM, where), []

    def failing_once(self, *arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise error
        return real(self, *arguments)

    monkeypatch.setattr(LLM, where, failing_once)
    type_lines(monkeypatch, "a question that fails", "hello")
    assert main(["chat", str(tiny_model), *SHORT, "--temperature", "0", "-q"]) == 0
    assert capsys.readouterr() == (expected.text + "\n", f"error: {error.message}\n")


def test_an_answer_that_breaks_off_ends_its_line_and_is_forgotten(tiny_model, capsys, monkeypatch):
    def broken(self, prompt, params):
        yield Token("half", 5)
        raise EngineError("the model's logits are not finite")

    monkeypatch.setattr(LLM, "stream", broken)
    conversation = chat.Conversation(LLM(tiny_model), SamplingParams())
    chat._answer(conversation, "hello", quiet=True)
    assert capsys.readouterr() == ("half\n", "error: the model's logits are not finite\n")
    assert conversation.messages == []


def test_chat_says_which_question_is_not_utf_8_and_goes_on(tiny_model, expected, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nhello\n"), "utf-8"))
    assert main(["chat", str(tiny_model), *SHORT, "--temperature", "0", "-q"]) == 0
    out, err = capsys.readouterr()
    assert out == expected.text + "\n"
    assert "the question is not UTF-8" in err


@pytest.mark.parametrize("quiet", [[], ["-q"]])
def test_the_prompt_is_no_part_of_what_goes_to_a_file(tiny_model, expected, capsys, monkeypatch, quiet):
    type_lines(monkeypatch, "hello")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert main(["chat", str(tiny_model), *SHORT, "--temperature", "0", *quiet]) == 0
    out, err = capsys.readouterr()
    assert out == expected.text + "\n"
    assert ("> " in err) is (quiet == [])


def test_ctrl_c_stops_the_answer_and_not_the_program(tiny_model, expected, capsys, monkeypatch):
    real, calls = LLM.stream, []

    def stream(self, prompt, params):
        calls.append(prompt)
        for token in real(self, prompt, params):
            yield token
            if len(calls) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream", stream)
    type_lines(monkeypatch, "hello", "/reset", "hello")
    assert main(["chat", str(tiny_model), *SHORT, "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n" + expected.text + "\n")
    assert "(interrupted)" in err


def test_a_long_conversation_forgets_its_oldest_turns(tiny_model):
    llm = LLM(open_checkpoint(tiny_model))
    conversation = chat.Conversation(llm, SamplingParams(max_tokens=8))
    for turn in range(6):
        tokens = conversation.prompt(f"question {turn}")
        assert len(tokens) <= 96 - 8
        assert f"question {turn}" in llm.tokenizer.decode(tokens)
        conversation.answered("yes")
    assert "question 0" not in llm.tokenizer.decode(tokens)
    assert conversation.messages[0]["role"] == "user"


def test_a_model_without_a_template_is_for_run_only(write_tiny_model, tmp_path, capsys, monkeypatch):
    folder = write_tiny_model(tmp_path / "plain", template=None)
    assert main(["run", str(folder), "hello", *SHORT, "-q"]) == 0
    type_lines(monkeypatch, "hello")
    assert main(["chat", str(folder), "-q"]) == 1
    assert "no chat template" in capsys.readouterr().err
