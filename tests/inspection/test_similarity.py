"""Two changes beside each other, against the matrices written out and against what theory expects by chance."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from planted import RANK, base_of, change_of, lora_on, normal, orthonormal, planted, site_of

from vlora_jax import Adapter
from vlora_jax.adapters.diagonal import Diagonal
from vlora_jax.errors import BaseMismatchError, ConfigError, ConversionError
from vlora_jax.inspection.similarity import MOST, diff_rows, drift_rows, parameter_diffs, subspace_grids

N, OUT, DEPTH = 40, 60, 24


def random_lora(rank: int) -> Adapter:
    return planted("w", normal(DEPTH, N, rank), normal(DEPTH, rank, OUT))


def expected_overlap(n: int, i: int, j: int) -> tuple[float, float]:
    """Mean and deviation of φ of independent random subspaces of i and j dimensions.

    E[tr P P'] = i·j/n, because E[P'] = (j/n)·1; the variance is that of a quadratic form in a uniform projector.
    """
    smaller = min(i, j)
    variance = 2 * i * j * (n - i) * (n - j) / (n**2 * (n - 1) * (n + 2))
    return i * j / n / smaller, np.sqrt(variance) / smaller


def test_changes_within_one_subspace_score_one():
    """The same columns and rows in other coordinates: another ΔW, no new direction."""
    one = random_lora(RANK)
    factors = one.factors("w")
    turned = planted("w", factors["a"] @ normal(RANK, RANK), normal(RANK, RANK) @ factors["b"])
    (row,) = diff_rows(one, turned)
    assert (row.input, row.output) == pytest.approx((1.0, 1.0), abs=1e-4)
    assert abs(row.cosine) < 0.9


@pytest.mark.parametrize(("i", "j"), [(RANK, RANK), (RANK, 10)])
def test_independent_changes_score_what_theory_gives(i, j):
    (row,) = diff_rows(random_lora(i), random_lora(j))
    for found, chance, n in ((row.input, row.chance_input, N), (row.output, row.chance_output, OUT)):
        mean, deviation = expected_overlap(n, i, j)
        assert chance == pytest.approx(mean)
        assert abs(found - mean) < 4 * deviation / np.sqrt(DEPTH)
        assert deviation < mean  # the bound above tells something


def test_norms_cosine_and_distance_are_those_of_the_matrices():
    one, other = random_lora(RANK), random_lora(10)
    a, b = change_of(one, "w"), change_of(other, "w")
    (whole,) = diff_rows(one, other)
    assert (whole.norm, whole.other_norm) == pytest.approx((np.linalg.norm(a), np.linalg.norm(b)), rel=1e-5)
    assert whole.distance == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-5)
    assert whole.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
    rows = diff_rows(one, other, per_layer=True)
    assert [row.layer for row in rows] == list(range(DEPTH))
    assert rows[3].distance == pytest.approx(np.linalg.norm(b[3] - a[3]) / np.linalg.norm(a[3]), rel=1e-5)


def test_small_distances_are_not_lost_in_large_norms():
    one = random_lora(RANK)
    factors = one.factors("w")
    near = planted("w", factors["a"], factors["b"] * np.float32(1 + 1e-4))
    (row,) = diff_rows(one, near)
    assert row.distance == pytest.approx(1e-4, rel=1e-2)
    assert row.cosine == pytest.approx(1.0)


def test_other_methods_are_compared_by_their_matrices():
    """A LoRA and a diagonal of the same kernel; the diagonal has no factors and needs the base's shape."""
    d = normal(OUT)
    one = lora_on("w", (), normal(OUT, RANK), normal(RANK, OUT))
    other = Adapter.of(Diagonal(), [site_of("w", (), (OUT, OUT))], trainable={"w": {"d": jnp.asarray(d)}})
    base = base_of("w", normal(OUT, OUT))
    (row,) = diff_rows(one, other, base, base)
    a, b = change_of(one, "w"), np.diag(d)
    assert row.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
    assert (row.output, row.chance_output) == pytest.approx((1.0, 1.0), abs=1e-4)  # a diagonal spans everything
    with pytest.raises(ConversionError, match="diagonal has no factors, so its ΔW needs the base"):
        diff_rows(one, other)


def test_kernels_of_one_adapter_only_are_said_to_be_so():
    one, other = random_lora(RANK), planted("v", normal(2, N, RANK), normal(2, RANK, OUT))
    rows = {row.path: row for row in diff_rows(one, other)}
    assert (rows["w"].other_norm, rows["w"].cosine, rows["w"].output) == (None, None, None)
    assert (rows["v"].norm, rows["v"].distance) == (None, None)
    assert rows["v"].other_norm == pytest.approx(np.linalg.norm(change_of(other, "v")), rel=1e-5)


def test_no_change_is_like_nothing():
    one = random_lora(RANK)
    (row,) = diff_rows(one, planted("w", one.factors("w")["a"], np.zeros((DEPTH, RANK, OUT))))
    assert (row.other_norm, row.distance) == pytest.approx((0.0, 1.0))
    assert (row.cosine, row.input, row.output) == (None, None, None)


def test_adapters_of_other_models_are_refused():
    other = planted("w", normal(DEPTH, N + 1, RANK), normal(DEPTH, RANK, OUT))
    with pytest.raises(
        BaseMismatchError, match=r"w is \(24, 40, 60\) for one adapter and \(24, 41, 60\) for the other"
    ):
        diff_rows(random_lora(RANK), other)


def test_what_depends_on_the_input_is_refused():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Gated(Diagonal):
        mergeable = False

    gated = Adapter.of(Gated(), [site_of("w", ())], trainable={"w": {"d": jnp.ones(9)}})
    with pytest.raises(ConversionError, match="depends on the input"):
        diff_rows(gated, gated)


def test_the_grid_is_the_papers_measure_of_leading_directions():
    """φ(i, j) = ‖Uᵢᵀ U'ⱼ‖² / min(i, j), with singular vectors from NumPy."""
    one, other = random_lora(3), random_lora(5)
    grid = subspace_grids(one, other)["w"]
    assert grid.shape == (3, 5)
    tops = [np.linalg.svd(change_of(each, "w"), full_matrices=False)[2] for each in (one, other)]
    for i, j in ((1, 1), (2, 5), (3, 4)):
        overlap = np.linalg.norm(tops[0][:, :i] @ tops[1][:, :j].swapaxes(1, 2), axis=(1, 2)) ** 2 / min(i, j)
        assert grid[i - 1, j - 1] == pytest.approx(overlap.mean(), rel=1e-3)


def test_the_grid_is_of_layers_in_which_both_change_and_of_the_leading_directions():
    one, other = random_lora(3), random_lora(MOST + 3)
    factors = other.factors("w")
    half = planted("w", factors["a"] * (np.arange(DEPTH) < DEPTH // 2)[:, None, None], factors["b"])
    first = [planted("w", each.factors("w")["a"][: DEPTH // 2], each.factors("w")["b"][: DEPTH // 2]) for each in
             (one, other)]  # fmt: skip
    grid = subspace_grids(one, half)["w"]
    assert grid.shape == (3, MOST)
    np.testing.assert_allclose(grid, subspace_grids(*first)["w"], atol=1e-5)
    assert subspace_grids(one, planted("w", factors["a"] * 0, factors["b"])) == {}


def test_drift_follows_a_change_from_nothing_to_its_end():
    """Half way along the same direction, then aside: half the norm and like the end, then a step of known length."""
    u, v = orthonormal(1, N, 2), orthonormal(1, OUT, 2).swapaxes(1, 2)
    stages = [np.zeros((1, 2)), np.array([[1.0, 0.0]]), np.array([[2.0, 0.0]]), np.array([[2.0, 1.0]])]
    rows = drift_rows([(10 * place, planted("w", u * stage, v)) for place, stage in enumerate(stages)])
    assert [(row.path, row.step) for row in rows] == [("w", 0), ("w", 10), ("w", 20), ("w", 30)]
    last = np.sqrt(5)
    assert [row.norm for row in rows] == pytest.approx([0, 1, 2, last], abs=1e-5)
    assert rows[0].moved is None
    assert [row.moved for row in rows[1:]] == pytest.approx([1 / last] * 3, abs=1e-5)
    assert rows[0].cosine is None
    assert [row.cosine for row in rows[1:]] == pytest.approx([2 / last, 2 / last, 1.0], abs=1e-5)
    assert [row.output for row in rows[1:]] == pytest.approx([1.0, 1.0, 1.0], abs=1e-5)
    with pytest.raises(ConfigError, match="no checkpoints"):
        drift_rows([])


def test_models_are_compared_parameter_by_parameter():
    one = {"head": {"kernel": jnp.asarray([[3.0, 4.0]])}, "step": jnp.int32(1)}
    (row,) = parameter_diffs(one, {"head": {"kernel": jnp.asarray([[3.0, 0.0]])}, "step": jnp.int32(2)})
    assert (row.path, row.shape, row.distance, row.cosine) == (
        "head/kernel",
        (1, 2),
        pytest.approx(0.8),
        pytest.approx(0.6),
    )
    with pytest.raises(
        BaseMismatchError, match="only one of the models has haed/kernel; nearest in the other: head/kernel"
    ):
        parameter_diffs({"head": {"kernel": jnp.ones(2)}}, {"haed": {"kernel": jnp.ones(2)}})
    with pytest.raises(BaseMismatchError, match=r"w is \(2,\) in one model and \(3,\) in the other"):
        parameter_diffs({"w": jnp.ones(2)}, {"w": jnp.ones(3)})
