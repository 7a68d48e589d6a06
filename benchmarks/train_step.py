"""Training steps of a small Llama on the processors of this machine: useful tokens a second.

    python benchmarks/train_step.py --stage sft|rm|dpo [--json] [--profile]

The model, the lengths and the tokens are those of workload.py; float32, AdamW, DPO against a cached
reference. A step is 64 pairs, or 64 rows of 512 tokens (sft), packed as a run packs them, in rows
of 512 tokens, or of 1,024 where a row holds pairs. Its tokens count without padding, those of
a prompt with each side. There are as many CPU devices as cores, each with a row of its own, as
`JAX_NUM_CPU_DEVICES=2` and `--mesh.replica=2` have it in a run. Compiling and the first steps are
left out; batches are made while steps run. `--profile` tells which files of the library the time
goes to; `benchmarks/peers/compare.py` sets the rate beside that of other libraries.
"""

import json
import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
import workload
from breakdown import shares

from alignjax import config as configs
from alignjax import optim
from alignjax.data.batches import PackedSteps, packed_steps
from alignjax.data.packing import plan_training
from alignjax.models import decoder
from alignjax.sharding import axis_size, local_rows, place_rows, use_mesh
from alignjax.stages import stage_of
from alignjax.step import init_state, train_step

CONFIGS = {"sft": configs.SFT, "rm": configs.RM, "dpo": configs.DPO}


def steps_of(options) -> PackedSteps:
    data = workload.token_set(options.stage)
    sides = data.sides
    per_step = {"rows": options.items} if options.stage == "sft" else {"pairs": options.items}
    batch = configs.Batch(
        **per_step,
        row_length=workload.LENGTH * sides,
        epochs=1 + (options.warmup + options.steps) * options.items // len(data),
        max_steps=options.warmup + options.steps,
    )
    plan = plan_training(data.lengths(), batch, options.seed)
    rows = options.rows_per_device * axis_size("batch")
    ref = np.zeros((len(data), sides), np.float32)
    return packed_steps(data, plan, rows, ref, local_rows(rows))


def main() -> None:
    parser = workload.parser(__doc__, CONFIGS, 3)
    parser.add_argument("--devices", type=int, default=os.cpu_count(), help="CPU devices")
    parser.add_argument("--rows-per-device", type=int, default=1, help="of a micro-batch")
    parser.add_argument("--profile", action="store_true", help="shares of the time, by file")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    use_mesh(replica=options.devices)
    steps = steps_of(options)
    compute = configs.Compute(dtype="float32", remat="none")
    config = CONFIGS[options.stage](compute=compute)
    stage, tx = stage_of(config), optim.optimizer(config.optimizer, len(steps))
    state = init_state(decoder.init(workload.model(options.stage), jax.random.key(0)), tx)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.model))
    batches = steps.read()
    batch = place_rows(next(batches), steps.rows)
    step = train_step.lower(
        state, batch, np.int32(1), np.int32(0), stage=stage, compute=compute, tx=tx
    ).compile()
    ends = []
    with tempfile.TemporaryDirectory() as traced:
        with jax.profiler.trace(traced) if options.profile else nullcontext():
            for number in range(len(steps)):
                micro = np.int32(steps.micro_batches(number))
                state, metrics = step(state, batch, micro, np.int32(number))
                if number + 1 < len(steps):
                    batch = place_rows(next(batches), steps.rows)
                assert np.isfinite(float(metrics["loss"]))
                ends.append(time.perf_counter())
        profile = shares(Path(traced), step.as_text()) if options.profile else {}
    useful = steps.useful_tokens()[options.warmup :]
    rows = np.diff(steps.plan.steps)[options.warmup :]
    found = {
        "library": "alignjax",
        "stage": options.stage,
        "tokens_per_second": useful.sum() / (ends[-1] - ends[options.warmup - 1]),
        "tokens_per_step": useful.mean(),
        "fill": useful.sum() / (rows.sum() * steps.plan.row_length),
        "parameters": parameters,
    }
    if options.json:
        print(json.dumps(found | ({"profile": profile} if profile else {})))
        return
    print(f"{found['tokens_per_second']:.0f} tokens/s, rows {found['fill']:.1%} full")
    for name, share in profile.items():
        print(f"{share:6.1%} {name}")


if __name__ == "__main__":
    main()
