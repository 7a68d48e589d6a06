"""Where a model comes from: one view of Hugging Face directories, GGUF files and Orbax models."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.models import decoder
from alignjax.models.families import from_hf, tensor_names
from alignjax.sharding import AXES, check_divides, concrete


class Stored(NamedTuple):
    """What a checkpoint says of one tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path  # or the directory of an Orbax checkpoint


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk, in Hugging Face's terms.

    `read(name, index)` gives a slice of a tensor as a numpy array in its stored dtype.
    """

    path: Path
    config: dict  # config.json
    tensors: dict[str, Stored]  # by name, in an order that is quick to read
    read: Callable[[str, tuple[slice, ...]], np.ndarray]
    tokenizer_dir: Path  # tokenizer files, chat template and generation_config.json


def decoder_config(source: Source) -> decoder.DecoderConfig:
    return from_hf(source.config, str(source.path))


def leaf_name(path) -> str:
    """A leaf's place in a pytree as dotted words, "blocks.q"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def leaf_shapes(config: decoder.DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf of a model by name, those of blocks stacked over layers.

    Needs no device: where no mesh is in use, an abstract one of a single device stands in.
    """
    one = jax.sharding.AbstractMesh(
        (1,) * len(AXES), AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES)
    )
    unset = jax.sharding.get_abstract_mesh().empty
    with jax.sharding.use_abstract_mesh(one) if unset else nullcontext():
        leaves = jax.tree_util.tree_leaves_with_path(decoder.abstract(config))
    return {leaf_name(path): leaf.shape for path, leaf in leaves}


def is_stacked(leaf: str) -> bool:
    """Whether a leaf holds one tensor a layer, stacked."""
    return leaf.startswith("blocks.")


def read_whole(source: Source, name: str) -> np.ndarray:
    return source.read(name, (slice(None),) * len(source.tensors[name].shape))


def watched(source: Source, update: Callable[[int, str], None]) -> Source:
    """The same source, which tells `update` how many whole GB it has read, and how many as text."""
    done = 0

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        nonlocal done
        array = source.read(name, index)
        done += array.nbytes
        update(int(done / 1e9), f"{done / 1e9:.2f} GB")
        return array

    return replace(source, read=read)


def load(source: Source) -> decoder.Decoder:
    """Reads a model onto the mesh as float32, each device's shard from its own slices.

    Raises ValueError, naming file and tensor, where the checkpoint does not hold what its config
    says, or weights that are not finite.
    """
    config = decoder_config(source)
    check_divides(config.dimensions())
    check_tensors(source)

    def read(path, want):
        leaf = leaf_name(path)
        names = tensor_names(leaf, config.layers)

        def part(index):
            if not is_stacked(leaf):
                return source.read(names[0], index).astype(np.float32)
            chosen = names[index[0]]
            return np.stack([source.read(n, index[1:]).astype(np.float32) for n in chosen])

        array = jax.make_array_from_callback(want.shape, want.sharding, part)
        if not _finite(array):
            bad = int(np.argmin(_finite_layers(array))) if is_stacked(leaf) else 0
            raise ValueError(
                f"{source.tensors[names[bad]].file}: {names[bad]} holds values that are not finite "
                "(NaN or infinity); give a checkpoint whose weights are whole."
            )
        return array

    return jax.tree_util.tree_map_with_path(read, concrete(decoder.abstract(config)))


@jax.jit
def _finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


@jax.jit
def _finite_layers(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all(tuple(range(1, array.ndim)))


def check_tensors(source: Source) -> None:
    """Raises ValueError where a checkpoint does not hold the tensors that its config says."""
    config = decoder_config(source)
    known = {"lm_head.weight"} if config.tied_head else set()
    for leaf, shape in leaf_shapes(config).items():
        names = tensor_names(leaf, config.layers)
        for name in names:
            if name not in source.tensors:
                raise ValueError(f"{source.path}: the tensor {name} is missing.")
            stored = source.tensors[name]
            wanted = shape[1:] if is_stacked(leaf) else shape
            if stored.shape != wanted:
                raise ValueError(
                    f"{stored.file}: {name} has shape {stored.shape}, but the config says {wanted}."
                )
        known |= set(names)
    extra = {n for n in source.tensors if n not in known and not n.endswith("rotary_emb.inv_freq")}
    if extra:
        name = min(extra)
        raise ValueError(
            f"{source.tensors[name].file}: the tensor {name} is not part of a Llama model."
        )
    if config.tied_head and "lm_head.weight" in source.tensors:
        _check_tied(source)


def _check_tied(source: Source) -> None:
    """Refuses a stored head that a tied model would drop although it differs."""
    head, embed = (
        read_whole(source, name) for name in ("lm_head.weight", "model.embed_tokens.weight")
    )
    if not np.array_equal(head, embed):
        raise ValueError(
            f"{source.path}: lm_head.weight differs from model.embed_tokens.weight, but "
            "config.json ties them; set tie_word_embeddings to false there."
        )
