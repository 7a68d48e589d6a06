"""How far two checkpoints lie apart: theta - theta_sft by module and layer, and what is odd of it.

Sums are float64 over pieces of float32; of a sample, each tensor's sums stand for all of it.
"""

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import ml_dtypes
import numpy as np

from alignjax.extrapolation.alphas import GROUPS
from alignjax.extrapolation.arithmetic import pieces
from alignjax.extrapolation.pair import Pair
from alignjax.processes import on_each
from alignjax.weights.safetensors import stored_dtype
from alignjax.weights.source import row_blocks
from alignjax.weights.together import run_of

SAMPLE = 1 << 17  # elements of a tensor
_SPOTS = 8  # of a tensor, from which the sample is taken
_SLAB = 1 << 21  # bytes read at a time where all is read
_THREADS = 2

# Of the matrices in layers. AdamW moves a weight by at most about its rate in a step: 1,000 steps
# at DPO's 5e-7 make 0.0005, where weights are about 0.02; SFT's 2e-5 makes more.
LARGE, UNRELATED, ALIKE = 0.03, 0.5, 0.9


@dataclass(frozen=True)
class Delta:
    """Sums over elements of theta and of theta - theta_sft."""

    elements: float = 0.0
    theta_theta: float = 0.0
    theta_delta: float = 0.0
    delta_delta: float = 0.0
    same: float = 0.0  # elements that do not differ
    below: float = 0.0  # elements within less than an ulp of theta in the output's dtype

    def __add__(self, other: "Delta") -> "Delta":
        return Delta(*(a + b for a, b in zip(self.sums, other.sums, strict=True)))

    @property
    def sums(self) -> tuple[float, ...]:
        return tuple(vars(self).values())

    @property
    def relative(self) -> float:
        """Norm of the delta over that of theta."""
        return math.sqrt(_share(self.delta_delta, self.theta_theta))

    @property
    def cosine(self) -> float:
        """Of the delta and theta."""
        return _share(self.theta_delta, math.sqrt(self.theta_theta * self.delta_delta))

    @property
    def likeness(self) -> float:
        """Cosine of theta and theta_sft."""
        product = self.theta_theta - self.theta_delta
        weak = max(product - self.theta_delta + self.delta_delta, 0.0)
        return _share(product, math.sqrt(self.theta_theta * weak))

    def scaled(self, elements: int) -> "Delta":
        """The sums that so many elements would have."""
        factor = elements / self.elements if self.elements else 0.0
        return Delta(*(factor * one for one in self.sums))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def measure(pair: Pair, dtype: str, whole: bool) -> dict[str, Delta]:
    """Tensor -> sums, of all its elements or of a sample; several processes share the tensors."""
    names = [name for name in pair.places if name in pair.strong.tensors]

    def sums() -> dict[str, tuple[float, ...]]:
        with ThreadPoolExecutor(_THREADS) as pool:
            mine = run_of(names)  # an Orbax chunk may hold a leaf's layers, which lie together
            found = pool.map(partial(_measure, pair, dtype, whole), mine)
            return dict(zip(mine, (one.sums for one in found), strict=True))

    found = {name: Delta(*one) for part in on_each(sums) for name, one in part.items()}
    return {name: found[name] for name in names}


def _measure(pair: Pair, dtype: str, whole: bool, name: str) -> Delta:
    stored = pair.strong.tensors[name]
    shape = (pair.common(name), *stored.shape[1:])
    total = Delta()
    ulp = _ulps(stored_dtype(pair.strong, name, dtype))
    for index in row_blocks(shape, stored.dtype.itemsize, _SLAB) if whole else spots(shape):
        rows = pair.read(name, index)
        with np.errstate(all="ignore"):  # what is not finite shows in the sums
            for theta, delta in pieces(rows.strong, rows.weak):
                total += _sums(theta, delta, ulp)
    return total.scaled(math.prod(shape))


def spots(shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Where a sample is taken: few rows each, spread evenly over a tensor."""
    width = math.prod(shape[1:])
    rows = max(SAMPLE // _SPOTS // width, 1)
    if rows * _SPOTS >= shape[0]:
        return row_blocks(shape, 1, shape[0] * width)
    rest = (slice(None),) * (len(shape) - 1)
    starts = np.linspace(0, shape[0] - rows, _SPOTS).astype(int)
    return [(slice(int(at), int(at) + rows), *rest) for at in starts]


def _ulps(kind: np.dtype) -> tuple[np.float32, np.float32]:
    """Of a dtype, an ulp of a number in [1, 2), and the least of all."""
    about = ml_dtypes.finfo(kind)
    return np.float32(about.eps), np.float32(about.smallest_subnormal)


def _sums(theta: np.ndarray, delta: np.ndarray, ulp: tuple[np.float32, np.float32]) -> Delta:
    size = np.abs(delta)
    power = (theta.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)  # of 2, below theta
    below = size < np.maximum(power * ulp[0], ulp[1])
    return Delta(
        len(theta),
        float(np.dot(theta, theta)),
        float(np.dot(theta, delta)),
        float(np.dot(delta, delta)),
        len(theta) - np.count_nonzero(size),
        np.count_nonzero(below),
    )


def by_group(pair: Pair, found: dict[str, Delta]) -> dict[str, Delta]:
    """Sums of each module group, and of all."""
    groups = {
        group: _sum(one for name, one in found.items() if pair.places[name].group == group)
        for group in GROUPS
    }
    return groups | {"all": _sum(groups.values())}


def by_layer(pair: Pair, found: dict[str, Delta]) -> list[dict[str, Delta]]:
    """Sums of each layer's module groups."""
    layers = 1 + max(place.layer for place in pair.places.values() if place.layer is not None)
    result = [dict.fromkeys(GROUPS, Delta()) for _ in range(layers)]
    for name, one in found.items():
        place = pair.places[name]
        if place.layer is not None:
            result[place.layer][place.group] += one
    return result


def _sum(parts: Iterable[Delta]) -> Delta:
    return sum(parts, Delta())


def warnings(pair: Pair, groups: dict[str, Delta], dtype: str) -> list[str]:
    """What does not look as if one side were finetuned from the other, with the numbers."""
    layers, whole = groups["attention"] + groups["mlp"], groups["all"]
    if not all(math.isfinite(one) for one in whole.sums):
        return ["some weights are not finite (NaN or infinity), or their squares are not."]
    if whole.same == whole.elements:
        return ["the two checkpoints are the same where they were compared; any alpha gives that."]
    found = []
    numbers = (
        f"the layers' matrices differ by {layers.relative:.1%} of their norm, and the cosine of "
        f"the two is {layers.likeness:.4f}"
    )
    if layers.relative > UNRELATED or layers.likeness < ALIKE:
        found.append(
            f"these do not look like one finetuned from the other: {numbers}. Extrapolating from "
            "unrelated models, or SFTs of different ones, makes text collapse."
        )
    elif layers.relative > LARGE:
        found.append(
            f"they lie far apart for preference training: {numbers}; DPO mostly leaves less "
            f"than {LARGE:.0%}. A base model and its SFT often do, of which it gained nothing."
        )
    kinds = {
        side.tensors[name].dtype.itemsize
        for side in (pair.strong, pair.weak)
        for name in pair.strong.tensors
        if name in side.tensors
    }
    if 2 in kinds and whole.same > whole.elements / 2:
        found.append(
            f"{whole.same / whole.elements:.1%} of the elements are the same on both sides, since "
            "16 bits round small differences away; a run directory has float32 weights."
        )
    sizes = {stored_dtype(pair.strong, name, dtype).itemsize for name in pair.places}
    if 4 in kinds and 2 in sizes and whole.below > whole.elements / 2:
        found.append(
            f"{whole.below / whole.elements:.1%} of the elements differ by less than the output's "
            "dtype tells apart; --dtype=float32 keeps what is added to them."
        )
    return found
