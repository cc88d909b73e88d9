"""LoRTA: the tensor it is a slice of, its orientations, which layer a site is, and the sizes it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, moved, parameters, random_adapter

import vlora_jax as vj
from vlora_jax.adapters.lorta import layer_places
from vlora_jax.adapters.merge import site_delta
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError

X = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 4)), jnp.float32)
ROLES = ("k", "o", "q", "v")


class Mix(nnx.Module):
    """Four square kernels one after the other."""

    def __init__(self, rngs):
        self.kernels = nnx.Dict({name: nnx.Linear(4, 4, rngs=rngs) for name in ROLES})

    def __call__(self, x):
        for name in ROLES:
            x = jnp.tanh(self.kernels[name](x)) + x
        return x


class Stacked(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.split_rngs(splits=3)(nnx.vmap(Mix))(rngs)

    def __call__(self, x):
        graphdef, layers = nnx.split(self.layers)
        return jax.lax.scan(lambda h, layer: (nnx.merge(graphdef, layer)(h), None), x, layers)[0]


class Unrolled(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Mix(rngs) for _ in range(3)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def stacked():
    return parameters(Stacked)


def started(method, base):
    return jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base)


def site(path, shape=(4, 4), stack=(), kind="dense"):
    return Site(path, "kernel", kind, stack, shape, (0,), (1,))


@pytest.mark.parametrize(
    ("width", "heads", "layers", "per_rank", "rank", "numbers"),
    [
        (768, 12, 12, 860, 4, 3_440),  # RoBERTa-base
        (1024, 16, 24, 1132, 4, 4_528),  # RoBERTa-large
        (4096, 32, 32, 4292, 8, 34_336),  # Llama-2-7B
    ],
)
def test_it_trains_as_many_numbers_as_are_published(width, heads, layers, per_rank, rank, numbers):
    sites = [site(f"layers/attn/{name}", (width, width), (layers,)) for name in ROLES]
    for r, expected in ((1, per_rank), (rank, numbers)):
        method = vj.LoRTA(rank=r, heads=heads)
        adapter = jax.eval_shape(lambda: vj.init(method, jax.random.key(0), {}, sites))
        assert vj.count(adapter) == expected
        assert sum(value.size for value in jax.tree.leaves(adapter.frozen)) == 4 * layers  # where each kernel is


@pytest.mark.parametrize("orientation", ["out", "in"])
@pytest.mark.parametrize(("stabilised", "scale"), [(False, 6 / 3), (True, 6 / 3**0.5)])
def test_the_changes_are_slices_of_one_tensor_of_rank_r(stacked, orientation, stabilised, scale):
    graphdef, base = stacked
    method = vj.LoRTA(rank=3, alpha=6.0, heads=2, orientation=orientation, rank_stabilised=stabilised)
    adapter = moved(started(method, base))
    shared = {name: np.float64(value) for name, value in adapter.shared.items()}
    m = np.stack([shared[f"layers/kernels/{name}/m"] for name in ROLES])
    tensor = np.einsum("ir,rj,hr,lr,mr->lmihj", shared["a"], shared["b"], shared["h"], shared["l"], m)
    changes = scale * tensor.reshape(3, 4, 4, 4)
    if orientation == "in":
        changes = changes.swapaxes(2, 3)
    kernels = {name: np.asarray(flatten(base)[f"layers/kernels/{name}/kernel"]) for name in ROLES}
    biases = {name: np.asarray(flatten(base)[f"layers/kernels/{name}/bias"]) for name in ROLES}

    @jax.jit
    def computed():
        deltas = {each.path: site_delta(adapter, each, each.read(flatten(base))) for each in adapter.sites}
        return deltas, vj.apply(graphdef, base, adapter, X)

    deltas, out = computed()
    h = np.asarray(X)
    for layer in range(3):
        for place, name in enumerate(ROLES):
            close(deltas[f"layers/kernels/{name}"][layer], changes[layer, place])
            assert np.linalg.matrix_rank(changes[layer, place], tol=1e-9) <= 3
            h = np.tanh(h @ (kernels[name][layer] + changes[layer, place]) + biases[name][layer]) + h
    close(out, h, 1e-5)


def test_heads_one_by_one_give_the_same_columns():
    """Out: `y_h = (x A ⊙ C_h[h] ⊙ C_m ⊙ C_l) B`. In: `y = Σ_h (x_h Bᵀ ⊙ C_h[h] ⊙ C_m ⊙ C_l) Aᵀ`."""
    rng = np.random.default_rng(0)
    sizes = {"a": (6, 2), "b": (2, 3), "h": (2, 2), "l": (5, 2), "m": (2,)}
    factors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in sizes.items()}
    x, weight = rng.normal(size=(4, 6)).astype(np.float32), factors["l"][3] * factors["m"]
    given = {name: jnp.asarray(value) for name, value in factors.items()} | {"layer": jnp.int32(3)}
    zero = jnp.zeros((6, 6))

    @jax.jit
    def forward():
        one = lambda orientation: vj.LoRTA(rank=2, alpha=2.0, heads=2, orientation=orientation)
        return [one(orientation).forward(jnp.asarray(x), x @ zero, zero, given) for orientation in ("out", "in")]

    out, back = forward()
    close(out, np.hstack([(x @ factors["a"] * factors["h"][h] * weight) @ factors["b"] for h in range(2)]))
    heads = [x[:, :3], x[:, 3:]]
    close(back, sum((heads[h] @ factors["b"].T * factors["h"][h] * weight) @ factors["a"].T for h in range(2)))


def test_at_the_start_only_b_has_a_gradient(stacked):
    graphdef, base = stacked
    adapter = started(vj.LoRTA(rank=2, heads=2), base)
    loss = lambda t: (vj.apply(graphdef, base, adapter.with_trainable(t), X) ** 2).sum()
    gradient = flatten(jax.jit(jax.grad(loss))(adapter.trainable))
    assert len(gradient) == 4 + 4
    assert [path for path, value in gradient.items() if np.asarray(value).any()] == ["shared/b"]


def test_one_head_one_layer_and_ones_are_lora_with_shared_factors():
    _, base = parameters(lambda rngs: nnx.Dict(q=nnx.Linear(4, 4, rngs=rngs), v=nnx.Linear(4, 4, rngs=rngs)))
    lorta = moved(started(vj.LoRTA(rank=2, alpha=3.0), base))
    ones = {name: value if name in ("a", "b") else jnp.ones_like(value) for name, value in lorta.shared.items()}
    lorta = lorta.with_trainable(lorta.trainable | {"shared": ones})
    lora = random_adapter(vj.LoRA(rank=2, alpha=3.0), base)
    same = {"a": ones["a"], "b": ones["b"]}
    lora = lora.with_trainable({"sites": {"q": same, "v": same}, "shared": {}, "full": {}})
    kernels = flatten(base)
    for each in lora.sites:
        close(*(site_delta(adapter, each, kernels[each.leaf_path]) for adapter in (lorta, lora)))


def test_layers_in_a_list_are_layers_of_a_stack(stacked):
    graphdef, base = stacked
    layered, apart = parameters(Unrolled)
    stacks = flatten(base)
    values = [stacks[path.replace(f"/{path.split('/')[1]}/", "/")][int(path.split("/")[1])] for path in flatten(apart)]
    apart = jax.tree.unflatten(jax.tree.structure(apart), values)
    adapter = moved(started(vj.LoRTA(rank=2, heads=2), base))
    other = started(vj.LoRTA(rank=2, heads=2), apart)
    shared = {path.replace("layers/", "layers/*/"): value for path, value in adapter.shared.items()}
    other = other.with_trainable(other.trainable | {"shared": shared})

    @jax.jit
    def both():
        slope = lambda graph, base, adapter: jax.value_and_grad(
            lambda t: (vj.apply(graph, base, adapter.with_trainable(t), X) ** 2).sum()
        )(adapter.trainable)
        return slope(graphdef, base, adapter), slope(layered, apart, other)

    (value, slope), (again, unrolled) = both()
    close(value, again)
    for path, gradient in slope["shared"].items():
        close(unrolled["shared"][path.replace("layers/", "layers/*/")], gradient, 1e-5)


def test_places_follow_stacks_and_numbers():
    places = layer_places([site("blocks/q", stack=(2, 3)), site("out")])
    np.testing.assert_array_equal(places["blocks/q"], [[0, 1, 2], [3, 4, 5]])
    assert places["out"] == 0
    places = layer_places(
        [site(f"layers/{number}/{name}") for number, name in ((10, "q"), (2, "q"), (10, "o"), (7, "v"))]
    )
    assert {path: int(place) for path, place in places.items()} == {
        "layers/2/q": 0,
        "layers/7/v": 1,
        "layers/10/q": 2,
        "layers/10/o": 2,
    }


@pytest.mark.parametrize(("start_scale", "bound"), [(0.0, (6 / 16) ** 0.5), (1.0, 16**-0.5)])
def test_factors_are_drawn_within_their_bounds(start_scale, bound):
    sites = [site("q", (256, 256), (64,))]
    method = vj.LoRTA(rank=16, heads=64, start_scale=start_scale)
    shared = jax.jit(lambda: vj.init(method, jax.random.key(0), {}, sites).shared)()
    assert not shared["b"].any()
    for name, end in (("a", 16**-0.5), ("h", bound), ("l", bound)):
        assert 0.98 * end < np.abs(shared[name]).max() <= end
        close(np.std(shared[name]), end / 3**0.5, 0.02)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ([site("q"), site("k", (4, 2))], r"lorta: k is \(4, 2\); kernels must be \(4, 4\), all of one size: exclude"),
        ([site("up", (4, 8))], r"lorta: up is \(4, 8\); kernels must be \(4, 4\)"),
        ([site("q"), site("big", (8, 8))], r"lorta: big is \(8, 8\); kernels must be \(4, 4\)"),
        ([site("words", kind="embed")], "lorta: words is an embedding; kernels must be"),
        ([site("q", (3, 3))], "lorta: heads 2 does not divide 3, the side of q"),
    ],
)
def test_kernels_that_do_not_fit_are_refused(sites, message):
    with pytest.raises(ConfigError, match=message):
        vj.init(vj.LoRTA(heads=2, targets=".*"), jax.random.key(0), {}, sites)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lorta: rank is 0; it must be at least 1"),
        ({"heads": 0}, "lorta: heads is 0; it must be at least 1"),
        ({"orientation": "up"}, "lorta: orientation is 'up'; it must be one of out, in"),
        ({"dropout": 1.0}, "lorta: dropout is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_impossible_options_are_refused_by_name(unchecked, options, message):
    with pytest.raises(ConfigError, match=message):
        vj.LoRTA(**options)
