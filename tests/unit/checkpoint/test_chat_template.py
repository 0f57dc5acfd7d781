"""Chat templates: what transformers renders is rendered, and what attacks is stopped without harm to others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gossamer.checkpoint import chat_template
from gossamer.checkpoint.chat_template import render
from gossamer.errors import ChatTemplateError

ENDLESS = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
MESSAGES = [{"role": "user", "content": "a<b & c"}, {"role": "assistant", "content": "d\u00e9j\u00e0"}]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "DEADLINE", 0.5)


def test_a_template_sees_what_transformers_gives_it() -> None:
    template = (
        "{%- for m in messages %}\n"
        "  {% if m.role == 'user' %}\n"
        "[{{ m['content'] | trim }}]\n"
        "  {% else %}{% generation %}({{ m.content }}){% endgeneration %}{% continue %}{% endif %}\n"
        "{% endfor %}"
        "{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
        "{{ {'x': '<\u00e9>'} | tojson }}{{ messages[:1] | tojson(indent=1) | length }}"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}{{ bos }}{{ undefined_thing }}"
    )
    text = render(template, {"messages": MESSAGES, "tools": None, "bos": "<s>"})
    indented = len(json.dumps(MESSAGES[:1], indent=1))
    assert text == f'[a<b & c]\n(d\u00e9j\u00e0)2{{"x": "<\u00e9>"}}{indented}4True<s>'


def test_the_rendering_is_that_of_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (
        "{% for message in messages %}{{ loop.index }}:{{ message | tojson }}\n{% if not loop.last %}\n  x\n{% endif %}"
        "{% endfor %}\n\n{{ messages | length }} {{ '\\n' }}{% if add_generation_prompt %}  go\n{% endif %}\n"
    )
    theirs, _ = render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=True)
    assert render(template, {"messages": MESSAGES, "add_generation_prompt": True}) == theirs[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] | string | list }}{{ (''|attr('__class__')).__name__ }}",
        "{{ cycler.__init__.__globals__.os.environ }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__.__init__}'.format(raise_exception) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% set ns = namespace(__x=1) %}",
        "{{ self.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_that_reaches_out_is_stopped(template: str) -> None:
    with pytest.raises(ChatTemplateError):
        render(template, {"messages": []})
    assert render("{{ 1 + 1 }}", {}) == "2"


def test_an_endless_loop_is_stopped_and_the_next_template_works(impatient: None) -> None:
    with pytest.raises(ChatTemplateError, match=r"longer than 0\.5 s"):
        render(ENDLESS, {})
    assert render("fine", {}) == "fine"


def test_a_stopped_template_does_not_stop_the_others(impatient: None) -> None:
    faults: list[str] = []
    texts: list[str] = []

    def bad() -> None:
        with pytest.raises(ChatTemplateError) as caught:
            render(ENDLESS, {})
        faults.append(str(caught.value))

    def good(i: int) -> None:
        texts.append(render("{{ i }}", {"i": i}))

    threads = [threading.Thread(target=bad) for _ in range(2)]
    threads += [threading.Thread(target=good, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(faults) == 2
    assert sorted(map(int, texts)) == list(range(20))


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**10 }}",
        "{% set x = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set x.s = x.s + x.s %}{% endfor %}",
        "{{ range(99999) | list | string * 1000000 }}",
        "{% for i in range(90000) %}0123456789abcdef{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ '%1000000000d' % 1 }}",
    ],
    ids=["multiply", "double", "repeat", "print", "recursion", "parentheses", "power", "format"],
)
def test_a_template_without_measure_is_stopped(impatient: None, template: str) -> None:
    with pytest.raises(ChatTemplateError):
        render(template, {})
    assert render("fine", {}) == "fine"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ ''.__class__ }}", "reaches for what it may not: the attribute '__class__' of a str"),
        ("{% set ns = namespace(__x=1) %}", "reaches for what it may not: the name '__x'"),
        ("{% for i in range(90000) %}{{ 'x' * 100 }}{% endfor %}", r"prints more than \d+ characters"),
    ],
)
def test_what_a_template_may_not_do_is_named(template: str, why: str) -> None:
    with pytest.raises(ChatTemplateError, match=f"the chat template failed: {why}"):
        render(template, {})


def test_a_conversation_and_an_answer_have_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_REQUEST", 100)
    with pytest.raises(ChatTemplateError, match=r"a conversation of \d{3} bytes, more than 100"):
        render("x" * 100, {})
    monkeypatch.setattr(chat_template, "MAX_ANSWER", 20)
    with pytest.raises(ChatTemplateError, match=r"the chat template was stopped: an answer of \d\d bytes"):
        render("{{ 'x' * 40 }}", {})


def test_a_worker_that_ends_while_it_is_asked_is_an_error() -> None:
    worker = chat_template._Worker()
    assert worker.ask(b'{"template": "a", "variables": {}}') == {"text": "a"}
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.wait()
    with pytest.raises(chat_template._LostError, match="its process ended"):
        worker.ask(b'{"template": "a", "variables": {}}')
    worker.stop()


def test_what_the_template_says_against_a_conversation_reaches_the_user() -> None:
    with pytest.raises(ChatTemplateError, match="refused the conversation: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", {})


def test_a_syntax_error_names_its_line() -> None:
    with pytest.raises(ChatTemplateError, match="line 2"):
        render("fine\n{% if %}", {})


def test_messages_that_are_not_json_are_refused() -> None:
    with pytest.raises(ChatTemplateError, match="JSON"):
        render("", {"messages": [object()]})
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ChatTemplateError, match="JSON"):
        render("", {"messages": deep})


def test_a_conversation_of_megabytes_passes() -> None:
    text = "x" * 900_000
    assert render("{{ m }}", {"m": text, "unused": text * 3}) == text


def test_a_worker_that_dies_is_replaced() -> None:
    assert render("a", {}) == "a"
    for worker in list(chat_template._POOL._idle):
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
    for _ in range(chat_template.WORKERS + 1):
        assert render("b", {}) == "b"


def test_a_worker_loads_neither_torch_nor_this_package() -> None:
    worker = Path(chat_template.__file__).with_name("_template_worker.py")
    code = f"import runpy, sys; runpy.run_path({str(worker)!r}); print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "jinja2" in modules
    assert not {"torch", "numpy", "gossamer", "transformers"} & set(modules)


def test_a_worker_ends_with_its_parent() -> None:
    code = (
        "import os; from gossamer.checkpoint import chat_template as c; c.render('x', {});"
        "print(c._POOL._idle[0]._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    parent = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert parent.returncode == -9
    pid = int(parent.stdout)
    for _ in range(600):
        if not _runs(pid):
            return
        time.sleep(0.05)
    raise AssertionError("the worker outlives its parent")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in {"Z", "X"}


def test_a_forked_child_has_workers_of_its_own() -> None:
    assert render("parent", {}) == "parent"
    before = [worker._process.pid for worker in chat_template._POOL._idle]
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, b"1" if not chat_template._POOL._idle else b"0")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 1) == b"1"
    assert [worker._process.pid for worker in chat_template._POOL._idle] == before
    assert render("parent", {}) == "parent"


@pytest.fixture
def empty_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[chat_template._Pool]:
    pool = chat_template._Pool()
    monkeypatch.setattr(chat_template, "_POOL", pool)
    yield pool
    pool.close()


def test_a_prepared_worker_is_the_one_that_renders(empty_pool: chat_template._Pool) -> None:
    chat_template.prepare()
    chat_template.prepare()
    (worker,) = empty_pool._idle
    assert render("{{ 1 + 1 }}", {}) == "2"
    assert empty_pool._idle == [worker]


def test_a_prepared_worker_that_died_is_replaced(empty_pool: chat_template._Pool) -> None:
    chat_template.prepare()
    (worker,) = empty_pool._idle
    worker._process.kill()
    worker._process.wait()
    assert render("fine", {}) == "fine"
    assert worker not in empty_pool._idle


def test_a_worker_that_cannot_start_is_an_error_when_it_is_needed(
    empty_pool: chat_template._Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    chat_template.prepare()
    for _ in range(chat_template.WORKERS + 1):
        with pytest.raises(ChatTemplateError, match="does not start"):
            render("fine", {})
    monkeypatch.setattr(sys, "executable", "/absent/python")
    chat_template.prepare()
    with pytest.raises(OSError, match="absent"):
        render("fine", {})


def test_no_more_workers_are_prepared_than_there_are_places(empty_pool: chat_template._Pool) -> None:
    for _ in range(chat_template.WORKERS):
        empty_pool._places.acquire()
    chat_template.prepare()
    assert empty_pool._idle == []


def test_chat_templates_load_no_torch() -> None:
    code = "import sys; from gossamer.checkpoint import chat_template; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "tokenizers"} & set(done.stdout.split())
