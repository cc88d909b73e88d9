"""The adapter pytree: partition and combine, masks for optax, counts."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import close, parameters, random_adapter
from third_party import LaxScanned

import vlora_jax as vj
from vlora_jax.adapters.adapter import trainable_mask
from vlora_jax.adapters.trees import flatten
from vlora_jax.training.step import Subject, train_step

SITE = vj.Site("up", "kernel", "dense", (), (4, 6), (0,), (1,))


def two_part_adapter():
    """Trainable and frozen tensors, of the site, shared, and whole."""
    tensors = {"a": jnp.ones((4, 2)), "b": jnp.full((2, 6), 2.0)}
    adapter = vj.Adapter.of(
        vj.LoRA(rank=2),
        [SITE],
        trainable={"up": tensors},
        frozen={"up": {"mask": jnp.arange(6)}},
        shared={"scale": jnp.full(3, 3.0)},
        frozen_shared={"bank": jnp.full((5, 2), 4.0)},
    )
    return adapter.with_trainable(adapter.trainable | {"full": {"up/bias": jnp.zeros(6)}})


TREE = {"base": {"kernel": jnp.ones((4, 6))}, "adapters": [two_part_adapter(), two_part_adapter()], "step": 3}


def test_an_adapter_gives_the_tensors_of_a_site_and_the_shared_ones():
    adapter = two_part_adapter()
    assert sorted(adapter.factors("up")) == ["a", "b", "mask"]
    assert adapter.factors("down") == {}
    assert sorted(adapter.shared) == ["bank", "scale"]


def test_a_shared_tensor_belongs_to_all_sites_or_to_those_of_one_role():
    paths = ("layers/0/q", "layers/1/q", "layers/1/v", "blocks/q", "q")
    adapter = vj.Adapter.of(
        vj.LoRA(),
        [vj.Site(path, "kernel", "dense", (), (4, 6), (0,), (1,)) for path in paths],
        trainable={},
        shared={"c": jnp.ones(1), "layers/*/q/a": jnp.ones(2), "layers/*/v/a": jnp.ones(3)},
        frozen_shared={"blocks/q/a": jnp.ones(4), "layers/*/q/b": jnp.ones(5)},
    )
    sizes = {path: {name: value.size for name, value in adapter.shared_at(path).items()} for path in paths}
    assert sizes == {
        "layers/0/q": {"c": 1, "a": 2, "b": 5},
        "layers/1/q": {"c": 1, "a": 2, "b": 5},
        "layers/1/v": {"c": 1, "a": 3},
        "blocks/q": {"c": 1, "a": 4},
        "q": {"c": 1},
    }


def test_sites_without_frozen_tensors_leave_no_trace():
    adapter = vj.Adapter.of(vj.LoRA(), [SITE], trainable={"up": {"a": jnp.ones(2)}}, frozen={"up": {}})
    assert adapter.frozen == {"sites": {}, "shared": {}}


def test_numbers_are_counted():
    adapter = two_part_adapter()
    assert vj.count(adapter) == 4 * 2 + 2 * 6 + 3 + 6
    assert vj.count(adapter.frozen) == 6 + 10
    assert vj.count({"kernel": jnp.ones((4, 6)), "scalar": jnp.float32(1)}) == 25
    assert vj.count(jax.eval_shape(lambda: adapter)) == vj.count(adapter)


def test_the_mask_marks_what_trains_wherever_adapters_are():
    mask = flatten(trainable_mask(TREE))
    assert mask.keys() == flatten(TREE).keys()
    assert {path for path, trains in mask.items() if trains} == {
        f"adapters/{index}/trainable/{leaf}"
        for index in (0, 1)
        for leaf in ("full/up/bias", "shared/scale", "sites/up/a", "sites/up/b")
    }
    assert set(mask.values()) == {True, False}


def test_partition_splits_and_combine_restores():
    trainable, rest = vj.partition(TREE)
    assert len(jax.tree.leaves(trainable)) == 8
    assert len(jax.tree.leaves(trainable)) + len(jax.tree.leaves(rest)) == len(jax.tree.leaves(TREE))
    assert trainable["base"] == {"kernel": None}
    assert rest["adapters"][0].trainable["sites"]["up"] == {"a": None, "b": None}
    for pair in ((trainable, rest), (rest, trainable)):
        again = vj.combine(*pair)
        assert jax.tree.structure(again) == jax.tree.structure(TREE)
        assert all(map(operator.is_, jax.tree.leaves(again), jax.tree.leaves(TREE)))


def test_combine_prefers_the_first_tree():
    assert vj.combine({"a": 1, "b": None}, {"a": 2, "b": 3}) == {"a": 1, "b": 3}


def loss_of(model, batch, train):
    squares = ((model(batch["x"]) - batch["y"]) ** 2).sum()
    return {"loss": squares, "correct": jnp.float32(0), "weight": jnp.float32(batch["x"].shape[0])}


@pytest.fixture(scope="module")
def training():
    """A model with an adapter, and three batches of one micro-batch each."""
    graphdef, base = parameters(LaxScanned)
    adapter = random_adapter(vj.LoRA(rank=2, targets="up|down", full="mix/bias"), base)
    rng = np.random.default_rng(3)
    draw = lambda: jnp.asarray(rng.normal(size=(1, 5, 4)), jnp.float32)
    return graphdef, base, adapter, [{"id": jnp.zeros((1, 5)), "x": draw(), "y": draw()} for _ in range(3)]


def clipped_adamw():
    return optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1))


@pytest.fixture(scope="module")
def stepped(training):
    """The adapter after three steps of the library's own train step, and the compiled step."""
    graphdef, base, adapter, batches = training
    tx = clipped_adamw()
    step = train_step(Subject(graphdef, adapter, loss_of), tx)
    state = Subject(graphdef, adapter, loss_of).start(jax.tree.map(jnp.copy, adapter), tx, jax.random.key(0))
    for batch in batches:
        state, metrics = step(state, base, batch)
    return state, metrics, step


def train_whole_tree(training):
    """Three steps on one tree of base and adapter, the base frozen in the optimiser."""
    graphdef, base, adapter, batches = training
    tree = {"base": base, "adapter": adapter}
    tx = optax.selective_transform(clipped_adamw(), freeze_mask=jax.tree.map(operator.not_, trainable_mask(tree)))

    def loss(tree, batch):
        model = vj.bind(graphdef, tree["base"], tree["adapter"])
        return loss_of(model, {key: value[0] for key, value in batch.items()}, True)["loss"] / batch["x"].shape[1]

    @jax.jit
    def step(tree, opt_state, batch):
        updates, opt_state = tx.update(jax.grad(loss)(tree, batch), opt_state, tree)
        return optax.apply_updates(tree, updates), opt_state

    opt_state = jax.jit(tx.init)(tree)
    for batch in batches:
        tree, opt_state = step(tree, opt_state, batch)
    return tree


def test_freezing_in_the_optimiser_equals_the_step_that_differentiates_only_what_trains(training, stepped):
    _, base, adapter, _ = training
    tree = train_whole_tree(training)
    jax.tree.map(np.testing.assert_array_equal, tree["base"], base)
    for path, value in flatten(stepped[0].trainable).items():
        close(flatten(tree["adapter"].trainable)[path], value, 1e-5)
        assert np.abs(value - flatten(adapter.trainable)[path]).max() > 1e-2, path


def test_the_step_is_compiled_once_and_its_clip_was_active(stepped):
    state, metrics, step = stepped
    assert step._cache_size() == 1
    assert int(state.step) == 3
    assert metrics["gradient_norm"] > 0.5
