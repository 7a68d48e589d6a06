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
from alignjax.evaluation import score
from alignjax.files import load_array, save_array, write_whole
from alignjax.models.decoder import Decoder
from alignjax.processes import from_first, is_first, on_first
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
    """Return two sums modulo 2^32 in which each element's bits are weighed by its place.

    Integer sums do not depend on their order, so the result does not on the sharding.
    """
    bits = leaf.view(f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
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

    Kept under a fingerprint of all that decides their bits: weights and tokens, and what rounds,
    which is the machine and how items share batches. What a kill left is gone on with, batch by
    batch of the same plan.
    """
    wanted = np.arange(len(data)) if ids is None else np.unique(ids)
    about = {"weights": weights, "tokens": data.key, "version": 5, "jax": jax.__version__}
    about |= {"items": hashlib.sha256(wanted.tobytes()).hexdigest(), "row_length": row_length}
    about |= {"rows": rows, "mesh": jax.sharding.get_mesh().axis_sizes, "dtype": compute.dtype}
    about |= {"attention": compute.attention, "vocab_chunk": compute.vocab_chunk}
    about |= {"device": jax.devices()[0].device_kind, "platform": jax.default_backend()}
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    file = cache / "reference" / f"{key}.npy"
    shape = (len(data), data.sides)
    known = stored_array(file, shape)
    known = np.full(shape, np.nan, np.float32) if known is None else known
    saved = 0

    def keep(done: int) -> None:
        nonlocal saved
        progress(done)
        if is_first() and (done - saved >= CHUNK or done == len(wanted)):
            write_whole(file.with_suffix(".json"), json.dumps(about, indent=2))
            save_array(file, known)
            saved = done

    return score(model, data, row_length, rows, compute, wanted, keep, known=known)


def stored_array(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return a float32 array that the first process finds in a file; None where it finds none."""
    found = load_array(file, shape) if is_first() else None
    if not on_first(lambda: found is not None):
        return None
    return from_first(np.zeros(shape, np.float32) if found is None else found)
