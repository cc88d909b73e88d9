"""Spectra of changes, against NumPy's SVD of the change written out."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from planted import IN, LAYERS, OUT, RANK, change_of, lora_on, normal, site_of

from vlora_jax import Adapter, LoRA
from vlora_jax.adapters.diagonal import Diagonal
from vlora_jax.errors import BaseMismatchError
from vlora_jax.inspection.spectra import adapter_spectra, effective_rank, product_values


@pytest.fixture(scope="module")
def stacked() -> Adapter:
    return lora_on("w", (LAYERS,), normal(LAYERS, IN, RANK), normal(LAYERS, RANK, OUT))


def test_values_from_factors_are_those_of_the_whole_change(stacked):
    spectrum = adapter_spectra(None, stacked)["w"]
    expected = np.linalg.svd(change_of(stacked, "w"), compute_uv=False)
    assert spectrum.values.shape == (LAYERS, RANK)
    np.testing.assert_allclose(spectrum.values, expected[:, :RANK], rtol=1e-5)
    np.testing.assert_allclose(spectrum.norm, np.linalg.norm(change_of(stacked, "w"), axis=(1, 2)), rtol=1e-5)
    assert spectrum.base is None


def test_stacked_layers_equal_a_loop(stacked):
    spectrum = adapter_spectra(None, stacked)["w"]
    factors = stacked.factors("w")
    alone = [adapter_spectra(None, lora_on("w", (), factors["a"][i], factors["b"][i]))["w"] for i in range(LAYERS)]
    np.testing.assert_allclose(spectrum.values, np.concatenate([each.values for each in alone]), rtol=1e-6)
    assert spectrum.layers == (0, 1, 2)
    assert alone[0].layers == (None,)


def test_two_layer_axes_are_counted_through():
    """Kernels stacked twice, as in blocks of blocks: layer 4 of (2, 3) is [1, 1]."""
    a, b = normal(2, 3, IN, RANK), normal(2, 3, RANK, OUT)
    spectrum = adapter_spectra(None, lora_on("w", (2, 3), a, b))["w"]
    expected = np.linalg.svd(6.0 / RANK * a[1, 1] @ b[1, 1], compute_uv=False)[:RANK]
    np.testing.assert_allclose(spectrum.values[4], expected, rtol=1e-5)


def test_more_columns_than_the_kernel_has_rows():
    """The factors of a chain's late layers are wider than the kernel; its rank is at most the smaller side."""
    left, right = normal(IN, 20), normal(20, OUT)
    expected = np.linalg.svd(left.astype(np.float64) @ right, compute_uv=False)
    np.testing.assert_allclose(product_values(jnp.asarray(left), jnp.asarray(right)), expected, rtol=1e-5)


def test_a_planted_rank_is_found():
    """Orthonormal directions with equal weight: exactly 3; with unequal weight: below 3, but near."""
    u, v = (np.linalg.qr(normal(size, 3))[0].astype(np.float32) for size in (IN, OUT))
    pad = np.zeros((IN, 1), np.float32)
    a, b = np.concatenate([u, pad], 1), np.concatenate([v, normal(OUT, 1)], 1).T
    equal = lora_on("w", (), a, b)
    assert adapter_spectra(None, equal)["w"].effective_rank[0] == pytest.approx(3.0, abs=1e-4)
    unequal = lora_on("w", (), a * np.array([1.0, 0.7, 0.5, 1.0], np.float32), b)
    assert 2.5 < adapter_spectra(None, unequal)["w"].effective_rank[0] < 3.0


def test_no_change_has_norm_and_rank_zero(stacked):
    factors = stacked.factors("w")
    fresh = stacked.with_trainable({"sites": {"w": factors | {"b": factors["b"] * 0}}, "shared": {}, "full": {}})
    spectrum = adapter_spectra(None, fresh)["w"]
    assert spectrum.norm.tolist() == spectrum.effective_rank.tolist() == [0.0] * LAYERS


def test_effective_rank_is_the_exponential_of_the_entropy():
    p = np.array([0.5, 0.25, 0.25])
    assert effective_rank(7 * p) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert effective_rank(np.array([3.0, 0.0])) == 1.0


def test_a_method_without_factors_is_measured_whole():
    """diag(d) is no thin product: its singular values, |d|, come from the matrix, which needs the kernel's shape."""
    d = normal(LAYERS, OUT)
    adapter = Adapter.of(Diagonal(), [site_of("w", (LAYERS,))], trainable={"w": {"d": jnp.asarray(d)}})
    kernel = normal(LAYERS, IN, OUT)
    spectrum = adapter_spectra({"w": {"kernel": jnp.asarray(kernel)}}, adapter)["w"]
    np.testing.assert_allclose(spectrum.values, -np.sort(-np.abs(d), axis=1), rtol=1e-5)
    np.testing.assert_allclose(spectrum.base, np.linalg.norm(kernel, axis=(1, 2)), rtol=1e-6)
    assert adapter_spectra(None, adapter) == {}


def test_a_change_that_depends_on_the_input_has_no_spectrum(stacked):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Gated(LoRA):
        mergeable = False

    assert adapter_spectra(None, dataclasses.replace(stacked, method=Gated(rank=RANK))) == {}


def test_a_base_without_the_site_is_refused(stacked):
    with pytest.raises(BaseMismatchError, match=r"changes w/kernel; nearest parameters of this base: v/kernel"):
        adapter_spectra({"v": {"kernel": jnp.ones((LAYERS, IN, OUT))}}, stacked)
