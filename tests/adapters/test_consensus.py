"""TIES and DARE against NumPy, entry by entry, on the dense changes of every method."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, mostly_slow, random_adapter
from test_arithmetic import MERGEABLE, WEIGHTS, changes, linear, several
from test_methods import X, tower

import vlora_jax as vj
from vlora_jax.adapters.merge import site_delta
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError, ConversionError

QUICK = ("ia3",)  # of the kernel and with biases; a thin one is among the members
DENSITY, DROP = 0.4, 0.5
NEAR = 1e-5  # of the largest entry: what rounding may put on either side of a border


def ties_by_hand(members, weights, density):
    """TIES of one kernel's changes, entry by entry, and which entries no rounding decides."""
    kept, sure = [], np.ones(members[0].shape, bool)
    for change, weight in zip(members, weights, strict=True):
        border = sorted(map(abs, change.ravel()), reverse=True)[max(1, round(density * change.size)) - 1]
        kept.append(np.where(np.abs(change) >= border, weight * change, 0.0))
        sure &= (np.abs(np.abs(change) - border) > NEAR * np.abs(change).max()) | (border == 0)
    merged = np.zeros(members[0].shape)
    for place in np.ndindex(merged.shape):
        values = [each[place] for each in kept]
        total = sum(values)
        agreeing = [(value, abs(w)) for value, w in zip(values, weights, strict=True) if value * total > 0]
        merged[place] = sum(v for v, _ in agreeing) / sum(w for _, w in agreeing) if agreeing else 0.0
        sure[place] &= total == 0 or abs(total) > NEAR * max(map(abs, values))
    return merged, sure


@pytest.mark.parametrize("name", mostly_slow(MERGEABLE, QUICK))
def test_entries_are_those_of_the_papers_whatever_the_method(name):
    base, members = several(name)
    elected = vj.ties(members, WEIGHTS, DENSITY)
    dropped = [vj.dare(each, DROP, jax.random.key(seed)) for seed, each in enumerate(members)]

    @jax.jit
    def everything(base, members, elected, dropped):
        graphdef, leaves = tower(name)[0], flatten(base)
        both = vj.ties(dropped, density=1.0)
        models = vj.apply(graphdef, base, both, X), vj.apply(graphdef, vj.merge(base, both), None, X)
        return [changes(each, leaves) for each in (*members, elected, *dropped)], models

    found, models = everything(base, members, elected, dropped)
    each, trimmed, thinned = found[:3], found[3], found[4:]
    for path, kind in itertools.product(trimmed, (0, 1)):
        here = [(own[path][kind], weight) for own, weight in zip(each, WEIGHTS, strict=True) if path in own]
        here = [(np.asarray(own, np.float64), weight) for own, weight in here if own is not None]
        assert (trimmed[path][kind] is None) == (not here)
        if not here:
            continue
        layers = lambda array, kind=kind: np.asarray(array).reshape(-1, *np.shape(array)[kind - 2 :])
        for layer, got in enumerate(layers(trimmed[path][kind])):
            merged, sure = ties_by_hand([layers(own)[layer] for own, _ in here], [w for _, w in here], DENSITY)
            close(got * sure, merged * sure)
            assert sure.mean() > 0.3
    for before, after in zip(each, thinned, strict=True):
        for path, (delta, _) in before.items():
            gone = np.asarray(after[path][0]) == 0
            close(after[path][0], np.where(gone, 0.0, np.asarray(delta) / (1 - DROP)))
    close(*models, 1e-5)


def kernel(base, adapter):
    """The change of the only kernel."""
    return np.asarray(vj.merge(base, adapter)["kernel"][...] - base["kernel"][...])


def test_equal_weights_give_the_disjoint_mean_whatever_they_are():
    _, base, one, other = linear(rank=2)
    close(kernel(base, vj.ties([one, other])), kernel(base, vj.ties([one, other], [0.5, 0.5])))
    close(kernel(base, vj.ties([one], density=1.0)), kernel(base, one))
    assert not kernel(base, vj.ties([one, vj.negate(one)], density=1.0)).any()  # nothing is left to elect


def test_what_is_dropped_is_the_key_s_alone_and_of_each_layer_its_own():
    _, members = several("lora")
    (site,) = [site for site in members[0].sites if site.path == "blocks/up"]
    change = lambda seed: site_delta(vj.dare(members[0], DROP, jax.random.key(seed)), site, jnp.zeros((3, 4, 6)))
    one, again, other = np.asarray(jax.jit(jax.vmap(change))(jnp.array([0, 0, 1]))) != 0
    assert (one == again).all()
    assert (one != other).any()
    assert (one[0] != one[1]).any()


def test_the_expectation_stays():
    """Over many keys the mean is the change, and the share that is dropped p."""
    _, base, adapter, _ = linear(rank=2)
    thinned = lambda key: vj.merge(base, vj.dare(adapter, 0.25, key))["kernel"][...] - base["kernel"][...]
    draws = np.asarray(jax.jit(jax.vmap(thinned))(jax.random.split(jax.random.key(0), 4000)))
    change = kernel(base, adapter)
    error = np.abs(change) * np.sqrt(0.25 / 0.75 / len(draws))  # standard deviation of the mean
    assert (np.abs(draws.mean(0) - change) <= 5 * error + 1e-6).all()
    assert (draws == 0).mean() == pytest.approx(0.25, abs=0.01)


def test_as_lora_tells_what_a_rank_leaves_out():
    _, base, one, other = linear(rank=2)
    whole = vj.ties([one, other], density=0.5)
    lora, residuals = vj.as_lora(base, whole, 2)
    values = np.linalg.svd(kernel(base, whole), compute_uv=False)
    (residual,) = residuals.values()
    close(residual, np.sqrt((values[2:] ** 2).sum() / (values**2).sum()), 1e-5)
    close(np.linalg.norm(kernel(base, lora) - kernel(base, whole)), np.sqrt((values[2:] ** 2).sum()), 1e-5)
    close(kernel(base, vj.as_lora(base, whole, 4)[0]), kernel(base, whole))


def test_what_is_trained_whole_is_blended_as_well():
    _, base, one, other = linear(rank=2, full="bias")
    start = np.asarray(base["bias"][...])
    set_to = lambda adapter, change: adapter.with_trainable(
        adapter.trainable | {"full": {"bias": jnp.asarray(start + np.array(change), jnp.float32)}}
    )
    one, other = set_to(one, [4.0, 1.0, -3.0, 2.0]), set_to(other, [2.0, -1.0, 5.0, 0.5])
    elected = vj.ties([one, other], density=0.5, base=base)
    close(elected.trainable["full"]["bias"] - start, [3.0, 0.0, 5.0, 0.0])
    lora, _ = vj.as_lora(base, elected, 4, plain=False)
    assert lora.method.full == ("bias",)
    close(*(np.asarray(vj.merge(base, each)["bias"][...]) for each in (lora, elected)))
    gone = vj.dare(one, 0.5, jax.random.key(0), base).trainable["full"]["bias"] - start
    close(np.where(np.abs(gone) > 1e-6, gone, 0), np.where(np.abs(gone) > 1e-6, [8.0, 2.0, -6.0, 4.0], 0))


def test_impossible_blends():
    _, base, one, other = linear(rank=2)
    gated = random_adapter(vj.FlyLoRA(rank=4, active=2), base)
    with pytest.raises(ConversionError, match="ties: flylora depends on the input, so that there is no ΔW"):
        vj.ties([one, gated])
    with pytest.raises(ConversionError, match="dare: flylora depends on the input"):
        vj.dare(gated, 0.5, jax.random.key(0))
    for density in (0.0, 1.5):
        with pytest.raises(ConfigError, match=f"ties: density is {density}; it must be above 0 and at most 1"):
            vj.ties([one, other], density=density)
    with pytest.raises(ConfigError, match=r"dare: drop is 1\.0; it must be at least 0 and below 1"):
        vj.dare(one, 1.0, jax.random.key(0))
    with pytest.raises(ConfigError, match="ties: 1 weights for 2 adapters"):
        vj.ties([one, other], [1.0])
