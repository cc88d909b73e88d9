"""Rows of adapters, vertical models and checkpoints, against the dense matrices they stand for."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlora_jax import Adapter, LoRA, count, init, split
from vlora_jax.adapters.trees import flatten, replace_leaves
from vlora_jax.errors import BaseMismatchError, ConversionError
from vlora_jax.inspection.spectra import effective_rank
from vlora_jax.inspection.tables import adapter_rows, increment_rows, parameter_rows
from vlora_jax.models.stack import Stack
from vlora_jax.vertical.config import Vertical
from vlora_jax.vertical.expand import expand

UP = "layers/block/up"
RNG = np.random.default_rng(0)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)


class Model(nnx.Module):
    """As much of a model as tables look at: a stack of four layers, an unstacked kernel and a norm."""

    def __init__(self, vertical: Vertical | None, rngs: nnx.Rngs):
        self.layers = Stack(Block, 4, vertical=vertical, rngs=rngs)
        self.head = nnx.Linear(8, 10, rngs=rngs)
        self.norm = nnx.RMSNorm(8, rngs=rngs)


def model(vertical: Vertical | None = None) -> tuple[nnx.GraphDef, nnx.State]:
    graphdef, _ = split(nnx.eval_shape(lambda: Model(vertical, nnx.Rngs(0))))
    return graphdef, jax.jit(lambda: split(Model(vertical, nnx.Rngs(0)))[1])()


def dense_twin(graphdef: nnx.GraphDef, params: nnx.State) -> nnx.State:
    return jax.jit(lambda params: expand(graphdef, params)[1])(params)


@pytest.fixture(scope="module")
def base() -> nnx.State:
    return model()[1]


@pytest.fixture(scope="module")
def adapter(base) -> Adapter:
    method = LoRA(
        rank=2, alpha=6.0, start="xavier_both", targets=["up", "head"], full=["layers/block/norm", "head/bias"]
    )
    return init(method, jax.random.key(1), base)


def change_of(adapter: Adapter, path: str) -> np.ndarray:
    factors = jax.tree.map(np.asarray, adapter.factors(path))
    return 3.0 * factors["a"] @ factors["b"]


def kernel_of(params, path: str) -> np.ndarray:
    return np.asarray(flatten(params)[f"{path}/kernel"])


def rank_of(change: np.ndarray) -> float:
    return float(effective_rank(np.linalg.svd(change, compute_uv=False)))


def test_a_site_is_one_row_over_its_layers(base, adapter):
    (row,) = [row for row in adapter_rows(base, adapter) if row.path == UP]
    changes = change_of(adapter, UP)
    ranks = [rank_of(change) for change in changes]
    assert (row.layer, row.method, row.numbers) == (None, "lora", 4 * 2 * (8 + 12))
    assert row.shapes == {"a": (4, 8, 2), "b": (4, 2, 12)}
    assert row.norm == pytest.approx(np.linalg.norm(changes), rel=1e-5)
    assert row.relative == pytest.approx(np.linalg.norm(changes) / np.linalg.norm(kernel_of(base, UP)), rel=1e-5)
    assert dataclasses.astuple(row.rank) == pytest.approx((np.mean(ranks), min(ranks), max(ranks)), rel=1e-4)


def test_or_one_row_a_layer(base, adapter):
    rows = [row for row in adapter_rows(base, adapter, per_layer=True) if row.path == UP]
    assert [row.layer for row in rows] == [0, 1, 2, 3]
    for row, change, kernel in zip(rows, change_of(adapter, UP), kernel_of(base, UP), strict=True):
        assert row.numbers == 2 * (8 + 12)
        assert row.shapes == {"a": (8, 2), "b": (2, 12)}
        assert row.norm == pytest.approx(np.linalg.norm(change), rel=1e-5)
        assert row.relative == pytest.approx(np.linalg.norm(change) / np.linalg.norm(kernel), rel=1e-5)
        assert dataclasses.astuple(row.rank) == pytest.approx((rank_of(change),) * 3, rel=1e-4)


def test_a_kernel_that_is_not_stacked_stays_one_row(base, adapter):
    (row,) = [row for row in adapter_rows(base, adapter, per_layer=True) if row.path == "head"]
    assert row.layer is None
    assert row.norm == pytest.approx(np.linalg.norm(change_of(adapter, "head")), rel=1e-5)


@pytest.mark.parametrize("per_layer", [False, True])
def test_numbers_add_up_to_the_adapter(base, adapter, per_layer):
    assert sum(row.numbers for row in adapter_rows(base, adapter, per_layer)) == count(adapter)


def test_without_a_base_only_what_needs_it_is_unknown(base, adapter):
    for known, row in zip(adapter_rows(base, adapter), adapter_rows(None, adapter), strict=True):
        expected = dataclasses.replace(known, relative=None, norm=None if known.method == "full" else known.norm)
        assert row == expected


def test_what_is_trained_whole_is_measured_against_the_base(base, adapter):
    full, scale = adapter.trainable["full"], "layers/block/norm/scale"
    trained = adapter.with_trainable(adapter.trainable | {"full": full | {scale: full[scale] + 0.5}})
    rows = {row.path: row for row in adapter_rows(base, trained) if row.method == "full"}
    assert set(rows) == {scale, "head/bias"}
    assert (rows[scale].norm, rows[scale].relative) == pytest.approx((0.5 * math.sqrt(4 * 8), 0.5))
    assert (rows["head/bias"].shapes, rows["head/bias"].relative) == ({"bias": (10,)}, 0.0)


def test_a_change_of_a_zero_kernel_is_infinitely_large(base, adapter):
    zeros = replace_leaves(base, {f"{UP}/kernel": jnp.zeros((4, 8, 12))})
    (row,) = [row for row in adapter_rows(zeros, adapter) if row.path == UP]
    assert row.relative == math.inf


def test_a_base_without_a_whole_parameter_is_refused(base, adapter):
    other = adapter.with_trainable(adapter.trainable | {"full": {"token": jnp.ones(8)}})
    with pytest.raises(BaseMismatchError, match="trains token whole, which this base does not have"):
        adapter_rows(base, other)


def test_shared_tensors_have_rows_of_their_own():
    shared, frozen = {"a": jnp.ones((3, 4))}, {"b": jnp.ones((3, 5))}
    adapter = Adapter.of(LoRA(), [], trainable={}, shared=shared, frozen_shared=frozen)
    rows = [(row.path, row.method, row.shapes, row.numbers) for row in adapter_rows(None, adapter)]
    assert rows == [("a", "shared", {"a": (3, 4)}, 12), ("b", "shared", {"b": (3, 5)}, 0)]


def test_parameters_of_a_checkpoint(base):
    tree = {"model": base, "step": jnp.int32(3), "key": jax.random.key(0)}
    rows = {row.path: row for row in parameter_rows(tree)}
    row = rows[f"model/{UP}/kernel"]
    assert (row.shape, row.dtype, row.numbers) == ((4, 8, 12), "float32", 4 * 8 * 12)
    assert row.rms == pytest.approx(np.sqrt(np.mean(kernel_of(base, UP) ** 2)), rel=1e-5)
    assert (rows["step"].rms, rows["key"].rms) == (None, None)
    assert sum(row.numbers for path, row in rows.items() if path.startswith("model/")) == count(base)


INCREMENT = LoRA(rank=2, alpha=1.0, start="xavier_both")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Separate(LoRA):
    """LoRA that does not say how its changes add up, so that a chain has to write its kernels out."""

    adds_up = False


# name: the stack, which layers have an increment, and each layer's base kernel
STACKS = {
    "star": ({"size": 2}, [1, 3], [0, 0, 1, 1]),
    "cycle": ({"size": 2, "pattern": "cycle", "adapter_on_base": True}, [0, 1, 2, 3], [0, 1, 0, 1]),
    "chain": ({"size": 4, "structure": "chain"}, [1, 2, 3], [0, 0, 0, 0]),
    "chain of what does not add up": (
        {"size": 4, "structure": "chain", "increment": Separate(rank=2, start="xavier_both")},
        [1, 2, 3],
        [0, 0, 0, 0],
    ),
    "chain with diagonals": ({"size": 4, "structure": "chain", "diagonal": True}, [1, 2, 3], [0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", STACKS)
def test_increments_are_what_separates_the_dense_twins_layers_from_their_base(name):
    options, layers, base_of = STACKS[name]
    graphdef, params = model(Vertical(**{"targets": "up", "increment": INCREMENT} | options))
    diagonals = {path: RNG.normal(size=leaf.shape) for path, leaf in flatten(params).items() if path.endswith("/d")}
    assert bool(diagonals) == options.get("diagonal", False)
    params = replace_leaves(params, jax.tree.map(jnp.float32, diagonals))
    kernels, bases = kernel_of(dense_twin(graphdef, params), UP), kernel_of(params, UP)
    rows = increment_rows(graphdef, params, per_layer=True)
    assert [(row.path, row.layer) for row in rows] == [(UP, layer) for layer in layers]
    for row in rows:
        change, kernel = kernels[row.layer] - bases[base_of[row.layer]], bases[base_of[row.layer]]
        assert row.norm == pytest.approx(np.linalg.norm(change), rel=1e-5)
        assert row.relative == pytest.approx(np.linalg.norm(change) / np.linalg.norm(kernel), rel=1e-5)
        assert row.rank.mean == pytest.approx(rank_of(change), rel=1e-4)
    (whole,) = increment_rows(graphdef, params)
    increments = sum(leaf.size for path, leaf in flatten(params).items() if path.startswith("layers/increments"))
    assert whole.numbers == sum(row.numbers for row in rows) == increments
    assert whole.norm == pytest.approx(np.linalg.norm([row.norm for row in rows]), rel=1e-6)


@pytest.mark.parametrize("vertical", [None, Vertical(size=2, enabled=False), Vertical(size=1)])
def test_a_model_without_increments_has_no_rows(vertical):
    assert increment_rows(*model(vertical)) == []


def test_an_adapter_on_shared_kernels_needs_the_dense_twin():
    graphdef, params = model(Vertical(size=2, increment=INCREMENT))
    adapter = init(LoRA(rank=2, targets="up"), jax.random.key(0), params)
    with pytest.raises(ConversionError, match="expand it to dense"):
        adapter_rows(params, adapter)
    assert [row.relative for row in adapter_rows(dense_twin(graphdef, params), adapter)] == [0.0]
