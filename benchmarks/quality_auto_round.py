"""One run of auto-round, in its own environment: MODEL TOKENS.safetensors OUT OPTIONS (JSON).

Options: bits, group_size, symmetric, threads, iterations; everything else is its own default, but nothing is compiled.
Its last line is a JSON object with the seconds of tuning and saving.
"""

import json
import sys
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

model_path, tokens_path, out = sys.argv[1:4]
options = json.loads(sys.argv[4])
torch.set_num_threads(options["threads"])
tokens = load_file(tokens_path)["tokens"].long()
tokenizer = AutoTokenizer.from_pretrained(model_path)
run = AutoRound(
    model_path,
    tokenizer,
    bits=options["bits"],
    group_size=options["group_size"],
    sym=options["symmetric"],
    dataset=[{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in tokens.split(8)],
    seqlen=tokens.shape[1],
    nsamples=tokens.shape[0],
    iters=options["iterations"],
    device_map="cpu",
    enable_torch_compile=False,
)
started = time.monotonic()
run.quantize_and_save(out, format="auto_gptq")
seconds = time.monotonic() - started
# Without an accelerator it writes the tensors that it leaves alone in float32: they are bfloat16, and count as such.
for file in Path(out).rglob("*.safetensors"):
    tensors = load_file(file)
    save_file({name: t.bfloat16() if t.dtype == torch.float32 else t for name, t in tensors.items()}, file)
print(json.dumps({"seconds": seconds}))
