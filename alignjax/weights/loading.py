"""A model from a checkpoint onto the mesh."""

from pathlib import Path

import jax
import numpy as np

from alignjax.errors import UserError
from alignjax.models import decoder
from alignjax.models.families import tensor_names
from alignjax.models.shapes import is_stacked
from alignjax.sharding import check_divides, concrete
from alignjax.weights.safetensors import open_directory
from alignjax.weights.source import Source, check_tensors, decoder_config, leaf_name
from alignjax.weights.spread import matrices, vectors
from alignjax.weights.together import at_once


def load(source: Source | Path | str) -> decoder.Decoder:
    """Reads a model onto the mesh as float32; each process reads its part of every tensor.

    A path names a Hugging Face directory. Host memory holds a few slabs of 32 MB. Raises UserError
    on every process, naming file and tensor, where the checkpoint does not hold what its config
    says, or weights that are not finite.
    """
    if not isinstance(source, Source):
        source = open_directory(source)
    config = decoder_config(source)
    check_divides(config.dimensions())
    check_tensors(source)
    damage: list[UserError] = []

    def rows(name: str, first: int, last: int) -> np.ndarray:
        count, *rest = source.tensors[name].shape
        index = (slice(min(first, count), min(last, count)), *(slice(None) for _ in rest))
        try:
            if not damage:
                return source.read(name, index)
        except ValueError as error:
            damage.append(error)  # raised below: the others wait for this process's part
        return np.zeros((index[0].stop - index[0].start, *rest), source.tensors[name].dtype)

    def read(path, want):
        leaf = leaf_name(path)
        names = tensor_names(leaf, config.layers)
        if len(want.shape) - is_stacked(leaf) == 2:
            array, bad = matrices(want, names, rows)
        else:
            parts = [rows(n, 0, source.tensors[n].shape[0]).astype(np.float32) for n in names]
            array = vectors(want, np.stack(parts) if is_stacked(leaf) else parts[0])
            bad = [n for n, part in zip(names, parts, strict=True) if not np.isfinite(part).all()]
        if bad:
            damage.append(_not_finite(source, bad[0]))
        return array

    model = jax.tree_util.tree_map_with_path(read, concrete(decoder.abstract(config)))
    at_once(lambda: _raise(damage))
    return model


def _raise(problems: list[UserError]) -> None:
    if problems:
        raise problems[0]


def _not_finite(source: Source, name: str) -> UserError:
    return UserError(
        f"{source.tensors[name].file}: {name} holds values that are not finite (NaN or infinity); "
        "give a checkpoint whose weights are whole."
    )
