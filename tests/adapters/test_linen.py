"""Adapters on Linen models that know nothing of them, also inside lifted transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers import Gain, close, filled, parameters, random_adapter, started
from third_party import X
from third_party_linen import MODELS, Attention, Grid, Scanned, Square

import vlora_jax as vj
from vlora_jax.adapters import linen
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError, TargetError

ANY = vj.LoRA(rank=2, alpha=3.0, targets=".*")


def prepared(model, x):
    """Random variables of a Linen model, and its sites."""
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), x), 0)
    return variables, linen.find_sites(model, variables, x)


@pytest.fixture(scope="module")
def attention():
    variables, sites = prepared(Attention(), X)
    return Attention(), variables, sites


@pytest.mark.parametrize("name", MODELS)
def test_applied_equals_merged_and_gradients_reach_every_leaf(name):
    model, x = MODELS[name]
    variables, sites = prepared(model, x)
    params = variables["params"]
    assert sites
    methods = (ANY, vj.Diagonal(targets=".*"), Gain(targets=".*"))
    adapters = [random_adapter(method, params, seed, sites) for seed, method in enumerate(methods)]

    @jax.jit
    def outputs(params, adapters, x):
        def loss(trainable):
            whole = [a.with_trainable(t) for a, t in zip(adapters, trainable, strict=True)]
            bound = linen.apply(model, {"params": params}, whole, x)
            return (bound**2).mean(), bound

        grads, bound = jax.grad(loss, has_aux=True)([adapter.trainable for adapter in adapters])
        return bound, model.apply({"params": vj.merge(params, *adapters)}, x), grads

    bound, merged, grads = outputs(params, adapters, x)
    start, unchanged, _ = outputs(params, [started(adapter) for adapter in adapters], x)
    close(bound, merged)
    close(start, unchanged)
    assert np.abs(bound - start).max() > 0.1
    for path, gradient in flatten(grads).items():
        assert np.abs(gradient).max() > 0, path


def test_kernels_in_lifted_transforms_are_found_with_their_layer_axes():
    _, sites = prepared(Scanned(axis=1), X)
    assert [(each.path, each.stack, each.shape, each.stack_axis) for each in sites] == [
        ("layers/down", (3,), (5, 2, 4), 1),
        ("layers/mix", (3,), (2, 3, 5, 2), 1),
        ("layers/up", (3,), (4, 6), 1),
    ]
    _, sites = prepared(Grid(), X)
    assert {each.stack for each in sites} == {(2, 3)}


@pytest.mark.parametrize("axis", [0, 1])
def test_the_layer_axis_is_found_where_shapes_are_ambiguous(axis):
    _, (site,) = prepared(Scanned(Square, 4, axis), X)
    assert (site.stack, site.shape, site.stack_axis) == ((4,), (4, 4), axis)


def test_layer_axes_apart_are_refused():
    with pytest.raises(TargetError, match=r"outer/inner/layers/\w+: stored .* its layer axes are not adjacent"):
        prepared(Grid(inner_axis=1), X)


class Switched(nn.Module):
    """A model that leaves a layer out when told so."""

    @nn.compact
    def __call__(self, x, both=True):
        x = nn.Dense(4, name="always")(x)
        return nn.Dense(4, name="sometimes")(x) if both else x


def test_a_site_that_stays_silent_is_refused():
    variables, sites = prepared(Switched(), X)
    adapter = random_adapter(ANY, variables["params"], sites=sites)
    assert jax.eval_shape(lambda: linen.apply(Switched(), variables, adapter, X)).shape == X.shape
    with pytest.raises(TargetError, match="sometimes was not called, so its adapter has no effect; 1 such sites"):
        linen.apply(Switched(), variables, adapter, X, both=False)


def test_an_adapter_of_another_model_is_refused(attention):
    _, variables, sites = attention
    adapter = random_adapter(vj.LoRA(rank=2, targets="up"), variables["params"], sites=sites)
    other = prepared(Switched(), X)[0]
    with pytest.raises(TargetError, match="up was not called"):
        linen.apply(Switched(), other, adapter, X)


def test_leaves_trained_whole_take_the_place_of_the_base_s(attention):
    model, variables, sites = attention
    params = variables["params"]
    adapter = random_adapter(vj.LoRA(rank=2, targets="up", full=["norm", "head"]), params, sites=sites)
    assert sorted(adapter.trainable["full"]) == ["head/bias", "head/kernel", "norm/bias", "norm/scale"]
    merged = vj.merge(params, adapter)
    np.testing.assert_array_equal(merged["head"]["bias"], adapter.trainable["full"]["head/bias"])
    apply = jax.jit(lambda: (linen.apply(model, variables, adapter, X), model.apply({"params": merged}, X)))
    close(*apply())
    with pytest.raises(ConfigError, match="two adapters train head/bias whole"):
        linen.apply(model, variables, [adapter, adapter], X)
    with pytest.raises(TargetError, match="the adapter trains head/bias whole, which this model does not have"):
        linen.apply(Switched(), prepared(Switched(), X)[0], adapter, X)


def test_an_equation_given_with_the_call_counts():
    class Late(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Einsum((4, 5), name="first")(x, "btd,df->btf")
            return nn.Einsum((5, 3), name="second")(h, einsum_str="btf,fe->bte")

    variables, sites = prepared(Late(), X)
    assert [each.path for each in sites] == ["first", "second"]
    adapter = random_adapter(ANY, variables["params"], sites=sites)
    merged = lambda: Late().apply({"params": vj.merge(variables["params"], adapter)}, X)
    close(*jax.jit(lambda: (linen.apply(Late(), variables, adapter, X), merged()))())


def test_boxed_parameters_stay_boxed():
    """Parameters with axis names in a `Partitioned` box, as models written for meshes have them."""
    model = nn.Dense(5, kernel_init=nn.with_partitioning(nn.initializers.zeros, ("in", "out")))
    variables, sites = prepared(model, X)
    params = variables["params"]
    adapter = random_adapter(vj.LoRA(rank=2, full="bias"), params, sites=sites)
    merged = vj.merge(params, adapter)
    assert merged["kernel"].names == ("in", "out")
    close(linen.apply(model, variables, adapter, X), X @ merged["kernel"].value + adapter.trainable["full"]["bias"])


class Fan(nn.Module):
    """Layers that all read the model's input; emits what each of them makes of it."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Reader, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=3)
        return scan(name="layers")(x)[1]


class Reader(nn.Module):
    """What `Fan` repeats."""

    @nn.compact
    def __call__(self, x, _=None):
        return x, (nn.Dense(4, name="left")(x), nn.Dense(4, name="right")(x))


@pytest.mark.parametrize("axis", [0, 1])
def test_dropout_draws_a_mask_for_each_layer_site_and_key(axis):
    model, x = Fan(axis), jnp.ones((8, 4))
    variables, sites = prepared(model, x)
    adapter = random_adapter(vj.LoRA(rank=4, alpha=4.0, dropout=0.5), variables["params"], sites=sites)
    eye = jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.eye(4), leaf.shape), adapter.trainable)
    adapter = adapter.with_trainable(eye)  # the change is the dropped input itself
    call = lambda key: jnp.stack(linen.apply(model, variables, adapter, x, key=key))
    base, plain, first, again, other = jax.jit(
        lambda: (
            jnp.stack(model.apply(variables, x)),
            call(None),
            *(call(jax.random.key(seed)) for seed in (0, 0, 1)),
        )
    )()
    close(plain - base, np.ones_like(base))
    np.testing.assert_array_equal(first, again)
    masks = np.round(np.stack([first - base, other - base]), 5)
    assert set(masks.ravel()) == {0.0, 2.0}
    assert len(np.unique(masks.reshape(12, -1), axis=0)) == 12  # 2 keys × 2 sites × 3 layers


def test_a_method_that_reads_the_output_gets_that_of_the_inputs_left():
    """As its NNX twin does."""
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 5, rngs=rngs))
    variables = {"params": {name: base[name].get_value() for name in ("kernel", "bias")}}
    adapter = random_adapter(vj.DoRA(rank=2, dropout=0.5), base)
    bound, twin, whole = jax.jit(
        lambda key: (
            linen.apply(nn.Dense(5), variables, adapter, X, key=key),
            vj.apply(graphdef, base, adapter, X, key=key),
            vj.apply(graphdef, base, adapter, X),
        )
    )(jax.random.key(0))
    close(bound, twin)
    assert np.abs(twin - whole).max() > 0.1


def test_dtypes_of_a_half_precision_base_are_kept():
    model = nn.Dense(5, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    variables, sites = prepared(model, X)
    adapter = random_adapter(ANY, variables["params"], sites=sites)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
    assert jax.eval_shape(lambda: linen.apply(model, variables, adapter, X)).dtype == jnp.bfloat16
