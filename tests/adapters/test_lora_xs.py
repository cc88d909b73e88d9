"""LoRA-XS: its frozen sides, its start, what its square reaches, its gradient and its size."""

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
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError

KERNEL = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
SITE = Site("up", "kernel", "dense", (2,), (5, 7), (0,), (1,))


def start(method):
    factors = jax.jit(method.init_stack, static_argnums=1)(jax.random.key(0), SITE, jnp.asarray(KERNEL))
    return factors.trainable | factors.frozen


def layer_of(factors, layer):
    return {name: value[layer] for name, value in factors.items()}


def test_singular_values_are_on_the_input_side_and_r_starts_small():
    factors = start(vj.LoRAXS(rank=3))
    sigma = np.linalg.svd(KERNEL, compute_uv=False)[:, :3]
    close(np.linalg.norm(factors["a"], axis=1), sigma)
    close(factors["b"] @ factors["b"].transpose(0, 2, 1), np.broadcast_to(np.eye(3), (2, 3, 3)), 1e-5)
    wide = Site("up", "kernel", "dense", (2,), (40, 60), (0,), (1,))
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(2, 40, 60)), jnp.float32)
    r = vj.LoRAXS(rank=40).init_stack(jax.random.key(0), wide, kernel).trainable["r"]
    close(np.std(r, axis=(1, 2)) / 1e-5, [1, 1], 0.05)
    assert not np.array_equal(*r)


def test_the_identity_adds_the_best_approximation_and_its_negative_takes_the_kernel_off():
    method = vj.LoRAXS(rank=3, alpha=3.0)
    factors, kernel = layer_of(start(method), 1), jnp.asarray(KERNEL[1])
    u, sigma, v = np.linalg.svd(KERNEL[1])
    close(method.delta(kernel, factors | {"r": jnp.eye(3)}), u[:, :3] * sigma[:3] @ v[:3], 1e-5)
    whole = vj.LoRAXS(rank=5, alpha=5.0)
    factors = layer_of(start(whole), 1)
    close(kernel + whole.delta(kernel, factors | {"r": -jnp.eye(5)}), np.zeros((5, 7)), 1e-5)


def test_alpha_over_rank_scales_it_and_signs_of_singular_vectors_cancel():
    rng = np.random.default_rng(2)
    method, factors = vj.LoRAXS(rank=3, alpha=12.0), layer_of(start(vj.LoRAXS(rank=3)), 0)
    factors["r"] = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
    delta = method.delta(jnp.asarray(KERNEL[0]), factors)
    close(delta, 4 * np.asarray(factors["a"]) @ factors["r"] @ factors["b"], 1e-5)
    signs = jnp.asarray([1.0, -1.0, -1.0])
    flipped = {
        "a": factors["a"] * signs,
        "b": signs[:, None] * factors["b"],
        "r": factors["r"] * signs * signs[:, None],
    }
    close(method.delta(jnp.asarray(KERNEL[0]), flipped), delta, 1e-5)
    flipped["r"] = factors["r"]
    assert np.abs(method.delta(jnp.asarray(KERNEL[0]), flipped) - delta).max() > 0.1


def test_its_gradient_is_the_kernel_s_between_the_frozen_sides():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 6, rngs=rngs))
    adapter = moved(jax.jit(lambda base: vj.init(vj.LoRAXS(rank=2, alpha=3.0), jax.random.key(0), base))(base))
    x = jnp.asarray(np.random.default_rng(7).normal(size=(5, 4)), jnp.float32)
    kernel = vj.merge(base, adapter)["kernel"].get_value()
    loss = lambda trainable: jnp.sin(vj.apply(graphdef, base, adapter.with_trainable(trainable), x)).sum()
    gradient = jax.jit(jax.grad(loss))(adapter.trainable)["sites"][""]["r"]
    of_kernel = np.asarray(x).T @ np.cos(x @ kernel + base["bias"].get_value())
    factors = {name: np.asarray(value) for name, value in adapter.factors("").items()}
    close(gradient, 1.5 * factors["a"].T @ of_kernel @ factors["b"].T, 1e-5)


def test_one_plain_lora_of_its_rank_holds_it_exactly():
    base = parameters(LaxScanned)[1]
    adapter = moved(jax.jit(lambda base: vj.init(vj.LoRAXS(rank=2, targets="up"), jax.random.key(0), base))(base))
    lora, residuals = vj.as_lora(base, adapter, max_rank=2)
    assert not any(residual.any() for residual in residuals.values())
    for site in adapter.sites:
        kernel = site.read(flatten(base))
        close(site_delta(lora, site, kernel), site_delta(adapter, site, kernel))


def decoder(width, inner, keys, mlp):
    """The seven linear maps of a gated decoder's layer."""
    kernels = {"q": (width, inner), "k": (width, keys), "v": (width, keys), "o": (inner, width)}
    return kernels | {"gate": (width, mlp), "up": (width, mlp), "down": (mlp, width)}


MISTRAL_7B = LLAMA3_8B = decoder(4096, 4096, 1024, 14336)
GEMMA_7B = decoder(3072, 4096, 4096, 24576)


@pytest.mark.parametrize(
    ("layers", "sides", "options", "numbers"),
    [
        (24, roberta(1024), {"rank": 25, "targets": "query|value|out|down"}, 60_000),
        (32, MISTRAL_7B, {"rank": 64}, 917_504),
        (28, GEMMA_7B, {"rank": 64}, 802_816),
        (32, LLAMA3_8B, {"rank": 128}, 3_670_016),
    ],
)
def test_as_many_numbers_train_as_are_published(layers, sides, options, numbers):
    base = vj.split(nnx.eval_shape(lambda: Kernels(layers, sides, nnx.Rngs(0))))[1]
    adapter = jax.eval_shape(lambda base: vj.init(vj.LoRAXS(**options), jax.random.key(0), base), base)
    assert vj.count(adapter) == numbers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora_xs: rank is 0; it must be at least 1"),
        ({"deviation": -1.0}, "lora_xs: deviation is -1.0; it must be at least 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        vj.LoRAXS(**options)


def test_a_rank_above_the_smaller_side_is_refused():
    with pytest.raises(ConfigError, match=r"lora_xs: rank 6 is above the smaller side, 5, of up \(5, 7\)"):
        start(vj.LoRAXS(rank=6))
