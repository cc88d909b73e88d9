"""Tables of options by site, of every method that has them in common."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import parameters
from third_party import LaxScanned

import vlora_jax as vj
from vlora_jax.adapters.ranked import Ranked, uniform
from vlora_jax.adapters.registry import METHODS
from vlora_jax.errors import ConfigError, TargetError

RANKED = [method for method in METHODS.values() if issubclass(method, Ranked)]
ranked = pytest.mark.parametrize("method", RANKED, ids=[method.name for method in RANKED])


@pytest.fixture(scope="module")
def base():
    return parameters(LaxScanned)[1]


def start(method, base):
    return jax.eval_shape(lambda base: vj.init(method, jax.random.key(0), base), base)


@ranked
def test_tables_give_sites_their_own_options(base, method):
    adapter = start(method(rank=2, rank_pattern={"up": 1}), base)
    alone = start(method(rank=1, targets="up"), base)
    assert adapter.trainable["sites"]["blocks/up"] == alone.trainable["sites"]["blocks/up"]
    by_path = {site.path: adapter.method.for_site(site) for site in adapter.sites}
    assert {path: each.rank for path, each in by_path.items()} == {"blocks/up": 1, "blocks/mix": 2, "blocks/down": 2}
    assert all(value == () for each in by_path.values() for value in (getattr(each, t) for t in each.tables.values()))


@pytest.mark.parametrize("method", [vj.LoHa, vj.LoKr])
def test_alpha_follows_its_table(base, method):
    adapter = start(method(rank=2, alpha=6.0, alpha_pattern={"up|mix": 5.0}), base)
    scales = {site.path: adapter.method.for_site(site).scale for site in adapter.sites}
    assert scales == {"blocks/up": 2.5, "blocks/mix": 2.5, "blocks/down": 3.0}


@ranked
def test_tables_that_mean_nothing_are_refused(unchecked, base, method):
    name = method.name
    with pytest.raises(TargetError, match=f"{name}: rank_pattern: target 'up_proj' matches nothing"):
        start(method(rank=2, rank_pattern={"up_proj": 1}), base)
    with pytest.raises(ConfigError, match=f"{name}: rank_pattern: .* both match blocks/up"):
        start(method(rank=2, rank_pattern={"up": 1, "blocks/.*": 1}), base)
    for value, what in {0: "at least 1", 1.5: "a whole number", (1, 2): "a whole number"}.items():
        with pytest.raises(ConfigError, match=rf"{name}: rank_pattern\['up'\]: rank is .*; it must be {what}"):
            method(rank_pattern={"up": value})
    with pytest.raises(ConfigError, match=f"{name}: rank is 0; it must be at least 1"):
        method(rank=0)


@pytest.mark.parametrize("method", [vj.LoHa, vj.HiRA, vj.DeLoRA])
def test_a_rank_above_the_smaller_side_is_refused(base, method):
    message = rf"{method.name}: rank 5 is above the smaller side, 4, of blocks/up \(4, 6\)"
    with pytest.raises(ConfigError, match=message):
        start(method(rank=2, rank_pattern={"up": 5}), base)


@pytest.mark.parametrize("method", [vj.HiRA, vj.DeLoRA])
@pytest.mark.parametrize("dropout", [1.0, -0.1])
def test_a_dropout_that_is_no_share_is_refused(method, dropout):
    with pytest.raises(ConfigError, match=f"{method.name}: dropout is {dropout}; it must be at least 0 and below 1"):
        method(dropout=dropout)


@pytest.mark.parametrize("method", [vj.HiRA, vj.DeLoRA])
def test_dropout_hides_inputs_of_the_change_only(method):
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 4, use_bias=False, rngs=rngs))
    adapter = vj.init(method(rank=2, dropout=0.5), jax.random.key(0), base)
    adapter = adapter.with_trainable(jax.tree.map(lambda leaf: leaf + 0.5, adapter.trainable))
    x = jnp.eye(4)
    call = lambda adapters, key=None: vj.apply(graphdef, base, adapters, x, key=key)
    bare, whole, dropped = jax.jit(lambda: (call(None), call(adapter), call(adapter, jax.random.key(1))))()
    share = np.round(np.asarray((dropped - bare) / (whole - bare)), 4)
    assert set(share.ravel().tolist()) == {0.0, 2.0}
    assert (share == share[:, :1]).all()


def test_methods_keep_their_tables_as_plain_values():
    method = vj.DeLoRA(rank_pattern={"q": 4}, boundary_pattern={"v": 3.0})
    assert method.config()["boundary_pattern"] == {"v": 3.0}
    assert dataclasses.replace(method, rank=3).rank_pattern == (("q", 4),)


def test_uniform_starts_have_torch_s_bound():
    drawn = np.asarray(uniform(jax.random.key(0), (64, 48), 16))
    assert 0.24 < np.abs(drawn).max() <= 0.25
    assert abs(drawn.std() - 0.25 / 3**0.5) < 0.005
