"""Intruder dimensions, planted and counted, and taken back, against the definition in NumPy."""

import dataclasses

import numpy as np
import pytest
from planted import base_of, change_of, normal, orthonormal, planted

from vlora_jax import DoRA, LoRA, PiSSA, VeRA
from vlora_jax.errors import ConfigError, ConversionError
from vlora_jax.inspection.intruders import intruder_rows, reduce_intruders

IN, OUT, RANK, DEPTH = 32, 48, 2, 2
KERNEL = normal(DEPTH, IN, OUT)
BASE = base_of("w", KERNEL)


def planted_at(strength: float):
    """Two random orthonormal directions of one strength in every layer."""
    return planted("w", strength * orthonormal(DEPTH, IN, RANK), orthonormal(DEPTH, OUT, RANK).swapaxes(1, 2))


STRONG = planted_at(30.0)


def by_definition(
    kernel: np.ndarray, change: np.ndarray, top: int = 10, epsilon: float = 0.5
) -> tuple[int, int, np.ndarray]:
    """Counts on the output and on the input side, and the cosines on the output side."""
    u, _, v = np.linalg.svd(kernel, full_matrices=False)
    new_u, _, new_v = np.linalg.svd(kernel + change, full_matrices=False)
    output, inputs = np.abs(new_v[:top] @ v.T).max(1), np.abs(new_u[:, :top].T @ u).max(1)
    return int((output < epsilon).sum()), int((inputs < epsilon).sum()), output


@pytest.mark.parametrize(("strength", "count"), [(0.01, 0), (30.0, RANK)])
def test_strong_new_directions_are_counted_and_weak_ones_are_not(strength, count):
    assert [row.output for row in intruder_rows(BASE, planted_at(strength))] == [count] * DEPTH


@pytest.mark.parametrize("adapter", [STRONG, planted("w", normal(DEPTH, IN, RANK), normal(DEPTH, RANK, OUT))])
def test_counts_and_cosines_are_those_of_the_definition(adapter):
    for row, kernel, change in zip(intruder_rows(BASE, adapter), KERNEL, change_of(adapter, "w"), strict=True):
        output, inputs, cosines = by_definition(kernel, change)
        assert (row.output, row.input) == (output, inputs)
        np.testing.assert_allclose(row.cosines, cosines, atol=1e-4)


def test_no_change_has_no_intruders():
    rows = intruder_rows(BASE, planted_at(0.0))
    np.testing.assert_allclose([row.cosines for row in rows], 1.0, atol=1e-4)
    assert [(row.output, row.input) for row in rows] == [(0, 0)] * DEPTH


def test_other_bases_of_both_sides_change_nothing():
    turn_in, turn_out = orthonormal(IN, IN), orthonormal(OUT, OUT)
    factors = STRONG.factors("w")
    turned = planted("w", turn_in @ np.asarray(factors["a"]), np.asarray(factors["b"]) @ turn_out)
    rows, again = intruder_rows(BASE, STRONG), intruder_rows(base_of("w", turn_in @ KERNEL @ turn_out), turned)
    np.testing.assert_allclose([row.cosines for row in rows], [row.cosines for row in again], atol=1e-3)


@pytest.mark.parametrize("keep", [1.0, 0.75, 0.0])
def test_the_remedy_is_the_formula_cut_to_the_rank(keep):
    """W'' - W from NumPy's SVDs, its best approximation of the adapter's rank, and what that leaves out."""
    reduced, rows = reduce_intruders(BASE, STRONG, keep=keep)
    assert [(row.path, row.layer, row.intruders) for row in rows] == [("w", 0, RANK), ("w", 1, RANK)]
    assert reduced.method == STRONG.method
    for layer, (kernel, change) in enumerate(zip(KERNEL, change_of(STRONG, "w"), strict=True)):
        u, values, v = np.linalg.svd(kernel + change, full_matrices=False)
        intruders = np.flatnonzero(by_definition(kernel, change)[2] < 0.5)
        wanted = change + (keep - 1) * (u[:, intruders] * values[intruders]) @ v[intruders]
        u, values, v = np.linalg.svd(wanted)
        found = change_of(reduced, "w")[layer]
        np.testing.assert_allclose(found, (u[:, :RANK] * values[:RANK]) @ v[:RANK], atol=2e-4 * values[0])
        left_out = np.linalg.norm(values[RANK:]) / np.linalg.norm(values)
        assert rows[layer].left_out == pytest.approx(left_out, abs=1e-4)


def test_layers_without_intruders_stay_bit_for_bit():
    factors, weak = STRONG.factors("w"), planted_at(0.01).factors("w")
    mixed = planted("w", np.stack([weak["a"][0], factors["a"][1]]), np.stack([weak["b"][0], factors["b"][1]]))
    reduced, rows = reduce_intruders(BASE, mixed, keep=0.0)
    assert [row.intruders for row in rows] == [0, RANK]
    new = reduced.factors("w")
    assert all(np.array_equal(new[name][0], mixed.factors("w")[name][0]) for name in "ab")
    assert [row.output for row in intruder_rows(BASE, reduced)] == [0, 0]


def test_what_cannot_be_is_refused():
    for message, options in {
        "keep is 1.5; it must be a share": {"keep": 1.5},
        "top is 0; it must be at least 1": {"top": 0},
        "epsilon is 0.0; it must be a cosine": {"epsilon": 0.0},
    }.items():
        with pytest.raises(ConfigError, match=message):
            reduce_intruders(BASE, STRONG, **options)
    for method in (VeRA(), LoRA(rank_pattern={"w": (2, 1)}), DoRA(), PiSSA()):
        with pytest.raises(ConversionError, match="as_lora makes such a one"):
            reduce_intruders(BASE, dataclasses.replace(STRONG, method=method))
