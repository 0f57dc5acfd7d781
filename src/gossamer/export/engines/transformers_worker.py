"""transformers answers prompts greedily, in float32; see __init__.py for what comes in and goes out."""

from __future__ import annotations

import json
import sys

import torch
import transformers


def main() -> None:
    request = json.load(sys.stdin)
    model = transformers.AutoModelForCausalLM.from_pretrained(request["path"], dtype=torch.float32).eval()
    answers = []
    for prompt in request["prompts"]:
        ids = list(prompt)
        for _ in range(request["tokens"]):
            with torch.inference_mode():
                logits = model(torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    print("\n" + json.dumps({"version": transformers.__version__, "tokens": answers}))


if __name__ == "__main__":
    main()
