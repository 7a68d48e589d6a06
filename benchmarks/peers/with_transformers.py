"""ExPO as the paper's code does it: both models whole in memory, one parameter after the other.

Run by `benchmarks/expo.py` in an environment made from mergekit.txt:
`python with_transformers.py WEAK STRONG ALPHA OUT`.
"""

import sys

import torch
from transformers import AutoModelForCausalLM

weak, strong, alpha, out = sys.argv[1:]
models = [AutoModelForCausalLM.from_pretrained(one, dtype=torch.bfloat16) for one in (weak, strong)]
sft = dict(models[0].named_parameters())
with torch.no_grad():
    for name, theta in models[1].named_parameters():
        theta.add_(theta - sft[name], alpha=float(alpha))
models[1].save_pretrained(out, max_shard_size="1GB")
