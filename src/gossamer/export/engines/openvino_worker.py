"""openvino-genai answers prompts greedily; see __init__.py for what comes in and goes out."""

from __future__ import annotations

import importlib.metadata
import json
import sys

import numpy as np
import openvino as ov
import openvino_genai as genai


def main() -> None:
    request = json.load(sys.stdin)
    pipeline = genai.LLMPipeline(request["path"], "CPU", INFERENCE_NUM_THREADS=1)
    answers = []
    for prompt in request["prompts"]:
        ids = ov.Tensor(np.array([prompt], np.int64))
        found = pipeline.generate(ids, max_new_tokens=request["tokens"], do_sample=False, ignore_eos=True)
        answers.append([int(token) for token in found.tokens[0]])
    print("\n" + json.dumps({"version": importlib.metadata.version("openvino-genai"), "tokens": answers}))


if __name__ == "__main__":
    main()
