"""Tensors onto the mesh, each byte read by one process and sent on to the devices that need it.

A weight split by columns lies in its file as many short pieces. So a process reads whole rows, an
equal part of them each, and the devices exchange columns among themselves: one `all_to_all` where
columns are split, one `all_gather` where an axis of the mesh holds copies. R rows and C columns of
a tensor, L layers.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

SLAB = 1 << 25  # bytes that a process reads before it sends them on
IN_FLIGHT = 2  # slabs that may be on their way; host memory and copies on devices grow with it


def matrices(
    want: jax.ShapeDtypeStruct, names: list[str], read: Callable[[str, int, int], np.ndarray]
) -> tuple[jax.Array, list[str]]:
    """[R, C] of one tensor, or [L, R, C] of one a layer, and the names of those not finite.

    `read(name, first, last)` gives rows as they are stored. Every process has to call this; each
    of them asks for its own rows alone.
    """
    mesh = want.sharding.mesh
    rows, columns = (_axes(entry) for entry in _spec_of(want)[-2:])
    others = tuple(axis for axis in mesh.axis_names if axis not in rows + columns)
    blocks = math.prod(mesh.shape[axis] for axis in rows)  # of rows that lie together
    pieces = mesh.size // blocks  # into which the processes cut a block to read it
    block, width = want.shape[-2] // blocks, want.shape[-1]
    source = jax.sharding.NamedSharding(mesh, jax.P(rows + others + columns, None))
    step = _rows_of_slab(block, width, blocks, pieces)

    array = _zeros(want.shape, want.dtype, want.sharding)
    finite: list[tuple[str, jax.Array]] = []
    for layer, name in enumerate(names):
        for start in range(0, block, step):
            taken = min(step, block - start)
            padded = -(-taken // pieces) * pieces

            def piece(index, name=name, start=start, taken=taken, padded=padded):
                number, first = divmod(index[0].start or 0, padded)
                last = min(first + padded // pieces, taken)
                at = number * block + start
                found = read(name, at + min(first, last), at + last)
                missing = padded // pieces - len(found)
                return np.pad(found, ((0, missing), (0, 0))) if missing else found

            part = jax.make_array_from_callback((blocks * padded, width), source, piece)
            array, is_finite = _put(array, part, layer, start, columns, others, taken)
            finite.append((name, is_finite))
            if len(finite) >= IN_FLIGHT:
                finite[-IN_FLIGHT][1].block_until_ready()
    return array, [name for name, is_finite in finite if not is_finite]


def vectors(want: jax.ShapeDtypeStruct, whole: np.ndarray) -> jax.Array:
    """A small array, which every process has read whole."""
    return jax.make_array_from_callback(want.shape, want.sharding, lambda index: whole[index])


def _spec_of(want: jax.ShapeDtypeStruct) -> tuple:
    spec = want.sharding.spec
    return (*spec, *(None,) * (len(want.shape) - len(spec)))


def _axes(entry) -> tuple[str, ...]:
    """The mesh axes of one dimension of a spec."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _rows_of_slab(block: int, width: int, blocks: int, pieces: int) -> int:
    """Rows of each block that go at once, such that no process reads more than a slab of them."""
    row = 4 * width * blocks // jax.process_count() or 1  # bytes, were they float32
    most = max(SLAB // row, 1)
    return min(block, max(most // pieces * pieces, pieces))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape, dtype, sharding):
    return jnp.zeros(shape, dtype, out_sharding=sharding)


@partial(jax.jit, donate_argnums=0, static_argnums=(4, 5, 6))
def _put(array, part_RC, layer, start, columns, others, taken):
    """Writes rows into an array in place; also whether all of them are finite."""
    spec, source = (jax.typeof(x).sharding.spec for x in (array, part_RC))
    every = jax.sharding.get_abstract_mesh().axis_names

    def local(array, part_RC, layer, start):
        is_finite = jax.lax.pmin(jnp.isfinite(part_RC).all().astype(jnp.int32), every)
        if columns:
            part_RC = jax.lax.all_to_all(part_RC, columns, 1, 0, tiled=True)
        if others:
            part_RC = jax.lax.all_gather(part_RC, others, axis=0, tiled=True)
        part_RC = part_RC[:taken].astype(array.dtype)
        if array.ndim == 2:
            return jax.lax.dynamic_update_slice(array, part_RC, (start, 0)), is_finite
        return jax.lax.dynamic_update_slice(array, part_RC[None], (layer, start, 0)), is_finite

    return jax.shard_map(
        local,
        in_specs=(spec, source, jax.P(), jax.P()),
        out_specs=(spec, jax.P()),
        check_vma=False,  # it cannot see that what was gathered is the same on all
    )(array, part_RC, layer, start)
