"""Where changes point, planted along and across the singular vectors of a kernel."""

import numpy as np
import pytest
from planted import base_of, normal, orthonormal, planted

from vlora_jax.errors import BaseMismatchError
from vlora_jax.inspection import alignment
from vlora_jax.inspection.alignment import alignment_rows

K = 4


def kernel_of(sides: tuple[int, int], size: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A kernel with a falling spectrum, and its singular vectors."""
    p, q = orthonormal(sides[0], size), orthonormal(sides[1], size)
    return (p * 0.8 ** np.arange(size)) @ q.T, p, q


def rows_of(kernel: np.ndarray, left: np.ndarray, right: np.ndarray, k: int = K):
    """Rows of one layer, whose change is `left @ right`."""
    return alignment_rows(base_of("w", kernel[None]), planted("w", left[None], right[None]), k)


@pytest.mark.parametrize("exact", [True, False])
def test_along_and_across_the_leading_directions(exact, monkeypatch):
    """The strongest input directions into the weakest output directions: all of it here, nothing of it there."""
    sides = (40, 30) if exact else (44, 34)  # the same shape again would find the other program
    monkeypatch.setattr(alignment, "EXACT", 10_000 if exact else 0)
    kernel, p, q = kernel_of(sides)
    (row,) = rows_of(kernel, p[:, :2], q[:, -2:].T)
    assert (row.path, row.layer) == ("w", 0)
    assert (row.input, row.output) == pytest.approx((1.0, 0.0), abs=1e-3)
    assert (row.chance_input, row.chance_output) == pytest.approx((K / sides[0], K / sides[1]))
    mixed = np.stack([p[:, 0], p[:, -1]], 1) * np.array([2.0, 1.0])
    (row,) = rows_of(kernel, mixed, np.stack([q[:, 1], q[:, 2]]))
    assert (row.input, row.output) == pytest.approx((0.8, 1.0), abs=1e-3)


def test_a_random_change_has_what_chance_gives():
    kernel = np.stack([kernel_of((40, 30))[0] for _ in range(30)])
    rows = alignment_rows(base_of("w", kernel), planted("w", normal(30, 40, 3), normal(30, 3, 30)), K)
    for found, chance in (("input", K / 40), ("output", K / 30)):
        values = [getattr(row, found) for row in rows]
        assert abs(np.mean(values) - chance) < 4 * np.std(values) / np.sqrt(len(values))


def test_amplification_is_what_the_kernel_does_along_the_change():
    kernel, _, _ = kernel_of((40, 30))
    left, right = normal(40, 2), normal(2, 30)
    (row,) = rows_of(kernel, left, right)
    u, v = np.linalg.qr(left)[0], np.linalg.qr(right.T)[0]
    assert row.amplification == pytest.approx(np.linalg.norm(left @ right) / np.linalg.norm(u.T @ kernel @ v), rel=1e-4)


def test_amplification_is_the_changes_own_whatever_its_factors():
    """One change as a product of two and, each half of it twice, of four: what is dead of those four is rounding."""
    kernel, _, _ = kernel_of((40, 30))
    left, right = normal(40, 2), normal(2, 30)
    (row,) = rows_of(kernel, left, right)
    (again,) = rows_of(kernel, np.concatenate([left, left], 1) / 2, np.concatenate([right, right]))
    assert again.amplification == pytest.approx(row.amplification, rel=1e-3)
    (row,) = rows_of(np.zeros((40, 30)), left, right)
    assert row.amplification == np.inf


def test_no_change_points_nowhere():
    kernel, p, q = kernel_of((40, 30))
    (row,) = rows_of(kernel, p[:, :2] * 0, q[:, :2].T)
    assert (row.input, row.output, row.amplification) == (0.0, 0.0, None)


def test_more_directions_than_the_kernel_has_are_all_of_them():
    kernel, p, q = kernel_of((40, 30))
    (row,) = rows_of(kernel, p[:, :2], q[:, :2].T, k=99)
    assert (row.chance_output, row.output) == pytest.approx((1.0, 1.0), abs=1e-4)


def test_a_base_without_the_kernel_is_refused():
    with pytest.raises(BaseMismatchError, match="nearest parameters of this base: v/kernel"):
        alignment_rows(base_of("v", normal(1, 40, 30)), planted("w", normal(1, 40, 2), normal(1, 2, 30)))
