"""Four random kills, two of them in two processes; `python tests/chaos.py --kills 40` for more."""

import chaos
import pytest

pytestmark = pytest.mark.slow  # minutes


def test_four_random_kills_change_nothing(tmp_path):
    assert chaos.main(4, seed=1, root=tmp_path) == 0
