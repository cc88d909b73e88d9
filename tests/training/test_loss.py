"""Losses against their formulas in NumPy, and what they keep in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from programs import equations

import vlora_jax as vj
from vlora_jax.distributed.mesh import make_mesh
from vlora_jax.inspection.hlo import collectives
from vlora_jax.models.decoder import Decoder, DecoderConfig
from vlora_jax.training.loss import CHUNK, chunked_cross_entropy, classification, next_token

BATCH, LENGTH, WIDTH, VOCABULARY = 2, 7, 4, 11
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)
HIDDEN = RNG.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
TARGETS = RNG.integers(0, VOCABULARY, (BATCH, LENGTH)).astype(np.int32)
WEIGHT = np.float32([[1, 0, 2, 1, 0.5, 0, 1], [0, 0, 0, 3, 1, 1, 0]])


def reference(logits, targets, weight):
    """Sums over all entries, and the loss's gradient by the logits: weight · (softmax - one-hot)."""
    logits = np.float64(logits)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    chances = exponentials / exponentials.sum(-1, keepdims=True)
    hit = np.eye(logits.shape[-1])[targets]
    loss = -(weight * np.log((chances * hit).sum(-1))).sum()
    correct = (weight * (logits.argmax(-1) == targets)).sum()
    return {"loss": loss, "correct": correct, "weight": np.sum(weight)}, weight[..., None] * (chances - hit)


def assert_sums(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("weight", [None, np.float32([1, 0, 2.5, 0.5, 0, 1])])
def test_classification(weight):
    logits = 3 * np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
    labels = np.int32([0, 1, 2, 3, 4, logits[5].argmax()])
    batch = {"image": jnp.asarray(logits), "label": jnp.asarray(labels)}
    batch |= {} if weight is None else {"weight": jnp.asarray(weight)}
    calls = []
    model = lambda image, train: calls.append(train) or image
    found = classification(model, batch, True)
    expected, _ = reference(logits, labels, np.ones(6) if weight is None else weight)
    assert_sums(found, expected)
    assert calls == [True]


class Table:
    """A language model whose hidden states are looked up, and depend on positions and segments."""

    def hidden(self, tokens, positions, segments, *, train):
        assert train
        return jnp.asarray(HIDDEN)[0, tokens % LENGTH] + (positions + 10 * segments)[..., None]

    def logits(self, hidden):
        return hidden @ KERNEL


def test_next_token():
    """Tokens count by their mask times the weight of their row; positions and segments reach the model."""
    tokens = np.random.default_rng(1).integers(0, 50, (BATCH, LENGTH)).astype(np.int32)
    positions, segments = np.arange(14).reshape(2, 7) % 5 / 10, np.arange(14).reshape(2, 7) // 5 / 100
    rows = np.float32([2, 0.5])
    batch = {"tokens": tokens, "targets": TARGETS, "mask": WEIGHT > 0, "weight": rows}
    batch |= {"positions": np.float32(positions), "segments": np.float32(segments)}
    found = jax.jit(lambda batch: next_token(Table(), batch, True))(batch)
    hidden = HIDDEN[0, tokens % LENGTH] + (positions + 10 * segments)[..., None]
    expected, _ = reference(hidden @ KERNEL, TARGETS, (WEIGHT > 0) * rows[:, None])
    assert_sums(found, expected)


def summed(hidden, kernel, targets, weight, chunk=CHUNK):
    sums = chunked_cross_entropy(lambda h: h @ kernel, hidden, targets, weight, chunk)
    return sums["loss"], sums


def test_chunks_of_any_size_give_the_whole():
    """Of one position, of three of the seven, of all; values and both gradients."""
    gradient = jax.grad(summed, argnums=(0, 1), has_aux=True)
    chunks = (1, 6, 1000)
    every = jax.jit(lambda *arrays: [gradient(*arrays, chunk) for chunk in chunks])
    expected, slope = reference(HIDDEN @ KERNEL, TARGETS, WEIGHT)
    for (by_hidden, by_kernel), sums in every(HIDDEN, KERNEL, TARGETS, WEIGHT):
        assert_sums(sums, expected)
        np.testing.assert_allclose(by_hidden, slope @ KERNEL.T, atol=1e-5)
        np.testing.assert_allclose(by_kernel, np.einsum("bsd,bsv->dv", HIDDEN, slope), atol=1e-5)
        assert not by_hidden[WEIGHT == 0].any()


def test_tokens_of_weight_zero_count_nothing():
    off = WEIGHT == 0
    hidden, targets = HIDDEN.copy(), TARGETS.copy()
    hidden[off], targets[off] = 1e4, 3
    loss = jax.jit(lambda *arrays: summed(*arrays)[1])
    np.testing.assert_equal(loss(hidden, KERNEL, targets, WEIGHT), loss(HIDDEN, KERNEL, TARGETS, WEIGHT))
    assert_sums(loss(HIDDEN, KERNEL, TARGETS, 0 * WEIGHT), {"loss": 0, "correct": 0, "weight": 0})


def test_the_logits_of_all_tokens_never_exist_at_once():
    """Rows of logits in any array of a decoder's gradient: those of one chunk; without chunks those of all tokens."""
    rows, length, vocabulary = 4, 1024, 257
    make = lambda: Decoder(DecoderConfig(width=16, heads=2, mlp_width=24, layers=2, vocabulary=vocabulary), nnx.Rngs(0))
    graphdef, params = vj.split(nnx.eval_shape(make))
    shape = lambda kind: jax.ShapeDtypeStruct((rows, length), kind)
    batch = {"tokens": shape("int32"), "targets": shape("int32"), "mask": shape("bool")}

    def whole(model, batch, train):
        hidden = model.hidden(batch["tokens"], train=train)
        return chunked_cross_entropy(model.logits, hidden, batch["targets"], batch["mask"], rows * length)

    def most_rows(loss):
        value = lambda params, batch: loss(nnx.merge(graphdef, params), batch, True)["loss"]
        program = jax.make_jaxpr(jax.grad(value))(params, batch)
        arrays = [variable.aval for equation in equations(program) for variable in equation.outvars]
        return max(array.size // vocabulary for array in arrays if vocabulary in array.shape)

    assert most_rows(next_token) == CHUNK < rows * length
    assert most_rows(whole) == rows * length


def test_over_devices_a_chunk_gathers_the_head_and_never_logits():
    """Chunks are so many tokens of each device, so that a head that is split is gathered a few times only."""
    mesh, (batch, length, width, vocabulary) = make_mesh(1, 8, 1), (8, 64, 16, 96)
    place = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
    hidden = place((batch, length, width), jnp.float32, "fsdp")
    kernel = place((width, vocabulary), jnp.float32, "fsdp")
    targets = place((batch, length), jnp.int32, "fsdp")

    def loss(hidden, kernel, targets):
        return chunked_cross_entropy(lambda h: h @ kernel, hidden, targets, jnp.ones(targets.shape), chunk=16)["loss"]

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(hidden, kernel, targets).compile().as_text()
    gathers = collectives(text)["all-gather"]
    chunks, head = 4, 4 * width * vocabulary  # 16 tokens of each device at a time
    assert gathers["count"] <= 2 * chunks
    assert gathers["bytes"] <= 2 * chunks * head


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2)])
def test_a_mesh_changes_neither_sums_nor_gradients(sizes):
    """With three split axes and no constraint, XLA's partitioner gives half of the states another gradient."""
    rng = np.random.default_rng(1)
    batch, length, width, vocabulary = 8, 12, 16, 24
    hidden = rng.normal(size=(batch, length, width)).astype(np.float32)
    kernel = rng.normal(size=(width, vocabulary)).astype(np.float32)
    mix = rng.normal(size=(width, width)).astype(np.float32)
    targets = rng.integers(0, vocabulary, (batch, length)).astype(np.int32)

    def loss(hidden, mix, kernel, targets, chunk):
        h = jnp.tanh((hidden.reshape(-1, width) @ mix).reshape(hidden.shape))
        sums = chunked_cross_entropy(lambda h: h @ kernel, h, targets, jnp.ones(targets.shape), chunk)
        return sums["loss"]

    slope = jax.value_and_grad(loss, argnums=(0, 1, 2))
    expected = slope(*map(jnp.asarray, (hidden, mix, kernel, targets)), 1000)
    mesh = make_mesh(*sizes)
    specs = (P(("data", "fsdp")), P("fsdp", "tensor"), P("fsdp", "tensor"), P(("data", "fsdp")))
    placed = [
        jax.device_put(each, NamedSharding(mesh, spec))
        for each, spec in zip((hidden, mix, kernel, targets), specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        found = jax.jit(slope, static_argnums=4)(*placed, 4)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
