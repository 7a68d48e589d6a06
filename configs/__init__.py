"""Run configs, loaded by name by `alignjax.config`: a file for each run, or for each paper's runs.

A run for many devices names its mesh, whose axes also fit a torus of TPU v5p, 2x2x2 or 4x4x4. A
device, with 80 GB or more (an H100, a TPU v5p), holds
- 20 bytes of each parameter in its part of the weights, split over fsdp x tensor: float32 weights,
  two moments, the gradients summed so far and those of a micro-batch;
- with remat=full, the bfloat16 input of each layer: 2 x layers x hidden size x tokens of its rows;
- what one layer and the head make of those rows.
Llama-2 70B with fsdp=16 and tensor=4: 21.6 GB, and 10.7 GB for a row of 8192. tests/test_configs.py
computes the first two for every config, and lowers its step on its mesh. XLA's plan for TPU v5p has
in all 68 GB for tulu2_70b_dpo, 54 GB for xwin_dpo_13b and 47 GB for xwin_rm_70b; none has been run.
"""
