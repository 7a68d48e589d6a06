"""Attention by kernels that come with JAX: splash on TPU, Triton on GPU.

Both live in jax.experimental, where a release of JAX may move them: this is the only file that
knows them, each is imported where it is used, and a test names the releases that they were tried
with. On CPU both are interpreted.

B batch, T position, N key/value heads, G query heads each serves, H = N G, K head size.
"""

import warnings

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from alignjax.sharding import spec

TRIED = ("0.10.2", "0.12.0.1")  # releases of JAX
STEP = 128  # tokens; rows are filled up to a multiple, which the kernels' blocks divide


def platform() -> str:
    """What the mesh in use is made of: "cpu", "gpu" or "tpu", devices to compile for included."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def splash(
    q_BTNGK: jax.Array,
    k_BTNK: jax.Array,
    v_BTNK: jax.Array,
    segments_BT: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Causal attention inside segments on TPU, [B, T, N, G, K]; takes arguments as `attention`."""

    def local(q_BTHK, k_BTNK, v_BTNK, segments_BT):
        kernel = _splash(q_BTHK.shape[1], q_BTHK.shape[2], window)
        heads_first = [
            x.swapaxes(1, 2) for x in (q_BTHK * q_BTHK.shape[-1] ** -0.5, k_BTNK, v_BTNK)
        ]
        return jax.vmap(kernel)(*heads_first, segments_BT).swapaxes(1, 2)

    return _on_each_device(local, q_BTNGK, k_BTNK, v_BTNK, segments_BT)


def _splash(length: int, heads: int, window: int | None):
    """The kernel for a row, `(q [H, T, K], k [N, T, K], v, segments [T])`.

    Blocks that the causal mask or the window hides from every query are never met.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as tpu

    mask = tpu.CausalMask((length, length))
    if window is not None:
        mask = tpu.LocalMask((length, length), (window - 1, 0), 0)
    block = next(size for size in (512, 256, 128) if length % size == 0)
    sizes = tpu.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = tpu.make_splash_mha_single_device(
        tpu.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        interpret=platform() == "cpu",
    )
    return lambda q, k, v, segments: kernel(q, k, v, tpu.SegmentIds(segments, segments))


def triton(
    q_BTNGK: jax.Array, k_BTNK: jax.Array, v_BTNK: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """Causal attention inside segments on GPU, [B, T, N, G, K]; it knows no window."""
    with warnings.catch_warnings():
        # JAX 0.12 points to Tokamax instead, which has no segments.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as gpu

    def local(q_BTHK, k_BTNK, v_BTNK, segments_BT):
        heads, size = q_BTHK.shape[2:]
        # Tokens of a block whose keys, values and queries fit the shared memory of an SM.
        block = min(128, 2**15 // (pl.next_power_of_2(size) * q_BTHK.dtype.itemsize))
        blocks = gpu.BlockSizes(block, block, 32, 32, 32, 32)
        each_BTHK = [jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k_BTNK, v_BTNK)]
        return gpu.mha(
            q_BTHK,
            *each_BTHK,
            segments_BT,
            sm_scale=size**-0.5,
            causal=True,
            block_sizes=blocks,
            interpret=platform() == "cpu",
        )

    return _on_each_device(local, q_BTNGK, k_BTNK, v_BTNK, segments_BT)


def _on_each_device(local, q_BTNGK, k_BTNK, v_BTNK, segments_BT):
    """`local(q [B, T, H, K], k, v, segments)` on each device's own rows and heads.

    Rows are filled up with padding behind their last token, which sees none of it.
    """
    length = q_BTNGK.shape[1]
    rest = -length % STEP

    def run(q_BTNGK, *others):
        q_BTHK = q_BTNGK.reshape(*q_BTNGK.shape[:2], -1, q_BTNGK.shape[-1])
        filled = [fill(x, rest) for x in (q_BTHK, *others)]
        return local(*filled)[:, :length].reshape(q_BTNGK.shape)

    heads = ("batch", None, "kv_heads")
    q_spec, k_spec = spec(*heads, None, None), spec(*heads, None)
    return jax.shard_map(
        run,
        in_specs=(q_spec, k_spec, k_spec, spec("batch", None)),
        out_specs=q_spec,
        check_vma=False,  # a kernel says nothing of how its output varies over the mesh
    )(q_BTNGK, k_BTNK, v_BTNK, segments_BT)


def fill(x, rest: int):
    """Rows [B, T, ...] with so many places of zeros behind each."""
    return jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2)) if rest else x
