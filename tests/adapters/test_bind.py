"""Adapters on NNX models that know nothing of them: bound, they compute what merged parameters compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Gain, close, parameters, random_adapter, started
from third_party import MODELS, Attention, X

import vlora_jax as vj
from vlora_jax.adapters.bind import Adapted, Part, attach, together
from vlora_jax.errors import ConfigError, TargetError

ANY = vj.LoRA(rank=2, alpha=3.0, targets=".*")


@pytest.fixture(scope="module")
def attention():
    return parameters(Attention)


@pytest.mark.parametrize("name", MODELS)
def test_bound_equals_merged_and_starts_as_the_base(name):
    make, x = MODELS[name]
    graphdef, base = parameters(make)
    methods = (ANY, vj.Diagonal(targets=".*"), Gain(targets=".*"))
    adapters = [random_adapter(method, base, seed) for seed, method in enumerate(methods)]

    @jax.jit
    def outputs(base, adapters, x):
        return vj.apply(graphdef, base, adapters, x), vj.apply(graphdef, vj.merge(base, *adapters), None, x)

    bound, merged = outputs(base, adapters, x)
    start, unchanged = outputs(base, [started(adapter) for adapter in adapters], x)
    close(bound, merged)
    close(start, unchanged)
    assert np.abs(bound - start).max() > 0.1


def test_changes_of_one_site_add_up():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 5, rngs=rngs))
    first, second = random_adapter(ANY, base, 1), random_adapter(vj.LoRA(rank=3, alpha=1.5), base, 2)
    apply = jax.jit(lambda *adapters: vj.apply(graphdef, base, adapters, X))
    alone = X @ base["kernel"].get_value() + base["bias"].get_value()
    close(apply(first, second) - alone, (apply(first) - alone) + (apply(second) - alone))


def test_binding_and_calling_leave_base_and_graph_as_they_were(attention):
    graphdef, base = attention
    before = jax.tree.map(np.array, base)
    adapter = random_adapter(dataclasses.replace(ANY, full="norm/scale"), base)
    changed = jax.eval_shape(lambda x: vj.bind(graphdef, base, adapter)(x), X)
    assert changed.shape == (2, 3, 3)
    jax.tree.map(np.testing.assert_array_equal, base, before)
    assert not any(isinstance(module, Adapted) for _, module in nnx.iter_modules(nnx.merge(graphdef, base)))


class Stateful(nnx.Module):
    """A model that counts its calls in a variable of its own."""

    def __init__(self, rngs):
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        self.calls.set_value(self.calls.get_value() + 1)
        return self.up(x)


def test_a_model_s_own_state_does_not_leak_into_the_base():
    graphdef, base = parameters(Stateful)
    before = float(base["calls"].get_value())
    for adapters in ([], [random_adapter(ANY, base)]):
        model = vj.bind(graphdef, base, *adapters)
        model(X)
        close(model.calls.get_value(), before + 1)
        assert float(base["calls"].get_value()) == before


def test_leaves_trained_whole_take_the_place_of_the_base_s(attention):
    graphdef, base = attention
    adapter = random_adapter(vj.LoRA(rank=2, targets="up", full=["norm", "head/bias"]), base)
    assert sorted(adapter.trainable["full"]) == ["head/bias", "norm/bias", "norm/scale"]
    model = vj.bind(graphdef, base, adapter)
    for path, value in adapter.trainable["full"].items():
        module, leaf = path.split("/")
        np.testing.assert_array_equal(getattr(getattr(model, module), leaf).get_value(), value)
    np.testing.assert_array_equal(model.head.kernel.get_value(), base["head"]["kernel"].get_value())


def test_leaves_trained_whole_take_the_base_s_dtype():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 5, param_dtype=jnp.bfloat16, rngs=rngs))
    adapter = random_adapter(vj.LoRA(rank=2, full="bias"), base)
    assert adapter.trainable["full"]["bias"].dtype == jnp.float32
    assert vj.bind(graphdef, base, adapter).bias.get_value().dtype == jnp.bfloat16


def test_a_leaf_is_trained_whole_by_one_adapter_only(attention):
    graphdef, base = attention
    adapter = random_adapter(vj.LoRA(rank=2, targets="up", full="head/bias"), base)
    with pytest.raises(ConfigError, match="two adapters train head/bias whole"):
        vj.bind(graphdef, base, adapter, adapter)


@pytest.mark.parametrize(
    ("full", "error", "message"),
    [
        ("nrom", TargetError, r"full 'nrom' matches nothing; nearest: .*norm/"),
        ("mlp", ConfigError, "mlp/up/kernel is both adapted and trained whole"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(attention, full, error, message):
    with pytest.raises(error, match=message):
        random_adapter(vj.LoRA(rank=2, targets="up", full=full), attention[1])


@pytest.mark.parametrize(
    ("method", "missing"),
    [
        (vj.LoRA(rank=2, targets="up"), "mlp/up/kernel"),
        (vj.LoRA(rank=2, targets="head", full="norm/scale"), "norm/scale"),
    ],
)
def test_an_adapter_of_another_model_is_refused(attention, method, missing):
    class Other(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.Linear(4, 3, rngs=rngs)

    graphdef, base = parameters(Other)
    with pytest.raises(TargetError, match=f"{missing}.*, which this model does not have"):
        vj.bind(graphdef, base, random_adapter(method, attention[1]))


def test_an_adapted_layer_shows_its_merged_kernel_and_its_own_attributes(attention):
    graphdef, base = attention
    adapter = random_adapter(ANY, base)
    layer = vj.bind(graphdef, base, adapter).head
    a, b = (np.asarray(adapter.factors("head")[name]) for name in "ab")
    close(layer.kernel.get_value(), base["head"]["kernel"].get_value() + 1.5 * a @ b)
    np.testing.assert_array_equal(layer.bias.get_value(), base["head"]["bias"].get_value())
    assert layer.out_features == 3
    with pytest.raises(AttributeError, match="kernels"):
        _ = layer.kernels


def test_attached_below_an_adapter_the_layer_still_shows_one_kernel():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 5, rngs=rngs))
    above, below = random_adapter(ANY, base, 1), random_adapter(vj.Diagonal(), base, 2)
    (site,) = above.sites

    @jax.jit
    def outputs():
        model = attach(vj.bind(graphdef, base, above), {"": (site, [Part(below.method, below.factors(""), {})])})
        assert model.methods == (above.method,)
        return model.kernel.get_value(), model(X), vj.merge(base, above, below)["kernel"].get_value()

    kernel, output, merged = outputs()
    close(kernel, merged)
    close(output, X @ merged + base["bias"].get_value())


class Joint(nnx.Module):
    """Three layers that read the same input."""

    def __init__(self, rngs):
        self.q, self.k, self.v = (nnx.Linear(4, size, rngs=rngs) for size in (5, 3, 2))

    def __call__(self, x, joint):
        layers = (self.q, self.k, self.v)
        return together(x, layers) if joint else tuple(layer(x) for layer in layers)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("targets", ["q", "q|v", ".*"])
def test_layers_computed_together_equal_layers_computed_apart(targets, dropout):
    graphdef, base = parameters(Joint)
    lora = random_adapter(vj.LoRA(rank=2, targets=targets, dropout=dropout), base, 1)
    adapters = [lora, random_adapter(vj.LoRA(rank=1, targets="k"), base, 2), random_adapter(vj.Diagonal(), base, 3)]
    call = lambda joint: vj.apply(graphdef, base, adapters, X, joint, key=jax.random.key(4))
    joint, apart = jax.jit(lambda: (call(True), call(False)))()
    jax.tree.map(close, joint, apart)


def test_a_model_without_adapters_computes_together_too():
    graphdef, base = parameters(Joint)
    for joint, layer in zip(vj.apply(graphdef, base, None, X, True), ("q", "k", "v"), strict=True):
        close(joint, X @ base[layer]["kernel"].get_value() + base[layer]["bias"].get_value())
