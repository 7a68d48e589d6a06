"""Where a model comes from: one view of a Hugging Face directory and of a GGUF file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from alignjax.models import decoder
from alignjax.models.families import from_hf, tensor_names
from alignjax.sharding import check_divides, concrete


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk, in Hugging Face's terms.

    `read(name, index)` gives a slice of a tensor as a numpy array in its stored dtype.
    """

    path: Path
    config: dict  # config.json
    dtype: str  # of the weights, and of an export that keeps it
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str, tuple[slice, ...]], np.ndarray]
    tokenizer_dir: Path  # tokenizer files, chat template and generation_config.json


def decoder_config(source: Source) -> decoder.DecoderConfig:
    return from_hf(source.config, str(source.path))


def leaf_name(path) -> str:
    """A leaf's place in a pytree as dotted words, "blocks.q"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def load(source: Source) -> decoder.Decoder:
    """Reads a model onto the mesh as float32, each device's shard from its own slices.

    Raises ValueError, naming file and tensor, where the checkpoint does not hold what its config
    says.
    """
    config = decoder_config(source)
    check_divides(config.dimensions())
    wanted = concrete(decoder.abstract(config))
    _check_tensors(source, config, wanted)

    def read(path, want):
        names = tensor_names(leaf_name(path), config.layers)
        stacked = len(want.shape) > len(source.shapes[names[0]])

        def part(index):
            if not stacked:
                return source.read(names[0], index).astype(np.float32)
            chosen = names[index[0]]
            return np.stack([source.read(name, index[1:]) for name in chosen]).astype(np.float32)

        return jax.make_array_from_callback(want.shape, want.sharding, part)

    return jax.tree_util.tree_map_with_path(read, wanted)


def _check_tensors(source: Source, config: decoder.DecoderConfig, wanted) -> None:
    known = {"lm_head.weight"} if config.tied_head else set()
    for path, want in jax.tree_util.tree_leaves_with_path(wanted):
        names = tensor_names(leaf_name(path), config.layers)
        shape = want.shape[1:] if leaf_name(path).startswith("blocks.") else want.shape
        for name in names:
            if name not in source.shapes:
                raise ValueError(f"{source.path}: the tensor {name} is missing.")
            if source.shapes[name] != shape:
                raise ValueError(
                    f"{source.path}: {name} has shape {source.shapes[name]}, but the config says "
                    f"{shape}."
                )
        known |= set(names)
    extra = {n for n in source.shapes if n not in known and not n.endswith("rotary_emb.inv_freq")}
    if extra:
        raise ValueError(f"{source.path}: the tensor {min(extra)} is not part of a Llama model.")
