"""One run of GPTQModel, in its own environment: MODEL TOKENS.safetensors OUT OPTIONS (JSON).

Options: bits, group_size, symmetric, threads; everything else is its own default. Its last line is a JSON object with
the seconds of `quantize` alone.
"""

import json
import os
import sys
import time

# Its loader takes two of these workers and refuses to start on machines where it allots fewer.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file

model_path, tokens_path, out = sys.argv[1:4]
options = json.loads(sys.argv[4])
torch.set_num_threads(options["threads"])
tokens = load_file(tokens_path)["tokens"].long()
config = QuantizeConfig(bits=options["bits"], group_size=options["group_size"], sym=options["symmetric"])
model = GPTQModel.load(model_path, config, device="cpu")
rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens]
started = time.monotonic()
model.quantize(rows, batch_size=1)
seconds = time.monotonic() - started
model.save(out)
print(json.dumps({"seconds": seconds}))
