"""FourierFT: its transform against NumPy's, PEFT's places, both ways through it, and the sizes that are published."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, stacked_sites, trained_numbers

import vlora_jax as vj
from vlora_jax.adapters.fourierft import permuted, waves
from vlora_jax.adapters.view import Lookup
from vlora_jax.errors import ConfigError, TargetError
from vlora_jax.inspection.hlo import dot_flops

RNG = np.random.default_rng(0)


def transformed(method, shape, spectrum):
    """ΔW by NumPy, in PEFT's orientation (out, in) and then turned."""
    flat = np.zeros(math.prod(shape))
    flat[permuted(math.prod(shape), method.frequencies, method.seed)] = spectrum
    return method.scaling * np.fft.ifft2(flat.reshape(shape[::-1])).real.T


@pytest.mark.parametrize("shape", [(6, 6), (5, 8), (8, 5)])
def test_a_change_is_the_real_part_of_the_inverse_transform(shape):
    method = vj.FourierFT(frequencies=7)
    spectrum = RNG.normal(size=7).astype(np.float32)
    run = lambda c: (method.delta(jnp.zeros(shape), {"spectrum": c}), *method.pair(shape, {"spectrum": c}))
    delta, left, right = jax.jit(run)(spectrum)
    close(delta, transformed(method, shape, spectrum))
    close(left @ right, delta, 1e-5)
    assert (left.shape, right.shape) == ((shape[0], 14), (14, shape[1]))


def test_one_coefficient_is_one_wave():
    """Place p of a kernel (in, out) is row p // in and column p mod in of S (out, in)."""
    inputs, outputs = 5, 8
    method = vj.FourierFT(frequencies=1, scaling=40.0)
    row, column = divmod(int(permuted(40, 1, 777)[0]), inputs)
    delta = method.delta(jnp.zeros((inputs, outputs)), {"spectrum": jnp.asarray([3.0])})
    i, o = np.arange(inputs)[:, None], np.arange(outputs)
    close(delta, 3.0 * np.cos(2 * np.pi * (column * i / inputs + row * o / outputs)))
    assert (row, column) != (0, 0)


def test_the_places_are_those_of_peft():
    """First entries of torch's permutation under seed 777."""
    assert permuted(4096, 6, 777).tolist() == [2151, 945, 3161, 4091, 1983, 1566]
    assert permuted(768**2, 4, 777).tolist() == [391271, 183699, 413551, 384200]
    assert permuted(4096, 3, 777).tolist() == [2151, 945, 3161]
    assert sorted(permuted(40, 40, 777).tolist()) == list(range(40))
    assert permuted(40, 6, 777).tolist() != permuted(40, 6, 778).tolist()


def transforms(method, shape, tokens):
    """Whether a forward pass transforms."""
    forward = lambda x, c: method.forward(x, jnp.zeros((tokens, shape[1])), jnp.zeros(shape), {"spectrum": c})
    return "fft" in str(jax.make_jaxpr(forward)(jnp.zeros((tokens, shape[0])), jnp.zeros(method.frequencies)))


@pytest.mark.parametrize(("frequencies", "built"), [(2, False), (40, True)])
def test_few_coefficients_are_applied_as_waves_and_many_transformed(frequencies, built):
    method, shape = vj.FourierFT(frequencies=frequencies, scaling=10.0), (32, 24)
    assert transforms(method, shape, 50) is built
    spectrum, x = RNG.normal(size=frequencies), RNG.normal(size=(50, 32))

    @jax.jit
    def run(c, x):
        factors, y = {"spectrum": c}, jnp.zeros((50, 24))
        rows = method.forward(Lookup(jnp.asarray([31, 0]), jnp.float32), y[:2], jnp.zeros(shape), factors)
        return method.forward(x, y, jnp.zeros(shape), factors), rows

    change, rows = run(*(jnp.asarray(each, jnp.float32) for each in (spectrum, x)))
    expected = transformed(method, shape, spectrum)
    close(change, x @ expected, 1e-5)
    close(rows, expected[[31, 0]])
    assert (method.low_rank(shape, {"spectrum": jnp.asarray(spectrum)}) is None) is built


def test_waves_of_the_longest_side_are_exact():
    """A float32 product of place and frequency would be off by whole turns."""
    frequencies = np.asarray([1, 32_767, 65_521])
    cosines, sines = jax.jit(lambda: waves(65_536, frequencies))()
    angles = 2 * np.pi * (np.arange(65_536)[:, None] * frequencies % 65_536) / 65_536
    close(cosines, np.cos(angles))
    close(sines, np.sin(angles))


def test_the_spectrum_starts_at_zero_or_normal():
    site = vj.Site("q", "kernel", "dense", (), (64, 48), (0,), (1,))
    assert not vj.FourierFT().init_site(jax.random.key(0), site, None).trainable["spectrum"].any()
    method = vj.FourierFT(start="normal")
    spectrum = method.init_site(jax.random.key(0), site, None).trainable["spectrum"]
    close(np.std(spectrum), 1, 0.1)
    delta = method.delta(jnp.zeros((64, 48)), {"spectrum": spectrum})
    expected = 150 * math.sqrt(1000 / 2) / (64 * 48)  # what its documentation says
    close(np.std(delta) / expected, 1, 0.1)


@pytest.mark.parametrize(
    ("frequencies", "sites", "numbers"),
    [
        (1000, stacked_sites(12, q=(768, 768), v=(768, 768)), 24_000),  # the paper's 0.024M and 0.048M
        (1000, stacked_sites(24, q=(1024, 1024), v=(1024, 1024)), 48_000),
        (1000, stacked_sites(28, q=(3072, 3072), v=(3072, 1024)), 56_000),  # PEFT's method comparison
        (5000, stacked_sites(28, q=(3072, 3072), v=(3072, 1024)), 280_000),
    ],
)
def test_it_trains_as_many_numbers_as_are_published(frequencies, sites, numbers):
    assert trained_numbers(vj.FourierFT(frequencies=frequencies), sites) == numbers


def test_options_and_kernels_that_it_cannot_serve_are_refused(unchecked):
    with pytest.raises(ConfigError, match="fourierft: frequencies is 0; it must be at least 1"):
        vj.FourierFT(frequencies=0)
    with pytest.raises(ConfigError, match="start is 'ones'; it must be one of zeros, normal"):
        vj.FourierFT(start="ones")
    with pytest.raises(ConfigError, match=r"frequencies 1000 is above the 24 numbers of q \(6, 4\)"):
        trained_numbers(vj.FourierFT(), stacked_sites(1, q=(6, 4)))
    with pytest.raises(ConfigError, match=r"head \(4096, 128256\) has 525336576 numbers; .* exclude it"):
        trained_numbers(vj.FourierFT(targets=".*"), stacked_sites(1, head=(4096, 128_256)))


def test_a_pattern_gives_sites_another_number_of_coefficients():
    method = vj.FourierFT(frequencies=6, frequencies_pattern={"v": 3}, start="normal")
    sites = stacked_sites(2, q=(6, 4), v=(6, 4))
    adapter = vj.init(method, jax.random.key(0), {}, sites)
    assert {path: own["spectrum"].shape for path, own in adapter.trainable["sites"].items()} == {
        "q": (2, 6),
        "v": (2, 3),
    }
    spectrum = adapter.factors("v")["spectrum"][1]
    resolved = method.for_site(sites[1])
    close(resolved.delta(jnp.zeros((6, 4)), {"spectrum": spectrum}), transformed(resolved, (6, 4), spectrum), 1e-5)
    with pytest.raises(TargetError, match="frequencies_pattern"):
        trained_numbers(vj.FourierFT(frequencies=6, frequencies_pattern={"k": 3}), sites)
    with pytest.raises(ConfigError, match=r"frequencies_pattern\['v'\] is 0; it must be at least 1"):
        vj.FourierFT(frequencies_pattern={"v": 0})


def test_the_flops_it_states_are_those_of_its_programs():
    """Of the products with waves; of the transform, five a number and halving, as is usual."""
    method, shape = vj.FourierFT(frequencies=2), (32, 24)
    (site,) = stacked_sites(1, q=shape)
    forward = lambda x, c: method.forward(x, jnp.zeros((50, 24)), jnp.zeros(shape), {"spectrum": c})
    compiled = jax.jit(forward).lower(jnp.zeros((50, 32)), jnp.zeros(2)).compile().as_text()
    assert dot_flops(compiled) == 50 * method.flops(site)[0] == 50 * 4 * 2 * (32 + 24)
    close(method.flops(site)[1], 5 * 768 * math.log2(768))
    assert vj.FourierFT(frequencies=700).flops(site)[0] == 2 * 768  # then it is transformed
