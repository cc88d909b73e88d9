"""What a merge to bfloat16 keeps of a change, against NumPy's bfloat16."""

import ml_dtypes
import numpy as np
import pytest
from planted import base_of, change_of, normal, planted

from vlora_jax.inspection.rounding import rounding_rows

KERNEL = normal(2, 48, 16)
ADAPTER = planted("w", normal(2, 48, 2) * 0.05, normal(2, 2, 16))
HALF = ml_dtypes.bfloat16


def test_it_is_what_numpy_rounds():
    for row, kernel, change in zip(
        rounding_rows(base_of("w", KERNEL), ADAPTER), KERNEL, change_of(ADAPTER, "w"), strict=True
    ):
        before = kernel.astype(HALF)
        after = (before.astype(np.float32) + change.astype(np.float32)).astype(HALF)
        kept = after.astype(np.float32) - before.astype(np.float32)
        assert row.lost == pytest.approx(np.linalg.norm(kept - change) / np.linalg.norm(change), rel=1e-2)
        assert row.unmoved == pytest.approx((after == before).mean(), abs=3e-3)
        assert 0 < row.lost < 1


def test_a_change_below_the_last_bit_is_lost_and_float32_keeps_it():
    tiny = planted("w", normal(2, 48, 2) * 1e-6, normal(2, 2, 16))
    kernel = np.sign(KERNEL) + KERNEL  # no entry near zero, where small changes would be kept
    assert [(row.lost, row.unmoved) for row in rounding_rows(base_of("w", kernel), tiny)] == [(1.0, 1.0)] * 2
    assert all(row.lost < 1e-2 for row in rounding_rows(base_of("w", kernel), ADAPTER, dtype="float32"))


def test_some_rows_stand_for_all():
    whole, some = (rounding_rows(base_of("w", KERNEL), ADAPTER, rows=rows) for rows in (None, 24))
    for one, other in zip(whole, some, strict=True):
        assert one != other
        assert (other.lost, other.unmoved) == pytest.approx((one.lost, one.unmoved), rel=0.5)


def test_no_change_loses_nothing():
    still = planted("w", np.zeros((2, 48, 2)), normal(2, 2, 16))
    assert [(row.lost, row.unmoved) for row in rounding_rows(base_of("w", KERNEL), still)] == [(0.0, 0.0)] * 2
