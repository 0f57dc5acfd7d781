"""Hours of mixed load in as few seconds as are given: what was held is given back, and nothing grows.

    python tests/soak/soak.py 3600
    python tests/soak/soak.py 60 --only engine

Half of the time belongs to an engine in this process, half to a server in processes of its own, on loopback. Both get
requests of all kinds, many of which are aborted, in rounds. After each round nothing runs: then all blocks of the KV
cache are free, and memory, file descriptors, threads and living objects are counted. It ends by itself, with exit code
1 and a line that says what grew, if anything did.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
for _folder in (TESTS, TESTS / "unit" / "serve"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOSSAMER_THREADS"):
    os.environ.setdefault(_variable, "1")

import httpx2  # noqa: E402
import numpy as np  # noqa: E402
import psutil  # noqa: E402
from serving import Server, chat_body, long_body, wait_until  # noqa: E402

from engine_doubles import ContextBackend, Received, answer, make_engine, random_params, random_prompt  # noqa: E402
from gossamer.engine.block_manager import BlockTable  # noqa: E402
from gossamer.engine.engine import Engine  # noqa: E402
from gossamer.engine.params import Grammar, SamplingParams  # noqa: E402
from gossamer.engine.sampler import Sampler  # noqa: E402
from gossamer.engine.sequence import Sequence  # noqa: E402
from gossamer.engine.speculative import Speculator  # noqa: E402
from gossamer.engine.speculative.draft_model import DraftModel  # noqa: E402
from gossamer.engine.speculative.ngram import NgramDrafter  # noqa: E402
from gossamer.errors import EngineError  # noqa: E402

ENGINE_REQUESTS, SERVER_REQUESTS = 25, 30
"""Requests of a round."""
CLIENTS = 6
RSS_SLACK = 24 << 20
"""Bytes that a process may have at the end beyond what it had when it was warm: allocators keep what is in pieces."""
REPORT_SECONDS = 30.0


class Grew(Exception):
    """Something was not given back."""


class Gauge:
    """A number that is read after every round and must not rise once it is warm."""

    def __init__(self, name: str, slack: float = 0.0) -> None:
        self.name, self.slack = name, slack
        self.values: list[float] = []

    def check(self) -> None:
        """Compare the end with the second quarter. Raises Grew."""
        quarter = len(self.values) // 4
        if quarter == 0:
            return
        warm, end = max(self.values[quarter : 2 * quarter]), min(self.values[-quarter:])
        if end > warm + self.slack:
            raise Grew(f"{self.name} rose from {warm:,.0f} to {end:,.0f} in {len(self.values)} rounds")


class Gauges:
    """Of one process."""

    def __init__(self, name: str, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.rss = Gauge(f"{name}: bytes of memory", RSS_SLACK)
        self.files = Gauge(f"{name}: open files", slack=2)
        self.threads = Gauge(f"{name}: threads", slack=8)

    def read(self) -> None:
        self.rss.values.append(self._process.memory_info().rss)
        self.files.values.append(self._process.num_fds())
        self.threads.values.append(self._process.num_threads())

    def check(self) -> None:
        for gauge in (self.rss, self.files, self.threads):
            gauge.check()

    def __str__(self) -> str:
        last = [gauge.values[-1] for gauge in (self.rss, self.files, self.threads)]
        return f"{last[0] / 1e6:.0f} MB, {last[1]:.0f} files, {last[2]:.0f} threads"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--only", choices=["engine", "server"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    parts = {"engine": soak_engine, "server": soak_server}
    chosen = [parts[args.only]] if args.only else list(parts.values())
    try:
        for part in chosen:
            print(part(args.seconds / len(chosen), args.seed), flush=True)
    except Grew as problem:
        print(f"soak: {problem}", file=sys.stderr)
        return 1
    return 0


def soak_engine(seconds: float, seed: int = 0) -> str:
    """Load engines with drafts of both kinds in one process; what was seen. Raises Grew."""
    rng = np.random.default_rng(seed)
    engines = make_engines()
    gauges = Gauges("engine", os.getpid())
    seen: Counter[str] = Counter()
    for rounds in turns(seconds, lambda: f"engine: {seen['requests']:,} requests, {gauges}"):
        engine = engines[rounds % len(engines)]
        requests, received = load_engine(engine, rng)
        seen["requests"] += len(requests)
        seen["answers compared"] += check_some(engine, requests, received, rng)
        del requests, received
        require_idle(engine)
        gauges.read()
    gauges.check()
    for stats in (engine.stats() for engine in engines):
        seen.update(
            {
                "preemptions": stats.preemptions,
                "tokens from the cache": stats.prefix_hits,
                "accepted drafts": stats.accepted_tokens,
            }
        )
    if not all(seen.values()):
        raise Grew(f"engine: the load was too light to show anything: {dict(seen)}")
    return f"engine: {', '.join(f'{number:,} {name}' for name, number in seen.items())}; {gauges}"


def make_engines() -> list[Engine]:
    """With caches that are far too small."""
    model, guesser = ContextBackend(max_positions=160), ContextBackend(max_positions=160, spread=0.5)
    ngram = make_engine(model, 14, batch_tokens=24, sequences=6, speculator=Speculator(NgramDrafter(), adaptive=False))
    draft = Speculator(DraftModel(guesser, 20), adaptive=False)
    return [ngram, make_engine(ContextBackend(max_positions=160), 20, batch_tokens=40, sequences=8, speculator=draft)]


def load_engine(engine: Engine, rng: np.random.Generator) -> tuple[dict[str, Any], dict[tuple[str, int], Received]]:
    """One round: requests that came, and what those that were not aborted were told."""
    requests: dict[str, Any] = {}
    received: dict[tuple[str, int], Received] = {}
    come = 0
    while come < ENGINE_REQUESTS or engine.has_work:
        if come < ENGINE_REQUESTS and rng.random() < 0.5:
            name, prompt, params = f"r{come}", random_prompt(rng), soak_params(rng)
            come += 1
            try:
                engine.add(name, prompt, params)
                requests[name] = prompt, params
            except EngineError:  # too large for the cache
                pass
        if requests and rng.random() < 0.1:
            name = str(rng.choice(list(requests)))
            engine.abort(name)
            del requests[name]
        for output in engine.step():
            received.setdefault((output.request_id, output.choice), Received()).take(output)
    return requests, received


def soak_params(rng: np.random.Generator) -> SamplingParams:
    if rng.random() < 0.05:
        patterns = ("[0-9]{1,5}", "(ab|cd)+", "a{3,9}")
        return SamplingParams(max_tokens=20, grammar=Grammar("regex", str(rng.choice(patterns))))
    return random_params(rng)


def check_some(
    engine: Engine, requests: dict[str, Any], received: dict[tuple[str, int], Received], rng: np.random.Generator
) -> int:
    """Compare a few answers with what the requests alone would get; how many."""
    names = [name for name, (_, params) in requests.items() if params.grammar is None]
    chosen = rng.choice(names, min(3, len(names)), replace=False).tolist() if names else []
    for name in chosen:
        prompt, params = requests[name]
        if received[name, 0].answer != answer(engine.backend, prompt, params):
            raise Grew(f"engine: {prompt} with {params} was answered with other tokens")
    return len(chosen)


def require_idle(engine: Engine) -> None:
    """Raise Grew unless an engine without requests holds nothing of any that it had."""
    try:
        engine.check_idle()
    except EngineError as error:
        raise Grew(f"engine: {error.message}") from None
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) in (Sequence, Sampler, BlockTable)]
    if alive:
        kinds = sorted({type(o).__name__ for o in alive})
        raise Grew(f"engine: {len(alive)} objects of requests that have ended are alive: {', '.join(kinds)}")


def soak_server(seconds: float, seed: int = 0) -> str:
    """Load a server over a fake engine; what was seen. Raises Grew."""
    rng = random.Random(seed)
    with Server("--blocks", 80, "--max-sequences", 8, "--context", 512, "--max-queue", 20, "--delay", 0.001) as server:
        processes = [server.process.pid, *(worker.pid for worker in server.workers())]
        gauges = [Gauges("server" if i == 0 else "worker", pid) for i, pid in enumerate(processes)]
        said: Counter[str] = Counter()
        state = " / ".join
        for _ in turns(seconds, lambda: f"server: {sum(said.values()):,} requests, {state(map(str, gauges))}"):
            load_server(server, rng, said)
            server.http.close()
            server.http = httpx2.Client(base_url=server.url, timeout=120.0, trust_env=False)
            wait_until(server.is_idle, "a server that holds nothing")
            for gauge in gauges:
                gauge.read()
        for gauge in gauges:
            gauge.check()
        workers = [worker.pid for worker in server.workers()]
        if workers != processes[1:] or server.http.get("/health").status_code != 200:
            raise Grew("server: it did not last")
        return f"server: {', '.join(f'{said[name]:,} {name}' for name in sorted(said))}; {state(map(str, gauges))}"


def load_server(server: Server, rng: random.Random, said: Counter[str]) -> None:
    """One round of several clients; `said` counts what became of their requests."""
    lock = threading.Lock()
    jobs = [(rng.choice(list(CLIENT_DEEDS)), rng.randrange(1 << 30)) for _ in range(SERVER_REQUESTS)]
    failures: list[BaseException] = []

    def work() -> None:
        with httpx2.Client(base_url=server.url, timeout=120.0, trust_env=False) as http:
            while True:
                with lock:
                    if not jobs or failures:
                        return
                    name, seed = jobs.pop()
                try:
                    outcome = CLIENT_DEEDS[name](server, http, random.Random(seed))
                except BaseException as failure:
                    failures.append(failure)
                    return
                with lock:
                    said[outcome] += 1

    threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def complete(server: Server, http: httpx2.Client, rng: random.Random) -> str:
    text = "".join(rng.choices("abc ", k=rng.randint(1, 150)))
    response = http.post("/v1/completions", json=long_body(text, rng.randint(1, 60), n=rng.choice([1, 1, 3])))
    return outcome_of(response)


def chat(server: Server, http: httpx2.Client, rng: random.Random) -> str:
    body = chat_body("say:" + "".join(rng.choices("xyz", k=20)), stream=True, max_tokens=30)
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
        if response.status_code == 200 and lines[-1] != "data: [DONE]":
            raise Grew(f"server: a stream ended with {lines[-1]}")
        return outcome_of(response)


def leave_while_it_streams(server: Server, http: httpx2.Client, rng: random.Random) -> str:
    body = long_body("abc", 300, stream=True)
    with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            return outcome_of(response)
        for _, _ in zip(range(rng.randint(0, 20)), response.iter_lines(), strict=False):
            pass
    return "left"


def leave_at_once(server: Server, http: httpx2.Client, rng: random.Random) -> str:
    sock = server.send("/v1/completions", long_body("abc" * rng.randint(1, 40), 300))
    time.sleep(rng.random() * 0.05)
    sock.close()
    return "left"


def ask_for_nonsense(server: Server, http: httpx2.Client, rng: random.Random) -> str:
    bodies = [{"prompt": "x" * 600}, {"max_tokens": -1}, {"temperature": "hot"}, {"model": "none"}, {"n": 10**9}]
    response = http.post("/v1/completions", json={"model": "fake", "prompt": "a", **rng.choice(bodies)})
    if response.status_code not in (400, 404, 429):
        raise Grew(f"server: nonsense was answered with {response.status_code}")
    return outcome_of(response)


CLIENT_DEEDS: dict[str, Callable[[Server, httpx2.Client, random.Random], str]] = {
    deed.__name__: deed for deed in (complete, chat, leave_while_it_streams, leave_at_once, ask_for_nonsense)
}


def outcome_of(response: httpx2.Response) -> str:
    if response.status_code >= 500 and response.status_code != 503:
        raise Grew(f"server: {response.status_code}")
    return {200: "answered", 429: "sent away", 503: "sent away"}.get(response.status_code, "refused")


def turns(seconds: float, state: Callable[[], str]) -> Iterator[int]:
    """Count rounds until the time is over, at least eight; now and then print how it stands."""
    began = told = time.monotonic()
    rounds = 0
    while rounds < 8 or time.monotonic() < began + seconds:
        yield rounds
        rounds += 1
        if time.monotonic() >= told + REPORT_SECONDS:
            told = time.monotonic()
            print(f"{told - began:6.0f} s  {state()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
