"""Trained vectors: how much of them is in use."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlora_jax import VeRA, init
from vlora_jax.inspection.vectors import vector_row, vector_rows


def test_vera_starts_saturated_on_one_side_and_empty_on_the_other():
    """d is constant, b zero, in each of the layers; a change of b in one layer shows there alone."""
    base = {"w": {"kernel": jnp.ones((6, 5))}}
    adapter = init(VeRA(rank=8, targets="w", projection="jax"), jax.random.key(0), base)
    rows = {row.name: row for row in vector_rows(adapter)}
    assert (rows["d"].path, rows["d"].layer, rows["d"].size) == ("w", None, 8)
    assert (rows["d"].rms, rows["d"].spread, rows["d"].saturation) == pytest.approx((0.1, 0.0, 1.0), abs=1e-6)
    assert (rows["b"].size, rows["b"].rms, rows["b"].saturation, rows["b"].small) == (5, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("count", [1, 3, 10])
def test_saturation_is_the_share_of_equal_entries(count):
    values = np.array([2.0, -2.0] * 5) * (np.arange(10) < count)
    row = vector_row("w", "d", 2, values)
    assert (row.saturation, row.small) == pytest.approx((count / 10, 1 - count / 10))
    assert row.spread == (math.inf if count == 10 else pytest.approx(values.std() / abs(values.mean())))
