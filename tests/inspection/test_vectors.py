"""Trained vectors: how much of them is in use."""

import math

import jax
import numpy as np
import pytest
from helpers import stacked_sites

from vlora_jax import VeRA, init
from vlora_jax.inspection.vectors import vector_row, vector_rows


def test_vera_starts_saturated_on_one_side_and_empty_on_the_other():
    """d is constant, b zero, in each of the layers; a change of b in one layer shows there alone."""
    sites = stacked_sites(3, w=(6, 5))
    adapter = init(VeRA(rank=8, projection="jax"), jax.random.key(0), {}, sites)
    factors = adapter.trainable["sites"]["w"]
    moved = {"w": factors | {"b": factors["b"].at[1, 2].set(4.0)}}
    rows = {(row.path, row.name, row.layer): row for row in vector_rows(adapter)}
    assert list(rows) == [("w", name, layer) for name in factors for layer in range(3)]
    for layer in range(3):
        d, b = rows["w", "d", layer], rows["w", "b", layer]
        assert (d.size, d.rms, d.spread, d.saturation) == pytest.approx((8, 0.1, 0.0, 1.0), abs=1e-6)
        assert (b.size, b.rms, b.saturation, b.small) == (5, 0.0, 0.0, 1.0)
    changed = vector_rows(adapter.with_trainable(adapter.trainable | {"sites": moved}))
    (row,) = [row for row in changed if row != rows[row.path, row.name, row.layer]]
    assert (row.name, row.layer, row.saturation, row.small) == ("b", 1, pytest.approx(1 / 5), pytest.approx(4 / 5))


@pytest.mark.parametrize("count", [1, 3, 10])
def test_saturation_is_the_share_of_equal_entries(count):
    values = np.array([2.0, -2.0] * 5) * (np.arange(10) < count)
    row = vector_row("w", "d", 2, values)
    assert (row.saturation, row.small) == pytest.approx((count / 10, 1 - count / 10))
    assert row.spread == (math.inf if count == 10 else pytest.approx(values.std() / abs(values.mean())))
