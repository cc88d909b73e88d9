"""Sums of adapters against sums of their changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, mostly_slow, moved, parameters, random_adapter
from test_methods import X, adapters, tower

import vlora_jax as vj
from vlora_jax.adapters.merge import site_delta, site_shift
from vlora_jax.adapters.registry import METHODS
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError, ConversionError, TargetError

QUICK = ("lora", "dora", "vera", "tied_lora", "ia3")  # thin, of the kernel, shared, shared by role, with biases
MERGEABLE = [name for name, method in METHODS.items() if method.on_sites and method.mergeable]
WEIGHTS = (0.5, -0.75, 0.25)  # larger ones blow outputs up until float32 has not the digits that are compared


def several(name):
    """The base, an adapter of a method, another of it, and a DoRA on some of the sites, with random values."""
    base, _, one = adapters(name)
    return base, [one, moved(one, 5), random_adapter(vj.DoRA(targets="blocks/down", rank=1), base, 7)]


def changes(adapter, leaves):
    """ΔW and the change of the bias of every site."""
    return {
        site.path: (site_delta(adapter, site, site.read(leaves)), site_shift(adapter, site)) for site in adapter.sites
    }


@pytest.mark.parametrize("name", mostly_slow(MERGEABLE, QUICK))
def test_changes_add_up_whatever_the_method(name):
    base, members = several(name)
    whole = vj.weighted_sum(members, WEIGHTS)

    @jax.jit
    def everything(base, members, whole):
        graphdef, leaves = tower(name)[0], flatten(base)
        models = vj.apply(graphdef, base, whole, X), vj.apply(graphdef, vj.merge(base, whole), None, X)
        return changes(whole, leaves), [changes(member, leaves) for member in members], models

    total, each, (bound, merged) = everything(base, members, whole)
    assert total.keys() == {path for own in each for path in own}
    for path, (delta, shift) in total.items():
        own = [(weight, *found[path]) for weight, found in zip(WEIGHTS, each, strict=True) if path in found]
        close(delta, sum(weight * delta for weight, delta, _ in own))
        moves = [weight * shift for weight, _, shift in own if shift is not None]
        assert (shift is None) == (not moves)
        if moves:
            close(shift, sum(moves))
    close(bound, merged)


def linear(name="lora", **options):
    """One layer, where outputs add up as changes do: its graph, parameters, and two adapters with random values."""
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 4, rngs=rngs))
    adapter = random_adapter(METHODS[name](**options), base)
    return graphdef, base, adapter, moved(adapter, 4)


def test_methods_that_depend_on_the_input_add_up_as_well():
    graphdef, base, one, other = linear("flylora", rank=4, active=2)
    out = lambda adapter: np.asarray(vj.apply(graphdef, base, adapter, X))
    change = lambda adapter: out(adapter) - out(None)
    close(change(vj.weighted_sum([one, other], [2.0, -3.0])), 2 * change(one) - 3 * change(other))
    assert not vj.negate(one).method.mergeable
    with pytest.raises(ConversionError, match="flylora depends on the input"):
        vj.merge(base, vj.negate(one))


def test_the_words_are_what_they_say():
    graphdef, base, one, other = linear(rank=2)
    kernel = lambda adapter: np.asarray(vj.merge(base, adapter)["kernel"][...] - base["kernel"][...])
    first, second = kernel(one), kernel(other)
    close(kernel(vj.add(one, other)), first + second)
    close(kernel(vj.scale(one, 0.3)), 0.3 * first)
    close(kernel(vj.negate(one)), -first)
    close(kernel(vj.average(one, other, one)), (2 * first + second) / 3)
    close(kernel(vj.interpolate(one, other, 0.25)), 0.75 * first + 0.25 * second)
    close(kernel(vj.add(vj.scale(one, 2), vj.negate(vj.add(one, other)))), first - second)  # sums of sums
    bound = [vj.apply(graphdef, base, adapters, X) for adapters in ([one, other], vj.add(one, other))]
    close(*map(np.asarray, bound))


def test_a_sum_is_an_adapter_like_any_other():
    """It trains, stacks, takes traced weights, and is exactly one plain LoRA."""
    graphdef, base, one, other = linear(rank=2)
    whole = vj.average(one, other)
    found, residuals = vj.as_lora(base, whole, 4)
    assert (found.method.name, found.method.rank) == ("lora", 4)
    assert residuals["kernel" if "kernel" in residuals else ""].max() < 1e-6
    close(np.asarray(vj.apply(graphdef, base, found, X)), np.asarray(vj.apply(graphdef, base, whole, X)))
    loss = lambda tensors: (vj.apply(graphdef, base, whole.with_trainable(tensors), X) ** 2).sum()
    slopes = flatten(jax.grad(loss)(whole.trainable))
    assert len(slopes) == 4
    assert all(float(jnp.abs(slope).max()) > 0 for slope in slopes.values())
    two = vj.stack_adapters([whole, vj.average(other, one)])
    rows = vj.bind(graphdef, base, two, rows=jnp.asarray([0, 1]))(X)
    close(rows[0], vj.apply(graphdef, base, whole, X)[0])
    along = jax.jit(jax.vmap(lambda share: vj.apply(graphdef, base, vj.interpolate(one, other, share), X)))
    ends = along(jnp.asarray([0.0, 1.0]))
    close(ends[0], vj.apply(graphdef, base, one, X))
    close(ends[1], vj.apply(graphdef, base, other, X))


def test_what_is_trained_whole_moves_from_the_base():
    _, base, one, other = linear(rank=2, full="bias")
    ones = {"bias": jnp.ones(4)}
    one = one.with_trainable(one.trainable | {"full": ones})
    other = other.with_trainable(other.trainable | {"full": {"bias": 3 * ones["bias"]}})
    stored = np.asarray(base["bias"][...])
    close(vj.average(one, other, base=base).trainable["full"]["bias"], np.full(4, 2.0))
    close(vj.negate(one, base).trainable["full"]["bias"], 2 * stored - 1)
    with pytest.raises(ConfigError, match="bias is trained whole: its change is to the base, give base="):
        vj.add(one, other)


def test_impossible_sums():
    _, _, one, other = linear(rank=2)
    foreign = random_adapter(vj.LoRA(rank=2), parameters(lambda rngs: nnx.Linear(4, 6, rngs=rngs))[1])
    with pytest.raises(TargetError, match="they are of different models"):
        vj.add(one, foreign)
    with pytest.raises(ConfigError, match="there are no adapters"):
        vj.add()
    with pytest.raises(ConfigError, match="weighted_sum: 1 weights for 2 adapters"):
        vj.weighted_sum([one, other], [1.0])
    with pytest.raises(ConfigError, match="the weight of adapter 0 is nan"):
        vj.scale(one, float("nan"))
    with pytest.raises(ConversionError, match="make it a plain LoRA with as_lora"):
        vj.negate(one).method.config()
