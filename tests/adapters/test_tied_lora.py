"""Tied-LoRA: what is shared and how its gradient adds up, its one zero, its relatives, and the sizes it counts."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from helpers import close, filled, moved, parameters, random_adapter
from third_party import Block, LaxScanned

import vlora_jax as vj
from vlora_jax.adapters import linen
from vlora_jax.adapters.merge import site_delta
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError
from vlora_jax.hub.peft_lora import as_lora
from vlora_jax.inspection.spectra import adapter_spectra
from vlora_jax.inspection.tables import adapter_rows

X = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 4)), jnp.float32)
SITE = Site("blocks/up", "kernel", "dense", (3,), (4, 6), (0,), (1,))
TRAINED = [dict(zip("abuv", flags, strict=True)) for flags in itertools.product([True, False], repeat=4) if any(flags)]


class Unrolled(nnx.Module):
    """The blocks of `LaxScanned` in a list, run one after the other."""

    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(3)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def stacked():
    return parameters(LaxScanned)


def started(method, base):
    return jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base)


def flags(trained, **more):
    return {f"train_{name}": on for name, on in trained.items()} | more


def test_it_trains_as_many_numbers_as_its_tables_say():
    """The fused kernel of queries, keys and values, of LLaMA2-7B and of a model of 24 layers of 2048."""
    sizes = {
        (32, 4096): {
            2: (1_048_576, 32_768, 426_048, 393_280),
            8: (4_194_304, 131_072, 524_544, 393_472),
            16: (8_388_608, 262_144, 655_872, 393_728),
            32: (16_777_216, 524_288, 918_528, 394_240),
            64: (33_554_432, 1_048_576, 1_443_840, 395_264),
            128: (67_108_864, 2_097_152, 2_494_464, 397_312),
        },
        (24, 2048): {
            2: (393_216, 16_384, 163_888),
            8: (1_572_864, 65_536, 213_184),
            16: (3_145_728, 131_072, 278_912),
            32: (6_291_456, 262_144, 410_368),
            64: (12_582_912, 524_288, 673_280),
            128: (25_165_824, 1_048_576, 1_199_104),
        },
    }
    for (layers, width), by_rank in sizes.items():
        base = {"qkv": {"kernel": jax.ShapeDtypeStruct((layers, width, 3 * width), "float32")}}
        sites = [Site("qkv", "kernel", "dense", (layers,), (width, 3 * width), (0,), (1,))]
        for rank, numbers in by_rank.items():
            for preset, expected in zip(("lora", "tl5", "tl6", "vera_like"), numbers, strict=False):
                method = vj.TiedLoRA(rank=rank, preset=preset)
                adapter = jax.eval_shape(lambda base: vj.init(method, jax.random.key(0), base, sites), base)
                assert vj.count(adapter) == expected, (layers, rank, preset)


def test_every_choice_of_what_is_tied_and_trains_has_its_count():
    layers, i, o, r = 3, 4, 6, 2
    for trained, tie_a, tie_b in itertools.product(TRAINED, [True, False], [True, False]):
        method = vj.TiedLoRA(rank=r, **flags(trained, tie_a=tie_a, tie_b=tie_b))
        shapes = jax.eval_shape(lambda: vj.init(method, jax.random.key(0), {}, [SITE]))
        sizes = {"a": (1 if tie_a else layers) * i * r, "b": (1 if tie_b else layers) * r * o}
        sizes |= {"u": layers * r, "v": layers * o}
        assert vj.count(shapes) == sum(sizes[name] for name in "abuv" if trained[name])
        frozen = sum(sizes[name] for name in "ab" if not trained[name])
        assert vj.count(shapes.frozen) == frozen


def test_the_start_has_one_zero_and_a_gradient_past_it():
    """Of all 15 choices of what trains, and each start that they allow: ΔW is zero, its gradient is not."""
    weights = np.random.default_rng(1).normal(size=(4, 6))
    site, starts = Site("up", "kernel", "dense", (), (4, 6), (0,), (1,)), 0
    for trained in TRAINED:
        for start in ("auto", *(f"zero_{name}" for name in "abuv" if trained[name])):
            method = vj.TiedLoRA(rank=2, start=start, **flags(trained))
            adapter = vj.init(method, jax.random.key(0), {}, [site])
            tensors = {"u": np.ones(2), "v": np.ones(6)}
            tensors |= jax.tree.map(np.asarray, adapter.factors("up") | adapter.shared_at("up"))
            a, b, u, v = (tensors[name] for name in "abuv")
            slopes = {  # of Σ ΔW ⊙ weights
                "a": weights @ (u[:, None] * b * v).T,
                "b": (a * u).T @ weights * v,
                "u": np.einsum("ir,ro,io->r", a, b * v, weights),
                "v": np.einsum("ir,ro,io->o", a * u, b, weights),
            }
            assert sum(not value.any() for value in tensors.values()) == 1
            assert max(np.abs(slopes[name]).max() for name in "abuv" if trained[name]) > 0.1
            starts += 1
    assert starts == 15 + 4 * 8


@pytest.mark.parametrize(
    ("options", "zero"),
    [
        ({"preset": "lora"}, "b"),
        ({"preset": "tl5"}, "b"),
        ({"preset": "tl6"}, "b"),
        ({"preset": "tl6", "start": "zero_v"}, "v"),
        ({"preset": "vera_like"}, "v"),
        ({"preset": "vera_like", "train_v": False}, "u"),
        ({"preset": "tl5", "train_b": False}, "a"),
    ],
)
def test_the_zero_is_where_the_method_says(options, zero):
    method = vj.TiedLoRA(rank=2, **options)
    adapter = vj.init(method, jax.random.key(0), {}, [SITE])
    tensors = adapter.factors(SITE.path) | adapter.shared_at(SITE.path)
    assert [name for name, value in sorted(tensors.items()) if not np.asarray(value).any()] == [zero]
    assert all((np.asarray(tensors[name]) == 1).all() for name in "uv" if name in tensors and name != zero)


@pytest.mark.parametrize(
    ("draw", "deviation"), [("normal", 1.0), ("kaiming", 64**-0.5 / 3**0.5), ("xavier", (6 / 80) ** 0.5 / 3**0.5)]
)
def test_a_is_drawn_as_asked(draw, deviation):
    site = Site("q", "kernel", "dense", (), (64, 48), (0,), (1,))
    a = vj.init(vj.TiedLoRA(rank=16, draw=draw), jax.random.key(0), {}, [site]).shared["q/a"]
    close(np.std(a), deviation, 0.04)


def test_the_change_is_the_product_of_the_four(stacked):
    _, base = stacked
    adapter = moved(started(vj.TiedLoRA(rank=2), base))
    (up,) = vj.select(adapter.sites, "up")
    delta = jax.jit(lambda: site_delta(adapter, up, jnp.zeros((3, 4, 6))))()
    a, b = (np.asarray(adapter.shared[f"blocks/up/{name}"]) for name in "ab")
    u, v = (np.asarray(adapter.factors(up.path)[name]) for name in "uv")
    close(delta, np.stack([a @ np.diag(u[i]) @ b @ np.diag(v[i]) for i in range(3)]))


def test_the_gradient_of_a_tied_tensor_is_the_sum_of_the_layers(stacked):
    graphdef, base = stacked
    tied = moved(started(vj.TiedLoRA(rank=2), base))
    own = random_adapter(vj.TiedLoRA(rank=2, tie_a=False, tie_b=False), base)
    copied = {
        site.path: tied.factors(site.path)
        | {name: jnp.broadcast_to(value, (3, *value.shape)) for name, value in tied.shared_at(site.path).items()}
        for site in tied.sites
    }
    own = own.with_trainable(own.trainable | {"sites": copied})

    @jax.jit
    def both():
        out, slopes = [], []
        for adapter in (tied, own):
            loss = lambda t: (vj.apply(graphdef, base, adapter.with_trainable(t), X) ** 2).sum()
            value, slope = jax.value_and_grad(loss)(adapter.trainable)
            out.append(value)
            slopes.append(slope)
        return out, slopes

    (value, again), (tied_slope, own_slope) = both()
    close(value, again)
    for site in tied.sites:
        for name in "ab":
            layers = own_slope["sites"][site.path][name]
            close(tied_slope["shared"][f"{site.path}/{name}"], np.sum(layers, axis=0), 1e-5)
            assert np.abs(layers).reshape(3, -1).max(axis=1).min() > 1e-3
        for name in "uv":
            close(tied_slope["sites"][site.path][name], own_slope["sites"][site.path][name], 1e-5)


def test_layers_that_are_not_stacked_are_tied_alike(stacked):
    graphdef, base = stacked
    layered, apart = parameters(Unrolled)
    stacks = flatten(base)
    values = {
        path: stacks[path.replace(f"/{n}/", "/")][n] for path in flatten(apart) for n in range(3) if f"/{n}/" in path
    }
    apart = jax.tree.unflatten(jax.tree.structure(apart), [values[path] for path in flatten(apart)])
    tied = moved(started(vj.TiedLoRA(rank=2), base))
    other = started(vj.TiedLoRA(rank=2), apart)
    assert sorted(other.shared) == sorted(path.replace("blocks/", "blocks/*/") for path in tied.shared)
    sites = {
        site.path: {
            name: value[int(site.path.split("/")[1])]
            for name, value in tied.factors("blocks/" + site.path.split("/")[2]).items()
        }
        for site in other.sites
    }
    shared = {path.replace("blocks/", "blocks/*/"): value for path, value in tied.trainable["shared"].items()}
    other = other.with_trainable({"sites": sites, "shared": shared, "full": {}})

    @jax.jit
    def both():
        slope = lambda graph, base, adapter: jax.value_and_grad(
            lambda t: (vj.apply(graph, base, adapter.with_trainable(t), X) ** 2).sum()
        )(adapter.trainable)
        return slope(graphdef, base, tied), slope(layered, apart, other)

    (value, slope), (again, unrolled) = both()
    close(value, again)
    for path, gradient in slope["shared"].items():
        close(unrolled["shared"][path.replace("blocks/", "blocks/*/")], gradient, 1e-5)


def test_tl6_with_fixed_ones_is_tl5_step_by_step(stacked):
    graphdef, base = stacked
    tl5, tl6 = (started(vj.TiedLoRA(rank=2, preset=preset, targets="up"), base) for preset in ("tl5", "tl6"))
    for path, value in tl5.shared.items():
        np.testing.assert_array_equal(value, tl6.shared[path])
    tx = optax.adam(0.1)

    def steps(adapter):
        @jax.jit
        def step(trainable, state):
            loss = lambda t: ((vj.apply(graphdef, base, adapter.with_trainable(t), X) - 1) ** 2).mean()
            value, slope = jax.value_and_grad(loss)(trainable)
            updates, state = tx.update(slope, state)
            stepped = optax.apply_updates(trainable, updates)
            return stepped | {"sites": trainable["sites"]}, state, value

        trainable, state, losses = adapter.trainable, tx.init(adapter.trainable), []
        for _ in range(4):
            trainable, state, value = step(trainable, state)
            losses.append(float(value))
        return losses, trainable["shared"]

    (losses, a), (again, b) = steps(tl5), steps(tl6)
    close(losses, again)
    assert losses[3] < losses[0] - 1e-2
    for path in a:
        close(a[path], b[path], 1e-5)


def test_tl5_of_one_layer_is_lora():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 5, rngs=rngs))
    tied = moved(started(vj.TiedLoRA(rank=2, preset="tl5"), base))
    lora = random_adapter(vj.LoRA(rank=2, alpha=2.0), base)
    lora = lora.with_trainable({"sites": {"": tied.shared}, "shared": {}, "full": {}})

    @jax.jit
    def both():
        slope = lambda adapter: jax.value_and_grad(
            lambda t: (vj.apply(graphdef, base, adapter.with_trainable(t), X) ** 2).sum()
        )(adapter.trainable)
        return slope(tied), slope(lora)

    (value, slope), (again, lora_slope) = both()
    close(value, again)
    for name in "ab":
        close(slope["shared"][name], lora_slope["sites"][""][name])


def test_vera_like_is_vera_with_u_and_v_for_d_and_b(stacked):
    """Also A diag(d) B diag(b) by NumPy; the projections are frozen and belong to all layers."""
    graphdef, base = stacked
    start = started(vj.TiedLoRA(rank=5, preset="vera_like", targets="up"), base)
    assert sorted(start.frozen["shared"]) == ["blocks/up/a", "blocks/up/b"]
    assert start.trainable["shared"] == {}
    adapter = moved(start)
    (site,) = adapter.sites
    d, b = (np.asarray(adapter.factors(site.path)[name]) for name in "uv")
    down, up = (np.asarray(start.frozen["shared"][f"blocks/up/{name}"]) for name in "ab")
    delta = jax.jit(lambda: site_delta(adapter, site, jnp.zeros((3, 4, 6))))()
    for layer in range(3):
        close(delta[layer], down @ np.diag(d[layer]) @ up @ np.diag(b[layer]))
    vera = vj.init(vj.VeRA(rank=5, targets="up"), jax.random.key(0), base)
    vera = dataclasses.replace(
        vera,
        trainable=vera.trainable | {"sites": {site.path: {"d": jnp.asarray(d), "b": jnp.asarray(b)}}},
        frozen=vera.frozen | {"shared": {"projection_a": jnp.asarray(down), "projection_b": jnp.asarray(up)}},
    )

    @jax.jit
    def slopes():
        of = lambda adapter: jax.value_and_grad(
            lambda t: (vj.apply(graphdef, base, adapter.with_trainable(t), X) ** 2).sum()
        )(adapter.trainable)
        return of(adapter), of(vera)

    (value, slope), (again, vera_slope) = slopes()
    close(value, again)
    for ours, theirs in (("u", "d"), ("v", "b")):
        close(slope["sites"][site.path][ours], vera_slope["sites"][site.path][theirs], 1e-5)


def test_spectra_tables_and_plain_lora_know_what_layers_share(stacked):
    """Of TL5, where no tensor has a layer axis: every layer has the change of the tied factors."""
    _, base = stacked
    adapter = moved(started(vj.TiedLoRA(rank=2, preset="tl5", targets="up|down"), base))
    spectra = adapter_spectra(None, adapter)
    plain, residuals = as_lora(base, adapter, max_rank=2)
    for site in adapter.sites:
        a, b = (np.asarray(adapter.shared[f"{site.path}/{name}"]) for name in "ab")
        norm = np.linalg.norm(a @ b)
        close(spectra[site.path].norm, np.full(3, norm), 1e-5)
        close(np.matmul(plain.factors(site.path)["a"], plain.factors(site.path)["b"]), np.stack([a @ b] * 3), 1e-5)
        assert not residuals[site.path].any()
    assert sum(row.numbers for row in adapter_rows(base, adapter)) == vj.count(adapter)


class Layer(nn.Module):
    """One dense layer, named."""

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(4, name="q")(x)


class Numbered(nn.Module):
    """A Linen model whose layers have numbers in their names."""

    @nn.compact
    def __call__(self, x):
        for layer in range(2):
            x = Layer(name=f"block_{layer}")(x)
        return x


def test_linen_layers_are_tied_by_their_numbers():
    model = Numbered()
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), X), 0)
    sites = linen.find_sites(model, variables, X)
    adapter = moved(vj.init(vj.TiedLoRA(rank=2), jax.random.key(0), variables["params"], sites))
    assert len(adapter.sites) == 2
    assert len(adapter.shared) == 2
    bound, merged, bare = jax.jit(
        lambda: (
            linen.apply(model, variables, adapter, X),
            model.apply({"params": vj.merge(variables["params"], adapter)}, X),
            model.apply(variables, X),
        )
    )()
    close(bound, merged)
    assert np.abs(bound - bare).max() > 0.1


def test_layers_of_different_sides_are_tied_only_where_they_agree():
    layer = lambda number, out: Site(f"layers/{number}/q", "kernel", "dense", (), (4, out), (0,), (1,))
    sites = [layer(0, 6), layer(1, 8)]
    with pytest.raises(ConfigError, match=r"tied_lora: b of layers/1/q is \(2, 8\), of an earlier layer \(2, 6\)"):
        vj.init(vj.TiedLoRA(rank=2, targets=".*"), jax.random.key(0), {}, sites)
    adapter = vj.init(vj.TiedLoRA(rank=2, targets=".*", tie_b=False), jax.random.key(0), {}, sites)
    assert {path: value.shape for path, value in adapter.shared.items()} == {"layers/*/q/a": (4, 2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "tied_lora: rank is 0; it must be at least 1"),
        ({"preset": "tl1"}, "tied_lora: preset is 'tl1'; it must be one of lora, tl5, tl6, vera_like"),
        ({"tie_a": 1}, "tied_lora: tie_a is 1; it must be true or false"),
        ({"train_v": "yes"}, "tied_lora: train_v is 'yes'; it must be true or false"),
        ({"preset": "vera_like", "train_u": False, "train_v": False}, "tied_lora: nothing trains; switch on one of"),
        (
            {"preset": "vera_like", "start": "zero_b"},
            "start is zero_b, but b does not train and would stay zero; it must be auto, zero_v, zero_u",
        ),
        ({"preset": "tl5", "start": "zero_v"}, "start is zero_v, but v does not train and would stay zero"),
    ],
)
def test_impossible_options_are_refused_by_name(unchecked, options, message):
    with pytest.raises(ConfigError, match=message):
        vj.TiedLoRA(**options)
