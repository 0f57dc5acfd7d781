"""EleutherAI's lm-eval against a running server, on tasks made from local text: no data set is fetched.

    gossamer serve small/ --port 8000 &
    python benchmarks/serve_lm_eval.py http://127.0.0.1:8000 --tokenizer small/

Three tasks over passages of the text: `local_words`, the log-likelihood of a passage (perplexity); `local_choice`,
which of four passages goes on from a beginning (accuracy); `local_copy`, a passage to be written once more (exact
match). They ask everything of /v1/completions that lm-eval's tasks ask: prompts as token ids, echo, logprobs, stop
texts. lm-eval gets an environment of its own below the cache. Progress goes to stderr, one JSON line to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import peers
from gossamer.errors import GossamerError
from gossamer.measure.corpus import load_corpus
from gossamer.measure.load.target import root_of

TASKS = ("local_words", "local_choice", "local_copy")
SECONDS = 3600.0
DATA = """dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
num_fewshot: 0
"""
WORDS = """task: local_words
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{passage}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
CHOICE = """task: local_choice
output_type: multiple_choice
doc_to_text: "{{beginning}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{right}}"
target_delimiter: " "
metric_list:
  - metric: acc
"""
COPY = """task: local_copy
output_type: generate_until
doc_to_text: "{{passage}}\\n\\n{{passage}}\\n\\n{{beginning}}"
doc_to_target: "{{ending}}"
target_delimiter: " "
generation_kwargs:
  until: ["\\n\\n", "\\n"]
  max_gen_toks: 48
  temperature: 0
filter_list:
  - name: stripped
    filter:
      - function: remove_whitespace
      - function: take_first
metric_list:
  - metric: exact_match
"""


def main() -> int:
    args = parse_arguments()
    try:
        root = root_of(args.url)
        model = args.model or only_model(root, args.api_key)
        passages = passages_of(load_corpus(args.corpus).text, args.passages, args.seed)
        with tempfile.TemporaryDirectory(prefix="gossamer-lm-eval-") as folder:
            write_task(Path(folder), passages, args.seed)
            found = run(root, model, Path(folder), args)
    except (GossamerError, subprocess.SubprocessError, OSError, ValueError) as error:
        print(f"error: {getattr(error, 'stderr', None) or error}", file=sys.stderr)
        return 1
    print(json.dumps({"benchmark": "serve_lm_eval", "url": root, "model": model, "lm_eval": peers.LM_EVAL, **found}))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="the server, such as http://127.0.0.1:8000")
    parser.add_argument("--tokenizer", required=True, help="folder of the model, for its tokenizer; read locally")
    parser.add_argument("--model", help="which model (default: the only one served)")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument("--corpus", default="default", help="text that the tasks are made from, as for eval")
    parser.add_argument("--passages", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=4)
    return parser.parse_args()


def only_model(root: str, key: str | None) -> str:
    """The model that a server serves. Raises ValueError if there are several, OSError if it does not answer."""
    request = urllib.request.Request(f"{root}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=30) as response:
        names = [entry["id"] for entry in json.load(response)["data"]]
    if len(names) != 1:
        raise ValueError(f"{root} serves {', '.join(names)}: --model says which one is meant")
    return str(names[0])


def passages_of(text: str, count: int, seed: int) -> list[str]:
    """Paragraphs of 20 to 60 words, each on one line. Raises ValueError if the text has fewer than four."""
    flat = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    good = sorted({part for part in flat if 20 <= len(part.split()) <= 60})
    if len(good) < 4:
        raise ValueError("the text has fewer than four paragraphs of 20 to 60 words")
    return random.Random(seed).sample(good, min(count, len(good)))


def write_task(folder: Path, passages: list[str], seed: int) -> None:
    """Three task files and the data that they read."""
    dice, halves = random.Random(seed), [_halved(passage) for passage in passages]
    lines = []
    for passage, (beginning, ending) in zip(passages, halves, strict=True):
        others = dice.sample([other for _, other in halves if other != ending], 3)
        endings = [*others, ending]
        dice.shuffle(endings)
        document = {"passage": passage, "beginning": beginning, "ending": ending}
        lines.append(json.dumps({**document, "endings": endings, "right": endings.index(ending)}))
    data = folder / "passages.jsonl"
    data.write_text("".join(line + "\n" for line in lines))
    for name, task in zip(TASKS, (WORDS, CHOICE, COPY), strict=True):
        (folder / f"{name}.yaml").write_text(task + DATA.format(data=json.dumps(str(data))))


def _halved(passage: str) -> tuple[str, str]:
    words = passage.split()
    middle = len(words) * 2 // 3
    return " ".join(words[:middle]), " ".join(words[middle:])


def run(root: str, model: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Scores by task. Raises CalledProcessError with what lm-eval said last."""
    python = peers.python_of("lm-eval")
    tokenizer = str(Path(args.tokenizer).resolve())
    options = {"base_url": f"{root}/v1/completions", "tokenizer_backend": "huggingface", "tokenizer": tokenizer}
    options |= {"num_concurrent": args.concurrency, "max_retries": 3, "tokenized_requests": True, "model": model}
    words = ["--model", "local-completions", "--model_args", ",".join(f"{k}={v}" for k, v in options.items())]
    words += ["--tasks", ",".join(TASKS), "--include_path", str(folder), "--output_path", str(folder / "out")]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "OPENAI_API_KEY": args.api_key or "",
    }
    done = subprocess.run(
        [str(python), "-m", "lm_eval", *words], env=environment, timeout=SECONDS, stdout=sys.stderr, check=False
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, "lm_eval", stderr="lm-eval failed; see above")
    return read_scores(folder / "out")


def read_scores(folder: Path) -> dict[str, Any]:
    """Metric by metric of each task, out of the newest file that lm-eval wrote. Raises ValueError if there is none."""
    files = sorted(folder.rglob("results_*.json"))
    if not files:
        raise ValueError("lm-eval wrote no results")
    written = json.loads(files[-1].read_text())
    scores = {
        task: {name.split(",")[0]: value for name, value in found.items() if isinstance(value, float)}
        for task, found in written["results"].items()
    }
    return {"scores": scores, "passages": written.get("n-samples", {})}


if __name__ == "__main__":
    sys.exit(main())
