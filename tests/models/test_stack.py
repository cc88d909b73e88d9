"""Stacked layers: the same as a loop over them, drawn one by one, and shared where a stack is vertical."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError
from vlora_jax.inspection.hlo import dot_flops
from vlora_jax.models.stack import Stack
from vlora_jax.vertical.config import Vertical
from vlora_jax.vertical.expand import expand

WIDTH, INNER, TOKENS = 64, 96, 4
UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # ±1/√in


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, INNER, kernel_init=UNIFORM, rngs=rngs)
        self.down = nnx.Linear(INNER, WIDTH, use_bias=False, kernel_init=UNIFORM, rngs=rngs)

    def __call__(self, h, gain):
        return h + gain * self.down(jnp.tanh(self.up(h)))


def stack(layers=4, **options):
    return vj.split(Stack(Layer, layers, rngs=nnx.Rngs(0), **options))


@pytest.fixture(scope="module")
def dense():
    return stack()


@pytest.fixture(scope="module")
def star():
    """Twelve layers, so that averages over increments are sharp."""
    return stack(12, vertical=Vertical(size=4, increment=vj.LoRA(rank=8, alpha=3.0, start="kaiming_both")))


def test_a_stack_is_a_loop_over_its_layers(dense):
    graphdef, params = dense
    h, gain = jnp.ones((TOKENS, WIDTH)), jnp.linspace(0, 1, WIDTH)

    @jax.jit
    def both(params):
        out, block = h, flatten(params)
        for layer in range(4):
            up, bias, down = (block[f"block/{name}"][layer] for name in ("up/kernel", "up/bias", "down/kernel"))
            out = out + gain * (jnp.tanh(out @ up + bias) @ down)
        return vj.apply(graphdef, params, None, h, gain), out

    np.testing.assert_allclose(*both(params), atol=1e-6)


def repeated_products(vertical, layers, policies):
    """Gradients of a stack under each remat policy, and how many more products than without are computed."""
    build = lambda remat: Stack(Layer, layers, vertical=vertical, remat=remat, rngs=nnx.Rngs(0))
    stacks = {remat: vj.split(nnx.eval_shape(lambda remat=remat: build(remat))) for remat in ("none", *policies)}
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), stacks["none"][1])
    loss = lambda params, graphdef: (vj.apply(graphdef, params, None, jnp.ones((TOKENS, WIDTH)), 1.0) ** 2).sum()
    programs = {
        remat: jax.jit(jax.grad(lambda params, graphdef=graphdef: loss(params, graphdef))).lower(params).compile()
        for remat, (graphdef, _) in stacks.items()
    }
    flops = {remat: dot_flops(program.as_text()) for remat, program in programs.items()}
    products = {remat: (flops[remat] - flops["none"]) / (2 * TOKENS * WIDTH * INNER) for remat in policies}
    return {remat: program(params) for remat, program in programs.items()}, products


@pytest.mark.parametrize("vertical", [None, Vertical(size=2, increment=vj.LoRA(rank=2, start="kaiming_both"))])
def test_remat_repeats_what_it_says_and_changes_no_gradient(vertical):
    """In the backward pass: every layer's first product; thin products alone; compounds too."""
    grads, products = repeated_products(vertical, 8, ("full", "dots", "nested"))
    for remat in ("full", "dots", "nested"):
        for got, expected in zip(jax.tree.leaves(grads[remat]), jax.tree.leaves(grads["none"]), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=remat)
    if vertical is None:
        assert products == {"full": 8, "dots": 0, "nested": 8}
    else:
        assert 0 < products["dots"] < 0.5
        assert 8 < products["full"] < 8.5
        assert products["nested"] == products["full"] + 4  # of each compound, what leads to its second layer


@pytest.mark.parametrize(("layers", "guarded"), [(2, True), (4, False)])
def test_remat_is_guarded_where_its_loop_has_a_single_turn(layers, guarded):
    """Else a compiler merges the repetition with the first pass; more turns need no barrier against it."""
    tied = Vertical(size=2, enabled=False)
    model = lambda: Stack(Layer, layers, vertical=tied, remat="dots", rngs=nnx.Rngs(0))
    graphdef, shapes = vj.split(nnx.eval_shape(model))
    loss = lambda params: vj.apply(graphdef, params, None, jnp.ones((TOKENS, WIDTH)), 1.0).sum()
    assert ("optimization_barrier" in jax.jit(jax.grad(loss)).lower(shapes).as_text()) == guarded


def test_programs_do_not_grow_with_depth():
    def size(layers, vertical):
        model = lambda: Stack(Layer, layers, vertical=vertical, rngs=nnx.Rngs(0))
        graphdef, shapes = vj.split(nnx.eval_shape(model))
        run = lambda params, h: vj.apply(graphdef, params, None, h, 1.0)
        return str(jax.make_jaxpr(run)(shapes, jnp.ones((TOKENS, WIDTH)))).count("dot_general")

    assert size(4, None) == size(40, None) == 2
    star = Vertical(size=4)
    assert size(4, star) == size(40, star)


def test_each_layer_is_drawn_with_its_own_bounds(dense):
    """A fan-in initialiser on a stacked kernel would count the layers as inputs and shrink the bound."""
    leaves = flatten(dense[1])
    for path, inputs in (("block/up/kernel", WIDTH), ("block/down/kernel", INNER)):
        largest = np.abs(np.asarray(leaves[path])).max(axis=(1, 2))
        assert np.all(largest <= inputs**-0.5)
        assert np.all(largest > 0.98 * inputs**-0.5)
        assert len(set(largest.tolist())) == 4


def test_increments_are_drawn_with_their_own_bounds(star):
    """±1/√in and ±1/√out in every layer; alpha / (3√r) is the mean norm of an increment, whatever its shape."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(star[1]).items()}
    for target, inputs, outputs in (("up", WIDTH, INNER), ("down", INNER, WIDTH)):
        a, b = (leaves[f"increments/lora/{target}/{name}"] for name in "ab")
        assert (a.shape, b.shape) == ((3, 3, inputs, 8), (3, 3, 8, outputs))
        for factor, bound in ((a, inputs**-0.5), (b, outputs**-0.5)):
            largest = np.abs(factor).max(axis=(2, 3))
            assert np.all(largest <= bound)
            assert np.all(largest > 0.98 * bound)
            assert len(set(largest.ravel().tolist())) == 9
        norms = np.linalg.norm(3.0 / 8 * a @ b, axis=(2, 3))
        assert abs(norms.mean() / (3.0 / (3 * 8**0.5)) - 1) < 0.02


def test_a_base_is_stored_once_and_is_the_dense_twins_first_layer(star):
    leaves, dense = flatten(star[1]), flatten(stack(12)[1])
    assert [path for path in leaves if "kernel" in path] == ["block/down/kernel", "block/up/kernel"]
    increments = 3 * 3 * 2 * 8 * (WIDTH + INNER)
    assert vj.count(star[1]) == 3 * 2 * WIDTH * INNER + 12 * INNER + increments
    np.testing.assert_array_equal(leaves["block/up/kernel"], dense["block/up/kernel"][::4])
    assert len({leaf.tobytes() for leaf in np.asarray(leaves["block/up/kernel"])}) == 3
    np.testing.assert_array_equal(leaves["block/up/bias"], dense["block/up/bias"])


def test_increments_that_start_at_zero_leave_a_compound_equal():
    zero_b = Vertical(size=2, increment=vj.LoRA(rank=2), structure="chain", pattern="cycle")
    graphdef, params = stack(4, vertical=zero_b)
    dense = jax.jit(lambda params: expand(graphdef, params)[1])(params)
    kernels = np.asarray(flatten(dense)["block/up/kernel"])
    np.testing.assert_array_equal(kernels[:2], kernels[2:])
    assert not np.array_equal(kernels[0], kernels[1])


def test_a_block_with_state_is_refused():
    """A scan would neither carry it on nor draw it anew."""

    class Dropping(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear, self.dropout = nnx.Linear(3, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, h):
            return self.dropout(self.linear(h))

    with pytest.raises(ConfigError, match=r"parameters only; dropout/rngs/\w+ is state"):
        Stack(Dropping, 2, rngs=nnx.Rngs(0))


def test_a_stack_without_layers_is_refused():
    with pytest.raises(ConfigError, match="at least one layer, not 0"):
        Stack(lambda rngs: nnx.Linear(3, 3, rngs=rngs), 0, rngs=nnx.Rngs(0))
