"""Agreement with preferences, its interval and its calibration, by hand."""

import numpy as np
import pytest

from alignjax import preferences


@pytest.mark.parametrize(
    ("accuracy", "count", "expected"),
    [
        (0.8, 10, (0.4902, 0.9433)),
        (0.5, 10, (0.2366, 0.7634)),
        (1.0, 10, (10 / (10 + 1.959964**2), 1)),
        (0.0, 4, (0, 1.959964**2 / (4 + 1.959964**2))),
        (0.625, 4, (0.2194, 0.9081)),  # a tie among four
    ],
)
def test_wilsons_interval(accuracy, count, expected):
    assert preferences.wilson(accuracy, count) == pytest.approx(expected, abs=5e-5)


def test_wilsons_bounds_are_where_the_accuracy_is_just_within_reach():
    """Each bound b is a share whose own normal interval ends at the accuracy."""
    for bound in preferences.wilson(0.73, 250):
        assert (0.73 - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / 250)


def test_the_spread_of_rewards():
    rewards = np.array([[2.5, -1], [0, 4]], np.float32)
    assert preferences.spread(rewards) == {"min": -1.0, "mean": 1.375, "max": 4.0}


def margin_of(probability: float) -> float:
    return float(np.log(probability / (1 - probability)))


def test_calibration_folds_a_pair_to_the_side_that_is_ahead():
    margins = np.array([margin_of(0.93), margin_of(0.07), margin_of(0.62), 0.0])
    bins, error = preferences.calibration(margins)
    assert [tuple(one) for one in bins] == [
        pytest.approx((0.50, 0.55, 1, 0.50, 0.5)),
        pytest.approx((0.60, 0.65, 1, 0.62, 1.0)),
        pytest.approx((0.90, 0.95, 2, 0.93, 0.5)),
    ]
    assert error == pytest.approx((0 + 0.38 + 2 * 0.43) / 4)


def test_a_scorer_that_is_sure_falls_in_the_last_bin():
    (one,), error = preferences.calibration(np.array([1e4, -1e4, 40.0, 30.0]))
    assert (one.low, one.high, one.pairs, one.accuracy) == (pytest.approx(0.95), 1, 4, 0.75)
    assert error == pytest.approx(0.25)


def test_a_calibrated_scorer_has_no_error():
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.02, 0.98, 200_000)
    chosen = rng.uniform(size=probability.size) < probability  # whether the side scored is chosen
    margins = np.where(chosen, 1, -1) * np.log(probability / (1 - probability))
    assert preferences.calibration(margins)[1] < 0.01
    assert preferences.calibration(3 * margins)[1] > 0.1


def test_agreement_by_hand():
    margins, longer = np.array([1.0, -0.5, 0.0, 2.0]), np.array([3, 2, 0, -1])
    found = preferences.agreement(margins, longer, np.arange(4))
    assert (found["pairs"], found["ties"], found["margin"]) == (4, 1, 0.625)
    assert (found["accuracy"], found["longer_wins"]) == (0.625, 0.625)
    assert found["accuracy_interval"] == pytest.approx([0.2194, 0.9081], abs=5e-5)
    parts = preferences.agreement_by(np.array(["b", "a", "b", "b"]), margins, longer, np.arange(4))
    assert list(parts) == ["a", "b"]
    assert parts["a"] == preferences.agreement(margins[1:2], longer[1:2], np.array([1]))
    assert (parts["b"]["accuracy"], parts["b"]["longer_wins"]) == (2.5 / 3, 0.5)
