"""GPTQModel answers prompts greedily; see __init__.py for what comes in and goes out."""

from __future__ import annotations

import importlib.metadata
import json
import sys

import torch
from gptqmodel import BACKEND, GPTQModel


def main() -> None:
    request = json.load(sys.stdin)
    model = GPTQModel.load(request["path"], device="cpu", dtype=torch.float32, backend=BACKEND.AUTO)
    answers = []
    for prompt in request["prompts"]:
        ids = list(prompt)
        for _ in range(request["tokens"]):
            with torch.inference_mode():
                logits = model.model(torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    print("\n" + json.dumps({"version": importlib.metadata.version("gptqmodel"), "tokens": answers}))


if __name__ == "__main__":
    main()
