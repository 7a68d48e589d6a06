"""theta + alpha (theta - theta_sft) of slices: how it rounds, for every pair of dtypes."""

import numpy as np
import pytest
from conftest import BF16
from expomodels import random_pair, rounded_once
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from alignjax.extrapolation.arithmetic import PIECE, extrapolated

DTYPES = [np.dtype(np.float32), BF16, np.dtype(np.float16)]


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.5, 2.0, -0.25])
def test_few_bfloat16_results_are_not_the_float64_ones_rounded_once(alpha):
    strong, weak = random_pair(np.random.default_rng(0), 1 << 20, BF16)
    (found,) = extrapolated(strong, weak, [alpha], BF16)
    one, other = strong.astype(np.float64), weak.astype(np.float64)
    expected = rounded_once(one + alpha * (one - other))
    assert np.mean(found.astype(np.float64) != expected) <= 2e-5
    assert np.mean(found != strong) > 0.2


def result(strong, weak, alpha: float, kind) -> np.ndarray:
    theta = strong.astype(np.float32)
    with np.errstate(all="ignore"):
        return (theta + np.float32(alpha) * (theta - weak.astype(np.float32))).astype(kind)


@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize("weak_kind", DTYPES, ids=str)
@pytest.mark.parametrize("strong_kind", DTYPES, ids=str)
def test_every_pair_of_dtypes_is_numpys_float32_cast_once(strong_kind, weak_kind, kind):
    rng = np.random.default_rng(1)
    strong, weak = (random_pair(rng, 2 * PIECE + 7, k)[0] for k in (strong_kind, weak_kind))
    alphas = [0.3, -0.5, 4.0]
    found = extrapolated(strong, weak, alphas, kind)
    for alpha, one in zip(alphas, found, strict=True):
        expected = result(strong, weak, alpha, kind)
        assert one.dtype == kind and one.tobytes() == expected.tobytes()
        assert np.mean(one == strong) < 0.9


def of_both(strong, weak, alpha: float, kind) -> list[np.ndarray]:
    """What NumPy makes of a few numbers, and XLA of so many of them that it is asked."""
    many = [np.tile(side, PIECE // side.size + 1) for side in (strong, weak)]
    found = [extrapolated(*sides, [alpha], kind)[0] for sides in ((strong, weak), many)]
    assert len(found[1]) > PIECE
    return [found[0], found[1][: strong.size]]


@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_subnormal_numbers_are_no_zeros(kind):
    """XLA on processors takes them for 0."""
    strong = (np.arange(1, 9) * np.finfo(np.float32).smallest_subnormal).astype(np.float32)
    weak = np.zeros(8, np.float32)
    if kind == np.float16:
        strong *= np.float32(2.0**125)
    elif kind == BF16:
        strong *= np.float32(2.0**16)
    for found in of_both(strong.astype(kind), weak.astype(kind), 1.0, kind):
        assert np.array_equal(found.astype(np.float64), 2 * strong.astype(np.float64))
        assert np.all(found > 0)


def bits(kind, size):
    return arrays.arrays(kind, size, elements=st.integers(0, np.iinfo(kind).max))


@settings(max_examples=200, deadline=None)
@given(strong=bits(np.uint16, 64), weak=bits(np.uint16, 64))
def test_any_bits_of_bfloat16_round_as_ml_dtypes_rounds(strong, weak):
    check_any(strong.view(BF16), weak.view(BF16))


@settings(max_examples=200, deadline=None)
@given(strong=bits(np.uint32, 64), weak=bits(np.uint32, 64))
def test_any_bits_of_float32_round_as_ml_dtypes_rounds(strong, weak):
    check_any(strong.view(np.float32), weak.view(np.float32))


def check_any(strong, weak):
    check_bits(strong, weak)
    check_bits(without_tiny(strong), without_tiny(weak))


def without_tiny(side):
    """A tiny number among many would have NumPy do them all."""
    return np.where(np.abs(side.astype(np.float32)) < 2.0**-99, side.dtype.type(1), side)


def check_bits(strong, weak):
    expected = result(strong, weak, 0.3, BF16)
    for found in of_both(strong, weak, 0.3, BF16):
        same = found.view(np.uint16) == expected.view(np.uint16)
        assert np.all(same | (np.isnan(found) & np.isnan(expected)))


def test_a_nan_of_many_bits_stays_one():
    """Rounding its bits up would carry into the sign and leave -0."""
    strong = np.full(4, 0x7FFFFFFF, np.uint32).view(np.float32)
    for found in of_both(strong, np.zeros(4, np.float32), 0.3, BF16):
        assert np.isnan(found.astype(np.float32)).all()


@pytest.mark.parametrize("alpha", [0.1, 0.3, 2.0, -0.5])
def test_float32_is_that_of_a_task_vector_added_to_the_weak_side(alpha):
    """theta_sft + (1 + alpha) (theta - theta_sft), as mergekit's task_arithmetic computes it.

    Where the two sides lie near each other, as finetuning leaves them.
    """
    rng = np.random.default_rng(0)
    weak = (0.02 * rng.standard_normal(1 << 20)).astype(np.float32)
    strong = weak * (1 + 0.01 * rng.standard_normal(1 << 20)).astype(np.float32)
    (found,) = extrapolated(strong, weak, [alpha], np.dtype(np.float32))
    theirs = weak + np.float32(1 + alpha) * (strong - weak)
    largest = np.maximum(np.abs(strong), np.abs(weak)).astype(np.float64)
    difference = np.abs(found.astype(np.float64) - theirs.astype(np.float64))
    assert np.all(difference <= 2.0**-22 * largest)
