"""One run of llmcompressor, in its own environment: MODEL TOKENS.safetensors OUT OPTIONS (JSON).

Options: method (rtn, gptq, awq), bits, group_size, symmetric, threads. GPTQ takes columns by importance with groups in
place and damping 0.01; the head stays in float. Its last line is a JSON object with the seconds of `oneshot` alone.
"""

import json
import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

model_path, tokens_path, out = sys.argv[1:4]
options = json.loads(sys.argv[4])
torch.set_num_threads(options["threads"])
tokens = load_file(tokens_path)["tokens"].long()
rows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
weights = {
    "num_bits": options["bits"],
    "type": "int",
    "symmetric": options["symmetric"],
    "strategy": "group",
    "group_size": options["group_size"],
}
if options["method"] == "gptq":
    weights["actorder"] = "static"
groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
if options["method"] == "rtn":
    recipe = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
elif options["method"] == "gptq":
    recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"], dampening_frac=0.01)
else:
    from llmcompressor.modifiers.awq import AWQModifier

    if not torch.accelerator.is_available():
        # It pins what it keeps, which only makes transfers to an accelerator quicker and fails where there is none.
        torch.Tensor.pin_memory = lambda tensor: tensor
    recipe = AWQModifier(config_groups=groups, ignore=["lm_head"])
data = {} if options["method"] == "rtn" else {
    "dataset": rows, "max_seq_length": tokens.shape[1], "num_calibration_samples": tokens.shape[0]
}  # fmt: skip
tokenizer = AutoTokenizer.from_pretrained(model_path)
# In float32, as its statistics are best; stored in bfloat16, as the model it was made from is.
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
started = time.monotonic()
oneshot(model=model, recipe=recipe, tokenizer=tokenizer, **data)
seconds = time.monotonic() - started
model.to(torch.bfloat16).save_pretrained(out, save_compressed=True)
tokenizer.save_pretrained(out)
print(json.dumps({"seconds": seconds}))
