"""Peak memory of compressing a model with a billion parameters: RTN and GPTQ, above the bare process.

    python benchmarks/compress_memory.py [--work runs/memory]

Each run is a process of its own; its peak is the operating system's figure (ru_maxrss), and so is the bare process's,
which imports all that a compression imports and leaves. What `gossamer plan` expected stands beside it. Ends with one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
BARE = "import torch, gossamer.compress.pipeline, gossamer.checkpoint; torch.ones(512, 512) @ torch.ones(512, 512)"
LIMITS = {"int4-rtn": 1.2e9, "int4-gptq": 2.5e9}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/memory"))
    work: Path = parser.parse_args().work
    model, text = work / "random-1b", work / "calibration.txt"
    if not (model / "model.safetensors").exists():
        run([str(HERE / "make_random_llama.py"), str(model)])
    text.write_text("\n".join(pydoc_data.topics.topics.values()))
    bare, _ = run(["-c", BARE])
    print(f"bare process: {bare / 1e9:.2f} GB")
    rows = []
    for recipe, limit in LIMITS.items():
        out = work / recipe
        shutil.rmtree(out, ignore_errors=True)
        words = [str(model), "--recipe", recipe, *(["--calibration", str(text)] if "gptq" in recipe else [])]
        planned = plan(words)
        peak, seconds = run(["-m", "gossamer", "compress", *words, "--out", str(out), "--quiet"])
        rows.append(
            {
                "recipe": recipe,
                "above_bare_bytes": peak - bare,
                "peak_bytes": peak,
                "planned_peak_bytes": planned,
                "limit_bytes": limit,
                "seconds": seconds,
            }
        )
        print(
            f"{recipe}: {(peak - bare) / 1e9:.2f} GB above the bare process (wanted under {limit / 1e9}), "
            f"peak {peak / 1e9:.2f} GB (planned {planned / 1e9:.2f}), {seconds:.0f} s",
            flush=True,
        )
    print(json.dumps({"benchmark": "compress_memory", "bare_bytes": bare, "rows": rows}))
    return int(any(r["above_bare_bytes"] > r["limit_bytes"] for r in rows))


def plan(words: list[str]) -> int:
    """The peak that `gossamer plan` expects, in bytes."""
    command = [sys.executable, "-m", "gossamer", "plan", *words, "--json"]
    return int(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["compress_peak_bytes"])


def run(words: list[str]) -> tuple[int, float]:
    """Run this Python with these arguments; its peak resident bytes and seconds. Leaves if it fails."""
    started = time.monotonic()
    pid = os.posix_spawn(sys.executable, [sys.executable, *words], os.environ)
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"{words} failed: {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024, time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
