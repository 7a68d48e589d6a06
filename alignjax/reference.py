"""Log-probabilities of the reference model: computed once, kept on disk, found again by content."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.config import Compute
from alignjax.data.tokenset import TokenSet
from alignjax.errors import UserError
from alignjax.evaluation import score
from alignjax.files import load_array, save_array, write_whole
from alignjax.models.decoder import Decoder
from alignjax.processes import from_first, is_first
from alignjax.weights.source import leaf_name

CHUNK = 4096  # items scored between two saves


def fingerprint(model: Decoder) -> str:
    """A hash of every weight's bits, the same on any mesh and from any file format."""
    digest = hashlib.sha256(repr(model.config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        digest.update(f"{leaf_name(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.asarray(_checksums(leaf)).tobytes())
    return digest.hexdigest()[:32]


@jax.jit
def _checksums(leaf: jax.Array) -> jax.Array:
    """Two sums modulo 2^32 in which every element's bits are weighed by its place.

    Integer sums do not depend on their order, so neither does the result on the sharding.
    """
    bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        shape = [1] * leaf.ndim
        shape[axis] = size
        place = place * jnp.uint32(size) + jnp.arange(size, dtype=jnp.uint32).reshape(shape)
    mixed = (bits ^ (bits >> 15)) * jnp.uint32(0x2C1B3C6D)
    odd = place * jnp.uint32(2) + jnp.uint32(1)
    return jnp.stack([(bits * odd).sum(dtype=jnp.uint32), (mixed * odd).sum(dtype=jnp.uint32)])


def reference_logps(
    model: Decoder,
    weights: str,
    data: TokenSet,
    row_length: int,
    rows: int,
    compute: Compute,
    cache: Path,
    ids: np.ndarray | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Log-probs [items, S] under the reference, for all items or those of `ids`; others are NaN.

    Kept under a fingerprint of weights, tokens, dtype and kernels, looked up by item
    number, and added to where a later run needs items that earlier ones did not. Items are scored
    and saved in chunks that depend on their numbers alone, so what is left after a kill packs as it
    would have.
    """
    about = {"weights": weights, "tokens": data.key, "dtype": compute.dtype, "version": 4}
    about |= {"attention": compute.attention, "platform": jax.default_backend()}  # they round
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    file = cache / "reference" / f"{key}.npy"
    known = np.full((len(data), data.sides), np.nan, np.float32)
    if is_first() and file.is_file():
        known = load_array(file)
    known = from_first(known)
    if known.shape != (len(data), data.sides):
        raise UserError(
            f"{file}: it holds log-probs of {known.shape}, but the data are "
            f"{(len(data), data.sides)}; delete the file."
        )
    wanted = np.arange(len(data)) if ids is None else np.unique(ids)
    missing = wanted[np.isnan(known[wanted]).any(1)]
    done = len(wanted) - len(missing)
    for chunk in np.split(missing, np.flatnonzero(np.diff(missing // CHUNK)) + 1):
        if not len(chunk):
            break
        fresh = score(
            model, data, row_length, rows, compute, chunk, lambda n, done=done: progress(done + n)
        )
        known[chunk] = fresh[chunk]
        done += len(chunk)
        if is_first():
            write_whole(file.with_suffix(".json"), json.dumps(about, indent=2))
            save_array(file, known)
    return known
