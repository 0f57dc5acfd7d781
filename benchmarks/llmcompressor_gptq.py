"""One GPTQ run of llmcompressor, in its own environment: MODEL TOKENS.safetensors OUT BITS GROUP_SIZE.

The settings of our `int4-gptq`: symmetric, groups, columns in order of importance with groups in place, damping 0.01,
head left in float, calibrated on exactly the tokens given. Prints the seconds of `oneshot` alone as its last line.
"""

import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

model_path, tokens_path, out, bits, group_size = sys.argv[1:6]
torch.set_num_threads(2)
tokens = load_file(tokens_path)["tokens"].long()
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
weights = {
    "num_bits": int(bits),
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": int(group_size),
    "actorder": "static",
}
recipe = GPTQModifier(
    config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"], dampening_frac=0.01
)
started = time.monotonic()
oneshot(
    model=model,
    dataset=rows,
    recipe=recipe,
    max_seq_length=tokens.shape[1],
    num_calibration_samples=tokens.shape[0],
    tokenizer=AutoTokenizer.from_pretrained(model_path),
)
seconds = time.monotonic() - started
model.save_pretrained(out, save_compressed=True)
AutoTokenizer.from_pretrained(model_path).save_pretrained(out)
print(seconds)
