"""What every method of the registry must satisfy; a new method is covered by being registered."""

import dataclasses
import functools
import json
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx
from helpers import close, mostly_slow, moved, parameters
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import vlora_jax as vj
from vlora_jax.adapters.init import adapter_shapes
from vlora_jax.adapters.kept import keeps
from vlora_jax.adapters.kernel_start import KernelStart
from vlora_jax.adapters.method import SiteMethod
from vlora_jax.adapters.registry import METHODS, from_config
from vlora_jax.adapters.trees import flatten
from vlora_jax.checkpoint import Checkpoints, read, restore
from vlora_jax.distributed.mesh import BATCH_AXES, make_mesh
from vlora_jax.distributed.specs import adapter_specs, base_specs, shardings
from vlora_jax.errors import ConfigError, ConversionError

SMALL = {  # options for kernels as small as the ones here, where a method has them
    "rank": 2, "steps": 9, "indices": (0, 2), "alpha": 4.0, "frequencies": 5, "scaling": 10.0, "vectors": 6,
    "length": 1, "bank_bound": 1.0, "deviation": 0.5, "target_rank": 1, "active": 1, "density": 0.25, "heads": 2,
}  # fmt: skip
CHANGES_AT_START = frozenset({"lora_xs", "vblora"})  # methods whose adapters change the model before any training
NO_EMBEDDINGS = frozenset({"bitfit", "flylora", "ln_tuning", "lorta", "mosara"})  # methods that refuse embedding tables
SQUARE = frozenset({"lorta"})  # methods that take square kernels of one size only

every_method = pytest.mark.parametrize("name", METHODS)


def test_a_method_without_its_maths_cannot_be_made():
    class Idea(vj.Method):
        name = "idea"

    with pytest.raises(TypeError, match="abstract"):
        Idea()


X = jnp.asarray(np.random.default_rng(5).normal(size=(4, 3, 4)), jnp.float32)


def small(name: str, **options) -> vj.Method:
    fields = METHODS[name].__dataclass_fields__
    if not METHODS[name].on_sites and METHODS[name].whole is vj.Method.whole:  # it trains what `full` names only
        options = {"full": options.get("full", ".*")}
    if METHODS[name].targets == "embeddings":  # which most models here have none of
        options = {"targets": "all-linear"} | options
    return METHODS[name](**{key: value for key, value in SMALL.items() if key in fields}, **options)


class Block(nnx.Module):
    """A residual MLP from an axis of 4 to one of 6 (4 if square) and from two axes back."""

    def __init__(self, rngs, square, **dtypes):
        self.inner = (2, 2) if square else (2, 3)
        self.up = nnx.Linear(4, math.prod(self.inner), rngs=rngs, **dtypes)
        self.down = nnx.Einsum("...nh,nhd->...d", (*self.inner, 4), rngs=rngs, **dtypes)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)).reshape(*x.shape[:-1], *self.inner))


class Tower(nnx.Module):
    """A norm, three stacked blocks and a layer that is not stacked."""

    def __init__(self, rngs, square=False, **dtypes):
        block = functools.partial(Block, square=square, **dtypes)
        self.norm = nnx.LayerNorm(4, rngs=rngs, **dtypes)
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(block))(rngs)
        self.out = nnx.Linear(4, 4 if square else 5, rngs=rngs, **dtypes)

    def __call__(self, x):
        graphdef, layers = nnx.split(self.blocks)
        h = jax.lax.scan(lambda h, layer: (nnx.merge(graphdef, layer)(h), None), x + self.norm(x), layers)[0]
        return self.out(h)


@functools.cache
def tower(name: str, **dtypes) -> tuple[nnx.GraphDef, Any]:
    """Graph and parameters of a `Tower` that a method can be put on."""
    return parameters(functools.partial(Tower, square=name in SQUARE, **dtypes))


def unrolled(base, adapter, x, change):
    """`Tower` as a Python loop over its layers.

    `change` of a layer's output `y` is a function of `(method, x, y, kernel, factors)`.
    """
    methods = {site.path: adapter.method.for_site(site) for site in adapter.sites}

    def linear(path, x, kernel, layer=...):
        y = x @ kernel
        if path not in methods:
            return y
        factors = {name: value[layer] for name, value in adapter.factors(path).items()}
        return y + change(methods[path], x, y, kernel, factors | adapter.shared_at(path))

    leaves = flatten(base) | adapter.trainable["full"]
    normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    h = (x + normed * leaves["norm/scale"] + leaves["norm/bias"]).reshape(-1, 4)
    for layer in range(3):
        up = linear("blocks/up", h, leaves["blocks/up/kernel"][layer], layer) + leaves["blocks/up/bias"][layer]
        h = h + linear("blocks/down", jnp.tanh(up), leaves["blocks/down/kernel"][layer].reshape(-1, 4), layer)
    return (linear("out", h, leaves["out/kernel"]) + leaves["out/bias"]).reshape(*x.shape[:-1], -1)


def by_forward(method, x, y, kernel, factors):
    return method.forward(x, y, kernel, factors)


def by_delta(method, x, y, kernel, factors):
    shift = method.shift(factors)
    return x @ method.delta(kernel, factors) + (0 if shift is None else shift)


@dataclasses.dataclass(frozen=True)
class Case:
    """One method on `Tower`: its adapter at the start and with random values, and what it computes."""

    name: str
    method: vj.Method
    base: Any
    start: vj.Adapter
    adapter: vj.Adapter
    out: dict[str, Any]


@functools.cache
def adapters(name: str) -> tuple[Any, vj.Adapter, vj.Adapter]:
    """The base, an adapter at its start, and the same with random values."""
    base = tower(name)[1]
    start = jax.jit(lambda base: vj.init(small(name), jax.random.key(0), base))(base)
    return base, start, moved(start)


@pytest.fixture(scope="module", params=METHODS)
def case(request) -> Case:
    """All that the tests below compare, from one compiled program a method."""
    method = small(request.param)
    base, start, adapter = adapters(request.param)
    apply = functools.partial(vj.apply, tower(request.param)[0])
    trainable, rest = vj.partition({"base": base, "adapter": adapter})

    @jax.jit
    def outputs(base, start, adapter, trainable, rest, x):
        def loss(trainable):
            whole = vj.combine(trainable, rest)
            return jnp.sum(apply(whole["base"], whole["adapter"], x) ** 2)

        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), start, adapter)
        out = {
            "base": apply(base, None, x),
            "start": apply(base, start, x),
            "applied": apply(base, adapter, x),
            "both": jax.vmap(apply, (None, 0, None))(base, both, x),
            "unrolled": unrolled(base, adapter, x, by_forward),
            "gradient": jax.grad(loss)(trainable),
        }
        if method.mergeable:
            out["merged"] = apply(vj.merge(base, adapter), None, x)
            out["by delta"] = unrolled(base, adapter, x, by_delta)
        return out

    out = outputs(base, start, adapter, trainable, rest, X)
    return Case(request.param, method, base, start, adapter, out)


def test_the_model_is_unchanged_at_the_start_where_that_is_promised(case):
    out = case.out
    if case.name in CHANGES_AT_START:
        assert np.abs(out["start"] - out["base"]).max() > 1e-3
    else:
        close(out["start"], out["base"])


def test_other_factors_change_the_model(case):
    out = case.out
    assert np.abs(out["applied"] - out["base"]).max() > 1e-2


NO_LORA = frozenset({"flylora", "mosara", "ia3", "ln_tuning", "bitfit", "selective"})  # gated, or biases, or no kernel


@pytest.mark.parametrize("name", mostly_slow(sorted(METHODS.keys() - NO_LORA), {"deep_lora", "spiel"}))
def test_as_a_plain_lora_it_changes_kernels_alike(name):
    """Of a rank that no kernel here is above, so that nothing is left out."""
    base, _, adapter = adapters(name)
    lora, residuals = vj.as_lora(base, adapter, max_rank=4)
    assert lora.method.name == "lora"
    assert max(residual.max() for residual in residuals.values()) < 1e-5
    one, other = (flatten(jax.jit(vj.merge)(base, each)) for each in (adapter, lora))
    for path, leaf in one.items():
        close(leaf, other[path], 1e-5)


@pytest.mark.parametrize("name", sorted(NO_LORA))
def test_what_a_plain_lora_has_no_place_for_is_said(name):
    base, _, adapter = adapters(name)
    with pytest.raises(ConversionError, match=f"{name} depends on the input|bias of|trained whole|no kernel"):
        vj.as_lora(base, adapter, max_rank=4)


def test_applied_equals_merged(case):
    if case.method.mergeable:
        close(case.out["applied"], case.out["merged"])
        return
    with pytest.raises(ConversionError, match=case.name):
        vj.merge(case.base, case.adapter)


def test_forward_equals_the_product_with_delta(case):
    if not case.method.mergeable:
        pytest.skip("no ΔW: the change depends on the input")
    close(case.out["unrolled"], case.out["by delta"])


def test_stacked_layers_equal_a_loop_over_them(case):
    out = case.out
    close(out["applied"], out["unrolled"])


def test_vmap_over_adapters_equals_a_loop(case):
    out = case.out
    close(out["both"], np.stack([out["start"], out["applied"]]))


def test_gradients_reach_all_that_trains_in_every_layer_and_nothing_else(case):
    trainable, rest = vj.partition({"base": case.base, "adapter": case.adapter})
    stepped = vj.combine(jax.tree.map(np.subtract, trainable, case.out["gradient"]), rest)
    before, after = flatten(case.adapter.trainable), flatten(stepped["adapter"].trainable)
    stacks = {f"sites/{site.path}/": site.layers for site in case.adapter.sites}
    for path, value in before.items():
        layers = next((layers for site, layers in stacks.items() if path.startswith(site)), 1)
        change = np.abs(after[path] - value).reshape(layers, -1)
        assert (change.max(axis=1) > 0).all(), path
    jax.tree.map(np.testing.assert_array_equal, stepped["adapter"].frozen, case.adapter.frozen)
    jax.tree.map(np.testing.assert_array_equal, stepped["base"], case.base)


KINDS = ("lora", "vera", "tied_lora", "pissa", "spiel")  # own tensors, a host's, shared ones, an SVD's, places


@pytest.mark.parametrize("case", mostly_slow(METHODS, KINDS), indirect=True)
def test_eight_devices_equal_one(case):
    """Start, output and gradient on a mesh split three ways, with the base and the adapter where a run lays them."""
    mesh = make_mesh(2, 2, 2)
    specs = base_specs(case.base, mesh), adapter_specs(case.adapter, mesh)
    assert {axis for spec in flatten(specs[0]).values() for axis in spec if axis} == {"fsdp", "tensor"}
    assert case.name not in KINDS or "tensor" in {axis for spec in flatten(specs[1]).values() for axis in spec}
    (of_base, of_adapter), rows = shardings(specs, mesh), NamedSharding(mesh, P(BATCH_AXES))

    def outputs(base, adapter, x):
        def loss(trainable):
            out = vj.apply(tower(case.name)[0], base, adapter.with_trainable(trainable), x)
            return jnp.sum(out**2), out

        gradient, out = jax.grad(loss, has_aux=True)(adapter.trainable)
        return vj.init(case.method, jax.random.key(0), base), out, gradient

    with jax.set_mesh(mesh):
        placed = jax.device_put((case.base, case.adapter, X), (of_base, of_adapter, rows))
        found = jax.jit(outputs, out_shardings=(of_adapter, rows, of_adapter.trainable))(*placed)
    expected = case.start, case.out["applied"], case.out["gradient"]["adapter"].trainable
    jax.tree.map(functools.partial(close, tolerance=1e-5), found, expected)


def test_a_checkpoint_gives_an_adapter_back_bit_for_bit(case, tmp_path):
    """Into what its method's config, as JSON keeps it, and the shapes of the base say."""
    checkpoints, trees = Checkpoints(tmp_path), {name: getattr(case.adapter, name) for name in ("trainable", "frozen")}
    checkpoints.save(1, trees, {})
    checkpoints.close()
    again = adapter_shapes(from_config(json.loads(json.dumps(case.method.config()))), case.base)
    saved = read(tmp_path, 1).trees
    restored = {name: restore(getattr(again, name), saved[name], name) for name in trees}
    bits = lambda adapter: jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype), leaf.tobytes()), adapter)
    assert bits(jax.device_get(dataclasses.replace(again, **restored))) == bits(jax.device_get(case.adapter))


@pytest.mark.parametrize("name", [name for name in METHODS if issubclass(METHODS[name], SiteMethod)])
def test_a_stack_starts_as_each_layer_does_with_its_key_and_kernel(name):
    method = small(name)
    if isinstance(method, KernelStart):
        method = dataclasses.replace(method, alpha=float(method.rank))  # a layer starts for s = 1
    site = vj.Site("up", "kernel", "dense", (2, 2), (4, 6), (0,), (1,))
    kernels = np.random.default_rng(6).normal(size=(2, 2, 4, 6)).astype(np.float32) if method.reads_base else None
    start_layer = jax.jit(lambda key, kernel: method.init_site(key, site, kernel))
    start_stack = jax.jit(lambda key, kernels: (method.init_stack(key, site, kernels), jax.random.split(key, (2, 2))))
    stack, keys = start_stack(jax.random.key(0), kernels)
    for at in np.ndindex(2, 2):
        layer = start_layer(keys[at], None if kernels is None else kernels[at])
        for part in ("trainable", "frozen"):
            of_stack = getattr(stack, part)
            for tensor, value in getattr(layer, part).items():
                close(of_stack[tensor][at], value)


class WithAndWithoutJit(chex.TestCase):
    """Applying an adapter is a pure function of arrays."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("lora", "vera", "adalora")  # the tests above are of compiled programs
    def test_apply_equals_a_loop_over_layers(self, name):
        base, _, adapter = adapters(name)
        apply = self.variant(functools.partial(vj.apply, tower(name)[0]))
        close(apply(base, adapter, X), unrolled(base, adapter, X, by_forward))


def test_adapters_are_pytrees(case):
    adapter = case.adapter
    leaves, structure = jax.tree.flatten(adapter)
    again = jax.tree.unflatten(structure, leaves)
    assert (again.method, again.sites) == (adapter.method, adapter.sites)
    chex.assert_trees_all_equal(again, adapter)
    doubled = jax.tree.map(lambda leaf: np.add(leaf, leaf), adapter)
    assert isinstance(doubled, vj.Adapter)
    for path, leaf in flatten(adapter).items():
        np.testing.assert_array_equal(flatten(doubled)[path], 2 * np.asarray(leaf))
    hash(structure)  # jit compares structures by it


def test_a_sum_of_changes_is_a_change(case):
    """Of methods that say so: the layers of a site, weighted, become one layer's factors."""
    if not case.method.adds_up:
        with pytest.raises(ConversionError, match="do not add up"):
            case.method.sum_factors({}, jnp.ones(3))
        return
    weights = jnp.array([0.5, -2.0, 1.5])
    site = next(site for site in case.adapter.sites if site.path == "blocks/up")
    factors, method = case.adapter.factors(site.path), case.method.for_site(site)
    kernels = flatten(case.base)[site.leaf_path]

    def both(kernels, factors, weights):
        layers = jax.vmap(method.delta)(kernels, factors)
        return method.delta(kernels[0], method.sum_factors(factors, weights)), layers

    summed, layers = jax.jit(both)(kernels, factors, weights)
    close(summed, np.einsum("l,lio->io", weights, layers))


def test_no_change_is_kept_for_the_backward_pass(case):
    """In a stack of layers: what must build ΔW builds it again."""
    if not case.method.mergeable or not case.method.on_sites or case.name in SQUARE:
        pytest.skip("there is no ΔW, or its sides cannot be told from others")
    method = dataclasses.replace(small(case.name), targets=".*")
    base = {"kernel": jnp.eye(12, 18)}
    adapter = vj.init(method, jax.random.key(0), base)
    (site,) = adapter.sites

    def kept(x, kernel, factors):
        def run(x, factors):
            return method.for_site(site).forward(x, x @ kernel, kernel, factors)

        floats = {name: value for name, value in factors.items() if jnp.issubdtype(value.dtype, jnp.floating)}
        call = jax.checkpoint(lambda x, floats: run(x, factors | floats), policy=keeps)
        return jax.tree.leaves(jax.vjp(call, x, floats)[1])

    factors = adapter.factors(site.path) | adapter.shared_at(site.path)
    shapes = [leaf.shape for leaf in jax.eval_shape(kept, jnp.zeros((5, 12)), base["kernel"], factors)]
    assert sum(set(shape) >= {12, 18} for shape in shapes) <= 1 + sum(v.shape == (12, 18) for v in factors.values())


def test_every_trainable_leaf_has_a_learning_rate_group(case):
    groups = case.method.groups(case.adapter)
    assert jax.tree.structure(groups) == jax.tree.structure(case.adapter.trainable)
    assert all(isinstance(group, str) for group in jax.tree.leaves(groups))
    assert all(rate > 0 for rate in case.method.rates().values())


@every_method
def test_a_half_precision_base_keeps_its_dtype_and_adapters_theirs(name):
    graphdef, base = tower(name, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)

    def abstract(base, x):
        adapter = vj.init(small(name), jax.random.key(0), base)
        loss = lambda t: vj.apply(graphdef, base, adapter.with_trainable(t), x).astype(jnp.float32).sum()
        merged = vj.merge(base, adapter) if adapter.method.mergeable else base
        return adapter, vj.apply(graphdef, base, adapter, x), merged, jax.grad(loss)(adapter.trainable)

    adapter, output, merged, gradient = jax.eval_shape(abstract, base, X.astype(jnp.bfloat16))
    floats = [leaf.dtype for leaf in jax.tree.leaves(adapter) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}
    assert output.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


@every_method
def test_an_embedding_is_changed_as_its_merged_table_says(name):
    graphdef, base = parameters(lambda rngs: nnx.Embed(7, 4, rngs=rngs))
    method = small(name, targets=".*")
    if name in NO_EMBEDDINGS:
        with pytest.raises(ConfigError, match="embed"):
            vj.init(method, jax.random.key(0), base)
        return
    adapter = moved(jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base))
    tokens = jnp.array([[0, 6], [3, 6]])
    table = vj.merge(base, adapter)["embedding"].get_value()
    close(jax.jit(functools.partial(vj.apply, graphdef))(base, adapter, tokens), np.asarray(table)[tokens])


def test_targets_do_not_influence_each_other_s_start(case):
    """The draws of a site stay as they are when a further site is adapted."""
    if not case.method.on_sites:
        pytest.skip("no targets: it trains what full names")
    method, start = dataclasses.replace(small(case.name), targets="blocks/up"), case.start
    alone = jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(case.base)
    chex.assert_trees_all_equal(alone.factors("blocks/up"), start.factors("blocks/up"))


@every_method
def test_a_config_survives_json(name):
    method = small(name, targets=["q", "v"], exclude="head", full=["norm"])
    assert from_config(json.loads(json.dumps(method.config()))) == method


WRONG = {int: [2.5, "4", True, None], float: [float("nan"), float("inf"), "1", None], bool: [1, "yes", None]}


@every_method
def test_options_of_a_wrong_type_are_refused_by_name(unchecked, name):
    for field in dataclasses.fields(METHODS[name]):
        for value in WRONG.get(field.type, []):
            with pytest.raises(ConfigError, match=f"{name}: {field.name} is {value!r}; it must be"):
                METHODS[name](**{field.name: value})
    patterns = [(field, value) for field in ("targets", "exclude", "full") for value in (["q", 3], [None], 3)]
    for field, value in [*patterns, ("targets", None)]:
        with pytest.raises(ConfigError, match=f"{name}: {field} is .*; it must be a pattern or a list of patterns"):
            METHODS[name](**{field: value})


@every_method
def test_options_with_a_meaning_in_all_methods_are_checked_in_all(unchecked, name):
    names = [field.name for field in dataclasses.fields(METHODS[name])]
    for field in (field for field in names if field.endswith("_pattern")):
        with pytest.raises(ConfigError, match=f"{name}: {field} is {{3: 1}}; it must map patterns to values"):
            METHODS[name](**{field: {3: 1}})
    for value in (1.0, -0.1) if "dropout" in names else ():
        with pytest.raises(ConfigError, match=f"{name}: dropout is {value}; it must be at least 0 and below 1"):
            METHODS[name](dropout=value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "lroa"}, "unknown method 'lroa'; nearest: 'lora'"),
        ({"method": "lora", "rnak": 4}, "lora has no option 'rnak'; nearest: 'rank'"),
        ({"method": "lora", "targets": 3}, "lora: targets is 3; it must be a pattern or a list of patterns"),
    ],
)
def test_configs_that_mean_nothing_are_refused(unchecked, config, message):
    with pytest.raises(ConfigError, match=message):
        from_config(config)
