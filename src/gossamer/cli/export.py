"""`gossamer export`: an artifact for another engine, with proof that it reads back as what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ._console import console, emit_json, progress, remark
from ._options import Json, Model, Quiet


def export(
    model: Model,
    to: Annotated[
        str,
        typer.Option("--to", help="gguf, vllm, transformers, gptq, awq, mlc, tensorrt-llm or openvino."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make; for gguf and openvino a .gguf file.")],
    layout: Annotated[
        str | None,
        typer.Option("--layout", help="How the target stores weights: q4_k_m, bf16, gptq_v2, ...; else as they are."),
    ] = None,
    allow_rounding: Annotated[
        bool, typer.Option("--allow-rounding", help="Round weights that the target cannot hold exactly.")
    ] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Read nothing back; the manifest says so.")] = False,
    engine: Annotated[
        Path | None, typer.Option("--engine", help="Python that has the target's engine, to run the result in.")
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option("--llama-cpp", help="Folder with llama-quantize and llama-server; else PATH.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model for another engine, and prove that it reads back as what it is.

    \b
    gossamer export small --to gguf --out small.gguf
    """
    from ..checkpoint import open_checkpoint
    from ..export.base import Options
    from ..export.run import Proving, export

    checkpoint = open_checkpoint(model)
    options = Options(layout, allow_rounding, llama_cpp)
    with progress(quiet) as report:
        record = export(checkpoint, to, out, options, Proving(verify=not no_verify, python=engine), report)
    if json:
        emit_json({"path": str(out), **record})
    elif not quiet:
        _say(out, checkpoint.bits_per_weight(), record)


def _say(out: Path, before: float, record: dict[str, Any]) -> None:
    weights, engine = record["weights"], record["engine"]
    if isinstance(weights, str):
        console().print(f"{out}: {record['target']} ({record['layout']}), {weights}")
        return
    error = weights["max_abs_error"]
    differ = f"largest error {error:.3g} in {weights['max_abs_error_at']}" if error else "all exact"
    console().print(
        f"{out}: {record['target']} ({record['layout']}), {weights['bits_per_weight']:.2f} bits per weight (ours "
        f"{before:.2f}); {weights['tensors']} tensors read back by {weights['reader']}, {differ}"
    )
    if isinstance(engine, str):
        remark(engine)
    else:
        agree = f"{engine['agree']} of {engine['tokens']} greedy tokens are ours"
        console().print(f"{engine['engine']}: {agree}, the others within {engine['max_gap']:.3f} of the logits' spread")
