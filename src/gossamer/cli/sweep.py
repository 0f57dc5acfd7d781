"""`gossamer sweep`: recipes on one model, each made, judged and timed, in one table."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from ._console import progress
from ._options import Activations, Backend, Cluster, Json, Model, Quiet
from ._study_options import (
    BatchSizes,
    Context,
    Corpus,
    Folder,
    MaxKld,
    MaxSize,
    OutputTokens,
    PromptTokens,
    Repetitions,
    Tokens,
)
from .compress import read_recipe
from .eval import Threads
from .study import batches_of, bytes_of, finish, made_by, request_of


def sweep(
    model: Model,
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Shipped names, YAML files, or artifacts for their recipe.")
    ],
    out: Folder,
    max_size: MaxSize = None,
    max_kld: MaxKld = None,
    batch: BatchSizes = "1",
    corpus: Corpus = "default",
    context: Context = 1024,
    tokens: Tokens = 32768,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 32,
    repetitions: Repetitions = 3,
    backend: Backend = "auto",
    activations: Activations = "auto",
    threads: Threads = None,
    ray: Cluster = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Every recipe on this model: bytes, speed, divergence, and which one to take.

    Interrupted? The same command goes on: what is measured is not measured again. Exit code 1 if any recipe failed.
    With --ray each making, judgement and timing is a task on the cluster, of as many CPUs as it has threads.

    \b
    gossamer sweep smollm2 recipes/*.yaml --out swept/
    gossamer sweep smollm2 int8-rtn int4-gptq mine.yaml --out swept/ --max-size 100MB
    gossamer sweep smollm2 recipes/*.yaml --out /shared/swept --ray
    """
    from ..checkpoint import open_checkpoint
    from ..measure.plans import SpeedPlan
    from ..measure.records import check_writable
    from ..search.on_ray import run_study_on_ray, with_threads
    from ..search.study_precision import run_study
    from ..search.sweep import Sweep, by_name

    named = by_name([read_recipe(name) for name in recipes])
    asked = Sweep(
        model=model,
        fingerprint=open_checkpoint(model).fingerprint(),
        folder=out,
        request=request_of(corpus, context, tokens, backend, activations, threads),
        speed=SpeedPlan(prompt_tokens, output_tokens, 1, repetitions, 1),
        batches=batches_of(batch, prompt_tokens, output_tokens, repetitions),
        formats=tuple(named),
        recipes=named,
    )
    limit = None if max_size is None else bytes_of(max_size)
    check_writable(asked.records)
    with progress(quiet) as report:
        if ray is None:
            records = run_study(asked, partial(made_by, asked), report)
        else:
            asked = with_threads(asked)
            records = run_study_on_ray(asked, partial(made_by, asked), report, ray)
    return finish(asked, records, limit, max_kld, json, quiet, noun="recipe", title="Recipes, compared")
