"""FLOPs read from compiled programs, against counts by hand."""

import re

import jax
import jax.numpy as jnp
import pytest

from vlora_jax.errors import ResourceError
from vlora_jax.inspection.hlo import dot_flops

W = jax.ShapeDtypeStruct((4, 6, 6), jnp.float32)
X = jax.ShapeDtypeStruct((5, 6), jnp.float32)
N = jax.ShapeDtypeStruct((), jnp.int32)
PRODUCT = 2 * 5 * 6 * 6


def text_of(function, *shapes) -> str:
    return jax.jit(function).lower(*shapes).compile().as_text()


def layers(w, x):
    return jax.lax.scan(lambda h, w: (jnp.sin(h @ w), None), x, w)[0]


def test_batched_and_multi_axis_products():
    """Two each for every entry of the result and of the contracted axes, wherever those are."""
    left, right = jax.ShapeDtypeStruct((3, 4, 5, 6), jnp.float32), jax.ShapeDtypeStruct((3, 6, 7, 4), jnp.float32)
    text = text_of(lambda a, b: jnp.einsum("bijk,bkli->bjl", a, b), left, right)
    assert dot_flops(text) == 2 * (3 * 5 * 7) * (4 * 6)


def test_no_product_no_flops():
    assert dot_flops(text_of(lambda x: jnp.sin(x).sum(), X)) == 0


def test_nested_loops_count_as_often_as_they_run():
    twice = lambda w, x: jax.lax.fori_loop(0, 3, lambda _, h: layers(w, h), x)
    assert dot_flops(text_of(twice, W, X)) == 3 * 4 * PRODUCT


def test_a_training_step_of_frozen_and_trained_layers():
    """Forward 1, activation gradient 1 (the first layer's is not needed), weight gradient 1 where it trains."""
    loss = lambda w, x: layers(w, x).sum()
    assert dot_flops(text_of(jax.grad(loss, argnums=1), W, X)) == 4 * 2 * PRODUCT
    assert dot_flops(text_of(jax.grad(loss, argnums=(0, 1)), W, X)) == 4 * 3 * PRODUCT


def test_rematerialised_layers_count_twice_forward():
    remat = jax.checkpoint(lambda h, w: jnp.sin(jnp.sin(h @ w) @ w), prevent_cse=False)
    loss = lambda w, x: jax.lax.scan(lambda h, w: (remat(h, w), None), x, w)[0].sum()
    # forward 2 products a layer, again 2 in the backward pass, and 2 activation gradients
    assert dot_flops(text_of(jax.grad(loss, argnums=1), W, X)) == 4 * 6 * PRODUCT


def test_every_branch_counts():
    branches = lambda n, x: jax.lax.switch(n, [lambda x: jnp.sin(x @ x), lambda x: jnp.cos(x @ jnp.sin(x @ x))], x)
    square = jax.ShapeDtypeStruct((6, 6), jnp.float32)
    assert dot_flops(text_of(branches, N, square)) == 3 * 2 * 6**3


def test_a_loop_of_unknown_length_is_an_error():
    square = jax.ShapeDtypeStruct((6, 6), jnp.float32)
    text = text_of(lambda n, x: jax.lax.fori_loop(0, n, lambda _, h: jnp.sin(h @ h), x), N, square)
    with pytest.raises(ResourceError, match="its trip count is not to be read from this program"):
        dot_flops(text)


def test_without_the_compilers_note_a_scan_is_counted_by_its_condition():
    text = text_of(layers, W, X)
    assert "known_trip_count" in text
    assert dot_flops(re.sub(r'"known_trip_count":\{[^}]*\},?', "", text)) == dot_flops(text) == 4 * PRODUCT
