"""The two sides of an extrapolation: whether they fit, and slices of both at once."""

import filecmp
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignjax.errors import UserError
from alignjax.extrapolation.alphas import Place, Rules, of_tensors
from alignjax.files import read_json
from alignjax.models.families import tensor_names
from alignjax.models.shapes import DecoderConfig, is_stacked, leaf_shapes
from alignjax.weights.source import Source, check_tensors, decoder_config

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What one model of a family may change without any of its tensors having another shape.
_UNSHAPED = ("rope_theta", "norm_eps", "rope_scaling", "window", "activation", "unit_offset")
_UNSHAPED += ("scaled_embedding", "pad_id")


class Rows(NamedTuple):
    """Slices of one tensor."""

    strong: np.ndarray  # theta
    weak: np.ndarray | None  # theta_sft, of which there are fewer rows where its vocabulary ends


@dataclass(frozen=True)
class Pair:
    """Two checkpoints of one architecture.

    The result has the strong side's tensors, config and tokenizer.
    """

    strong: Source
    weak: Source
    places: dict[str, Place]  # of the tensors that are extrapolated
    kept: np.ndarray  # rows of the embedding and head that stay as they are, int64, ascending

    def alphas(self, rules: Rules, alpha: float) -> dict[str, float]:
        """The alpha of each tensor; a stored copy of a tied head has the embedding's."""
        tied = self.places.get(HEAD) == self.places[EMBED]
        own = {name: place for name, place in self.places.items() if not (tied and name == HEAD)}
        found = of_tensors(rules, alpha, own)
        return found | ({HEAD: found[EMBED]} if tied else {})

    def weak_name(self, name: str) -> str:
        """The weak side's tensor; a head that is tied there is its embedding."""
        return EMBED if name == HEAD and HEAD not in self.weak.tensors else name

    def common(self, name: str) -> int:
        """Rows that both sides have of a tensor."""
        return min(
            side.tensors[own].shape[0]
            for side, own in ((self.strong, name), (self.weak, self.weak_name(name)))
        )

    def kept_in(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Which rows of a slice stay as they are, counted from its first."""
        if name not in (EMBED, HEAD):
            return self.kept[:0]
        first, last = np.searchsorted(self.kept, (index[0].start, index[0].stop))
        return self.kept[first:last] - index[0].start

    def read(self, name: str, index: tuple[slice, ...], weak: bool = True) -> Rows:
        """A slice of both sides, the weak one only if it is asked for."""
        strong = self.strong.read(name, index)
        if not weak or name not in self.places:
            return Rows(strong, None)
        end = self.common(name)
        first, last = min(index[0].start, end), min(index[0].stop, end)
        return Rows(strong, self.weak.read(self.weak_name(name), (slice(first, last), *index[1:])))

    def order(self) -> dict[str, int]:
        """Tensor -> its place where all are read one after the other, quick to read of both sides.

        An Orbax checkpoint may hold all layers of a leaf in one chunk, so its order goes first.
        """
        sides = (self.strong, self.weak)
        stacked = [side for side in sides if next(iter(side.tensors.values())).file.is_dir()]
        first = stacked[0] if stacked else self.strong
        return {name: number for number, name in enumerate(first.tensors)}


def pair_of(strong: Source, weak: Source, common_rows: bool, kept: np.ndarray) -> Pair:
    """Both sides as a pair. Raises UserError, naming both, where they do not fit together.

    Vocabularies of two sizes are refused unless `common_rows` says to take the rows both have.
    """
    for side in (strong, weak):
        check_tensors(side)
    ours, theirs = decoder_config(strong), decoder_config(weak)
    for name in _shaped():
        one, other = getattr(ours, name), getattr(theirs, name)
        if one != other and not (name == "vocab_size" and common_rows):
            more = "; --common-rows takes the rows that both have" if name == "vocab_size" else ""
            raise UserError(
                f"--weak={weak.path}: its {name} is {other}, and that of {strong.path} is {one}, "
                f"so they are not two checkpoints of one model{more}."
            )
    if ours.tied_head and not theirs.tied_head and not ours.scored:
        raise UserError(
            f"--weak={weak.path}: its head is a tensor of its own, and {strong.path} ties the head "
            "to the embedding; untie it there (tie_word_embeddings and lm_head.weight)."
        )
    places = {}
    for leaf in leaf_shapes(ours):
        for layer, name in enumerate(tensor_names(leaf, ours.layers)):
            places[name] = Place(leaf, layer if is_stacked(leaf) else None)
    if HEAD in strong.tensors and HEAD not in places:
        places[HEAD] = places[EMBED]  # a copy that lies beside the embedding it is tied to
    return Pair(strong, weak, places, kept)


def _shaped() -> list[str]:
    names = (item.name for item in fields(DecoderConfig))
    return [name for name in names if name not in (*_UNSHAPED, "tied_head")]


def differences(pair: Pair) -> list[str]:
    """What is not the same on both sides although all shapes are, a sentence each."""
    ours, theirs = decoder_config(pair.strong), decoder_config(pair.weak)
    found = [
        f"{name} is {getattr(ours, name)} in the strong checkpoint and {getattr(theirs, name)} in "
        "the weak one; the result has the strong one's."
        for name in _UNSHAPED
        if getattr(ours, name) != getattr(theirs, name)
    ]
    files = [side.tokenizer_dir / "tokenizer.json" for side in (pair.strong, pair.weak)]
    if not all(file.is_file() for file in files) or filecmp.cmp(*files, shallow=False):
        return found
    one, other = (_tokens(file) for file in files)
    wrong = [number for number in sorted(one.keys() & other.keys()) if one[number] != other[number]]
    if wrong:
        one, other = one[wrong[0]], other[wrong[0]]
        found.append(
            f"{len(wrong)} tokens have another text, such as {wrong[0]}: {one!r} and {other!r}; "
            "their rows of the embedding do not belong together."
        )
    return found


def _tokens(file: Path) -> dict[int, str]:
    """Id -> text of each token of a tokenizer.json; of a form that is not known the added ones."""
    content = read_json(file)
    vocabulary = content.get("model", {}).get("vocab")
    found = {}
    if isinstance(vocabulary, list):  # Unigram's, with scores
        found = {number: text for number, (text, _) in enumerate(vocabulary)}
    elif isinstance(vocabulary, dict):
        found = {number: text for text, number in vocabulary.items()}
    return found | {one["id"]: one["content"] for one in content.get("added_tokens", [])}
