"""SVFit: singular values change and nothing else, with their closed-form gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, moved, parameters
from test_lora import Kernels, roberta
from third_party import LaxScanned

import vlora_jax as vj
from vlora_jax.adapters.merge import site_delta
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError


@pytest.fixture(scope="module")
def linear():
    graphdef, base = parameters(lambda rngs: nnx.Linear(5, 7, rngs=rngs))
    return graphdef, base, jax.jit(lambda base: vj.init(vj.SVFit(rank=3), jax.random.key(0), base))(base)


def with_change(adapter, change):
    return adapter.with_trainable(adapter.trainable | {"sites": {"": {"delta": jnp.asarray(change, jnp.float32)}}})


def test_only_the_largest_singular_values_change(linear):
    _, base, adapter = linear
    assert not adapter.factors("")["delta"].any()
    change = np.array([0.3, 0.2, 0.1, 0, 0])
    merged = vj.merge(base, with_change(adapter, change[:3]))["kernel"].get_value()
    u, sigma, v = np.linalg.svd(base["kernel"].get_value(), full_matrices=False)
    close(merged, u * (sigma + change) @ v, 1e-5)
    close(np.linalg.svd(merged, compute_uv=False), sigma + change, 1e-5)


def test_the_gradient_of_a_singular_value_is_the_kernel_s_between_its_vectors(linear):
    graphdef, base, adapter = linear
    adapter = moved(adapter)
    x = jnp.asarray(np.random.default_rng(7).normal(size=(6, 5)), jnp.float32)
    loss = lambda trainable: jnp.sin(vj.apply(graphdef, base, adapter.with_trainable(trainable), x)).sum()
    gradient = jax.jit(jax.grad(loss))(adapter.trainable)["sites"][""]["delta"]
    kernel = vj.merge(base, adapter)["kernel"].get_value()
    of_kernel = np.asarray(x).T @ np.cos(x @ kernel + base["bias"].get_value())
    u, _, v = np.linalg.svd(base["kernel"].get_value(), full_matrices=False)
    close(gradient, [u[:, i] @ of_kernel @ v[i] for i in range(3)], 1e-5)


def test_with_all_singular_values_the_kernel_can_be_taken_off(linear):
    _, base, _ = linear
    kernel = base["kernel"].get_value()
    adapter = jax.jit(lambda base: vj.init(vj.SVFit(rank=5), jax.random.key(0), base))(base)
    sigma = np.linalg.svd(kernel, compute_uv=False)
    close(vj.merge(base, with_change(adapter, -sigma))["kernel"].get_value(), np.zeros((5, 7)), 1e-5)


def test_one_plain_lora_of_its_rank_holds_it_exactly():
    base = parameters(LaxScanned)[1]
    adapter = moved(jax.jit(lambda base: vj.init(vj.SVFit(rank=2, targets="up"), jax.random.key(0), base))(base))
    lora, residuals = vj.as_lora(base, adapter, max_rank=2)
    assert not any(residual.any() for residual in residuals.values())
    for site in adapter.sites:
        kernel = site.read(flatten(base))
        close(site_delta(lora, site, kernel), site_delta(adapter, site, kernel))


def test_it_trains_a_sixteenth_of_lora_s_numbers():
    """RoBERTa-base, query and value, all 768 singular values: 18 432 against 294 912 of LoRA with rank 8."""
    base = vj.split(nnx.eval_shape(lambda: Kernels(12, roberta(768), nnx.Rngs(0))))[1]
    sizes = [
        vj.count(jax.eval_shape(lambda base: vj.init(method, jax.random.key(0), base), base))
        for method in (vj.SVFit(rank=768, targets="query|value"), vj.LoRA(rank=8, targets="query|value"))
    ]
    assert sizes == [18_432, 294_912]


def test_more_singular_values_than_there_are_are_refused(linear):
    _, base, _ = linear
    with pytest.raises(
        ConfigError, match=r"svfit: rank 6 is above the smaller side, 5, of  \(5, 7\); lower it there with"
    ):
        vj.init(vj.SVFit(rank=6), jax.random.key(0), base)
    with pytest.raises(ConfigError, match="svfit: rank is 0; it must be at least 1"):
        vj.SVFit(rank=0)


@pytest.mark.parametrize("method", [vj.SVFit, vj.LoRAXS, vj.LaMDA])
def test_tables_give_sites_their_own_rank(method):
    base = parameters(LaxScanned)[1]
    wide = method(rank=2, targets="up|down", rank_pattern={"down": 3})
    alike = method(rank=3, targets="down")
    new = jax.jit(lambda base: [vj.init(each, jax.random.key(0), base) for each in (wide, alike)])
    patterned, plain = map(moved, new(base))
    assert patterned.factors("blocks/up")["a"].shape == (3, 4, 2)
    (site,) = plain.sites
    kernel, own = site.read(flatten(base)), {"blocks/down": plain.trainable["sites"]["blocks/down"]}
    same = patterned.with_trainable(patterned.trainable | {"sites": patterned.trainable["sites"] | own})
    close(site_delta(same, site, kernel), site_delta(plain, site, kernel))


@pytest.mark.parametrize("method", [vj.SVFit, vj.LoRAXS, vj.LaMDA])
def test_a_randomised_start_is_near_the_exact_one(method):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(side, 20)))[0] for side in (30, 20))
    kernel = jnp.asarray(u * 0.7 ** np.arange(20) @ v.T, jnp.float32)
    site = vj.Site("up", "kernel", "dense", (), (30, 20), (0,), (1,))
    for niter in (0, 8):
        start = jax.jit(method(rank=3, niter=niter).init_stack, static_argnums=1)(jax.random.key(0), site, kernel)
        sides = start.frozen["a"], start.trainable["b"] if "b" in start.trainable else start.frozen["b"]
        spanned = [side @ np.linalg.pinv(side) for side in (sides[0], sides[1].T)]
        close(spanned[0], u[:, :3] @ u[:, :3].T, 1e-4)
        close(spanned[1], v[:, :3] @ v[:, :3].T, 1e-4)


def test_iterations_below_zero_are_refused():
    with pytest.raises(ConfigError, match="svfit: niter is -1; it must be at least 0"):
        vj.SVFit(niter=-1)
