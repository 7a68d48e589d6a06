"""Training steps on the accelerator that is there, next to PyTorch on the same card.

    python benchmarks/device.py --models smollm2_135m llama3.2_1b --record

SFT, reward-model and DPO steps of models with random weights: AdamW on float32 masters, bfloat16
arithmetic, DPO against cached reference log-probs. Sequences are as long as UltraFeedback's under
SmolLM2's tokenizer (log-normal, median 413 tokens, sigma 0.71), their last two thirds are trained,
and every implementation gets the same ones in each step: packed rows here, padded batches in
PyTorch (transformers with scaled dot-product attention, or FlashAttention where it is installed).
Tokens are counted without padding, model FLOPs by `tests/flops.py`. Each measurement is a
process of its own; one that runs out of memory is told as such.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
from workload import tokenized

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
sys.path.append(str(ROOT / "tests"))  # presets, flops
MEDIAN, SIGMA = 413, 0.71  # tokens of a sequence, and of their logarithm
TRAINED = 2 / 3  # of a sequence's tokens


@dataclass(frozen=True)
class Settings:
    """Measures training steps on this machine's accelerator, or its processor."""

    # presets; tiny_NAME is one in a size for tests
    models: tuple[str, ...] = ("smollm2_135m", "llama3.2_1b", "llama3.2_3b", "llama3_8b")
    stages: tuple[str, ...] = ("sft", "rm", "dpo")
    frameworks: tuple[str, ...] = ("alignjax", "torch")
    row_length: int = 2048  # tokens of a packed row, and the most of a sequence or a pair
    rows: int = 16  # packed rows that a step has about
    rows_per_device: int = 4  # packed rows of a micro-batch; PyTorch's has about as many tokens
    remat: str = "full"  # what the backward pass makes again: full, dots or none
    attention: str = "auto"  # alignjax's kernel
    steps: int = 6  # measured, after two that are not
    json: str = ""  # file for the numbers
    record: bool = False  # add the table to benchmarks/RESULTS.md
    only: tuple[str, ...] = ()  # framework, stage and model: one measurement, printed as JSON


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, config=(tyro.conf.FlagCreatePairsOff,))
    if settings.only:
        framework, stage, model = settings.only
        measured = {"alignjax": alignjax_steps, "torch": torch_steps}[framework]
        print(json.dumps(measured(settings, stage, model)))
        return
    found = []
    for model in settings.models:
        for stage in settings.stages:
            for framework in settings.frameworks:
                one = {"model": model, "stage": stage, "framework": framework}
                found.append(one | child(settings, framework, stage, model))
                print(row(found[-1]), file=sys.stderr, flush=True)
    text = report(settings, found)
    print(text)
    if settings.json:
        Path(settings.json).write_text(json.dumps(found, indent=2))
    if settings.record:
        RESULTS.write_text(RESULTS.read_text().rstrip() + f"\n\n{text}")


def child(settings: Settings, *only: str) -> dict:
    """One measurement in a process of its own; `{"problem": ...}` where it fails."""
    command = [sys.executable, __file__, "--only", *only]
    for name in ("row_length", "rows", "rows_per_device", "remat", "attention", "steps"):
        command += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = done.stderr
    if "RESOURCE_EXHAUSTED" in said or "OutOfMemoryError" in said:
        return {"problem": "out of memory"}
    lines = [line for line in said.splitlines() if line.strip()] or [f"exit {done.returncode}"]
    return {"problem": lines[-1][:200]}


@dataclass(frozen=True)
class Work:
    """What every implementation trains on: sequences of each step, two of a pair together."""

    lengths: np.ndarray  # int [items, sides]
    items: list[np.ndarray]  # of each step

    def trained(self, items: np.ndarray) -> np.ndarray:
        return np.ceil(self.lengths[items] * TRAINED).astype(int)

    def flops(self, model, step: int) -> float:
        """Of a step; a reward model's head sees the last token of a sequence alone."""
        from flops import training_flops

        items = self.items[step]
        lengths = self.lengths[items].ravel()
        heads = np.ones_like(lengths) if model.scored else self.trained(items).ravel()
        return training_flops(model, lengths, heads)

    def tokens(self, step: int) -> int:
        return int(self.lengths[self.items[step]].sum())


def work_of(settings: Settings, stage: str):
    """The sequences, and the plan that packs them."""
    from alignjax.config import Batch
    from alignjax.data.packing import plan_training
    from alignjax.data.rows import sides_of

    sides = sides_of(stage)
    most = settings.row_length // sides
    rng = np.random.default_rng(0)
    steps = settings.steps + 2
    fit = steps * settings.rows * settings.row_length // 16  # more than will fit
    lengths = rng.lognormal(np.log(MEDIAN), SIGMA, (fit, sides)).clip(16, most).astype(int)
    enough = np.cumsum(lengths.sum(1)) < 2 * steps * settings.rows * settings.row_length
    lengths = lengths[enough]
    batch = Batch(rows=settings.rows, row_length=settings.row_length, max_steps=steps)
    plan = plan_training(lengths.sum(1), batch, 0)
    return Work(lengths, [plan.step_items(step) for step in range(steps)]), plan


def model_of(name: str, stage: str):
    """Sizes of a preset; a reward model's for that stage."""
    from presets import preset

    return replace(preset(name), scored=stage == "rm")


def alignjax_steps(settings: Settings, stage: str, name: str) -> dict:
    import jax

    from alignjax import config as configs
    from alignjax import optim
    from alignjax.data.batches import packed_steps
    from alignjax.models import decoder
    from alignjax.sharding import axis_size, local_rows, place_rows, use_mesh
    from alignjax.stages import stage_of
    from alignjax.step import init_state, train_step

    use_mesh()
    model, (work, plan) = model_of(name, stage), work_of(settings, stage)
    items, sides = work.lengths.shape
    prompts = work.lengths - work.trained(np.arange(items))
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, work.lengths.sum())
    data = tokenized(tokens, work.lengths, prompts)
    rows = settings.rows_per_device * axis_size("batch")
    ref = np.zeros((items, sides), np.float32)
    steps = packed_steps(data, plan, rows, ref, local_rows(rows))
    compute = configs.Compute(dtype="bfloat16", remat=settings.remat, attention=settings.attention)
    config = {"sft": configs.SFT, "rm": configs.RM, "dpo": configs.DPO}[stage](compute=compute)
    tx = optim.optimizer(config.optimizer, len(plan))
    state = init_state(decoder.init(model, jax.random.key(0)), tx)
    static = {"stage": stage_of(config), "compute": compute, "tx": tx}
    seconds, step = [], None
    for number in range(len(plan)):
        batch = place_rows(steps[number], rows)
        arguments = (state, batch, np.int32(steps.micro_batches(number)), np.int32(number))
        if step is None:
            started = time.perf_counter()
            step = train_step.lower(*arguments, **static).compile()
            compiling = time.perf_counter() - started
        jax.block_until_ready(batch)
        started = time.perf_counter()
        state, metrics = step(*arguments)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - started)
    assert np.isfinite(loss)
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    kind = device.device_kind if device.platform != "cpu" else "CPU"
    return result(settings, work, model, seconds, kind, jax.device_count(), memory) | {
        "compile_seconds": compiling,
        "versions": {"jax": jax.__version__},
    }


def torch_steps(settings: Settings, stage: str, name: str) -> dict:
    import importlib.util

    import torch
    import transformers

    from alignjax.models.families import to_hf

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    config, (work, _) = model_of(name, stage), work_of(settings, stage)
    flash = device == "cuda" and importlib.util.find_spec("flash_attn")
    hf = to_hf(config)
    kind = transformers.CONFIG_MAPPING[hf.pop("model_type")]
    with torch.device(device):
        auto = transformers.AutoModel if config.scored else transformers.AutoModelForCausalLM
        model = auto.from_config(
            kind(**hf), attn_implementation="flash_attention_2" if flash else "sdpa"
        ).float()
        if config.scored:
            model.score = torch.nn.Linear(config.hidden_size, 1, bias=False)
    model.config.use_cache = False
    if settings.remat != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, (0.9, 0.95), fused=True)
    generator = torch.Generator(device).manual_seed(0)
    sides = work.lengths.shape[1]
    room = settings.rows_per_device * settings.row_length  # tokens of a micro-batch, with padding
    model.train()

    def loss_of(lengths, trained) -> torch.Tensor:
        """Summed loss of a padded micro-batch, [items, sides] flattened."""
        ends = torch.as_tensor(lengths.ravel(), device=device)
        begins = ends - torch.as_tensor(trained.ravel(), device=device)
        shape = (lengths.size, int(lengths.max()))
        tokens = torch.randint(config.vocab_size, shape, device=device, generator=generator)
        places = torch.arange(shape[1], device=device)
        mask = (places < ends[:, None]).long()
        if config.scored:
            with torch.autocast(device, torch.bfloat16):
                hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
            rewards = model.score(hidden[torch.arange(len(ends)), ends - 1].float()).view(-1, 2)
            return -torch.nn.functional.logsigmoid(rewards[:, 0] - rewards[:, 1]).sum()
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
        counts = (places >= begins[:, None]) & (places < ends[:, None])
        logps = -torch.nn.functional.cross_entropy(
            logits.transpose(1, 2).float(), tokens[:, 1:], reduction="none"
        )
        sums = (logps * counts[:, 1:]).sum(1)
        if sides == 1:
            return -sums.sum()
        margin = sums.view(-1, 2)
        return -torch.nn.functional.logsigmoid(0.1 * (margin[:, 0] - margin[:, 1])).sum()

    seconds = []
    for items in work.items:
        lengths, trained = work.lengths[items], work.trained(items)
        count = len(items) if sides == 2 else trained.sum()
        groups, start = [], 0
        for end in range(1, len(items) + 1):  # as many as have room when they are padded
            wider = lengths[start : end + 1]
            if end == len(items) or wider.size * wider.max() > room:
                groups.append(slice(start, end))
                start = end
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for group in groups:
            (loss_of(lengths[group], trained[group]) / int(count)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return result(settings, work, config, seconds, name, 1, memory) | {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "attention": "FlashAttention" if flash else "SDPA",
    }


def result(settings, work: Work, config, seconds, device: str, devices: int, memory) -> dict:
    from flops import peak

    steps = range(2, len(seconds))
    spent = sum(seconds[i] for i in steps)
    rate = sum(work.flops(config, i) for i in steps) / spent / devices
    best = peak(device)
    return {
        "device": device,
        "devices": devices,
        "seconds": seconds,
        "tokens_per_second": sum(work.tokens(i) for i in steps) / spent,
        "tflops": rate / 1e12,
        "mfu": rate / best if best else None,
        "memory_bytes": memory,
    }


def row(one: dict) -> str:
    start = f"| {one['model']} | {one['stage']} | {one['framework']} |"
    if "problem" in one:
        return f"{start} {one['problem']} | | | |"
    mfu = "" if one["mfu"] is None else f"{one['mfu']:.1%}"
    memory = "" if one["memory_bytes"] is None else f"{one['memory_bytes'] / 2**30:.1f}"
    return f"{start} {one['tokens_per_second']:,.0f} | {one['tflops']:.2f} | {mfu} | {memory} |"


def report(settings: Settings, found: list[dict]) -> str:
    done = [one for one in found if "problem" not in one]
    versions = {name: v for one in done for name, v in one["versions"].items()}
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    devices = " and ".join({f"{one['devices']} x {one['device']}": 0 for one in done})
    lines = [
        f"## {devices or 'no measurement'}, {date.today()}",
        "",
        f"Commit {commit}; {', '.join(f'{name} {v}' for name, v in versions.items())}; rows of "
        f"{settings.row_length} tokens, {settings.rows} a step, {settings.rows_per_device} a "
        f"micro-batch; remat {settings.remat}; {settings.steps} steps.",
        "",
        "| model | stage | | useful tokens/s | model TFLOP/s a device | MFU | peak GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *map(row, found),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
