"""Compiles the real training step, and attention, for eight TPU v5p that are not there.

    python tests/lowering.py STAGE FSDP TENSOR DTYPE DIRECTORY
    python tests/lowering.py HEAD_SIZE WINDOW LENGTH

In processes of their own: libtpu reads its environment when it is loaded. `program` ends its
process as soon as XLA has written the optimised step, before a minute of code generation.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from presets import PRESETS

from alignjax.config import Training
from alignjax.models.shapes import DecoderConfig

CONFIG = replace(
    PRESETS["llama2_7b"], hidden_size=2048, layers=2, heads=16, kv_heads=4, mlp_size=5632
)
LENGTH = 2048  # tokens of a row, one for each data-parallel device
LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}


def program(stage: str, fsdp: int, tensor: int, dtype: str, directory: Path) -> str:
    """The optimised program of one training step, as text."""
    import compiled

    directory.mkdir()
    log = directory / "log"
    arguments = [sys.executable, __file__, stage, str(fsdp), str(tensor), dtype, str(directory)]
    with log.open("w") as out:
        child = subprocess.Popen(arguments, stdout=out, stderr=out, env={**os.environ, **LIBTPU})
        try:
            last = 0
            while child.poll() is None:
                sizes = [f.stat().st_size for f in directory.glob("*after_optimizations.txt")]
                if sizes and sizes[0] == last:
                    break
                last = sizes[0] if sizes else 0
                time.sleep(1)
        finally:
            child.kill()
            child.wait()
    if not list(directory.glob("*after_optimizations.txt")):
        raise RuntimeError(log.read_text())
    return compiled.dumped(directory, "train_step")


def compile_attention(size: int, window: int, length: int) -> None:
    """Splash attention all the way to machine code, forward and backward."""
    arguments = [sys.executable, __file__, str(size), str(window), str(length)]
    env = {**os.environ, **LIBTPU}
    subprocess.run(arguments, env=env, check=True, capture_output=True, text=True)


def attention_step(size: int, window: int, length: int) -> None:
    import jax
    import jax.numpy as jnp

    from alignjax.models.attention import attention
    from alignjax.sharding import spec

    tpu_mesh(4, 2)

    def array(*shape, dtype=jnp.bfloat16):
        rows = spec("batch", None, "kv_heads")[: len(shape)]
        sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P(*rows))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def loss(q, k, v, ids):
        out = attention(q, k, v, ids, ids, window=window or None, kernel="auto")
        return out.astype(jnp.float32).sum()

    keys = array(4, length, 2, size)
    ids = array(4, length, dtype=jnp.int32)
    step = jax.jit(jax.grad(loss, (0, 1, 2)))
    program = step.lower(array(4, length, 2, 3, size), keys, keys, ids).compile()
    assert "splash_mha_dkv_segmented" in program.as_text()


def tpu_mesh(fsdp: int, tensor: int) -> None:
    import jax
    from jax.experimental import topologies

    from alignjax import sharding

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2").devices
    jax.set_mesh(jax.make_mesh((1, fsdp, tensor), sharding.AXES, devices=chips))


def traced(config: Training, c: DecoderConfig, resolve: Callable = lambda shapes: shapes):
    """The training step of a config for a model of such sizes, on the mesh in use, to be lowered.

    `resolve` puts abstract arrays on the devices of the mesh, where it has any.
    """
    import jax
    import jax.numpy as jnp

    from alignjax import optim, sharding
    from alignjax.data.batches import PackedBatch
    from alignjax.data.rows import sides_of
    from alignjax.models import decoder
    from alignjax.stages import stage_of
    from alignjax.step import State, train_step

    stage, tx = stage_of(config), optim.optimizer(config.optimizer, 100)
    state = jax.eval_shape(
        lambda model: State(model, tx.init(model), jnp.zeros((), jnp.int32)),
        resolve(decoder.abstract(replace(c, scored=stage.name == "rm"))),
    )
    mesh = jax.sharding.get_abstract_mesh()
    split = jax.sharding.NamedSharding(mesh, sharding.spec(None, "batch"))
    rows = config.batch.rows_per_device * sharding.axis_size("batch")

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((1, rows, *shape), dtype, sharding=split)

    sides = sides_of(stage.name)
    tokens = [array(config.batch.row_length) for _ in range(4)]
    items = (array(8, sides, dtype=jnp.float32), *(array(8, dtype=jnp.float32) for _ in range(2)))
    batch = PackedBatch(*tokens, array(8), *items, array(8, sides))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = (*resolve((state, batch)), number, number)
    return train_step.trace(*arguments, stage=stage, compute=config.compute, tx=tx)


def training_step(stage: str, fsdp: int, tensor: int, dtype: str, directory: Path) -> None:
    import compiled
    import jax

    from alignjax import sharding
    from alignjax.config import DPO, RM, SFT, Batch, Compute

    if dtype == "float32":  # or XLA rounds what it multiplies to bfloat16, and sends it so
        jax.config.update("jax_default_matmul_precision", "highest")
    tpu_mesh(fsdp, tensor)
    kind = {"dpo": DPO, "rm": RM, "sft": SFT}[stage]
    config = kind(compute=Compute(dtype=dtype), batch=Batch(row_length=LENGTH))
    traced(config, CONFIG, sharding.concrete).lower().compile(
        compiler_options=compiled.dump_options(directory)
    )


if __name__ == "__main__":
    if len(sys.argv) == 4:
        attention_step(*(int(argument) for argument in sys.argv[1:]))
    else:
        stage, fsdp, tensor, dtype, directory = sys.argv[1:]
        training_step(stage, int(fsdp), int(tensor), dtype, Path(directory))
