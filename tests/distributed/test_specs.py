"""Tensors lie where their axes say, and a mesh changes nothing but where."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlora_jax import LoRA, init, split
from vlora_jax.adapters.trees import flatten
from vlora_jax.data.pipeline import TrainBatches
from vlora_jax.distributed.mesh import check_batch, make_mesh, whole_batch
from vlora_jax.distributed.specs import adapter_specs, base_specs, bytes_per_device
from vlora_jax.errors import ConfigError
from vlora_jax.training.config import load_config
from vlora_jax.training.job import Job

TINY = [
    "model.layers=4", "model.width=16", "model.heads=2", "model.mlp_width=32", "model.vertical.size=2",
    "model.vertical.increment.rank=2", "data.batch=16", "steps=3", "optimizer.warmup=0",
    "optimizer.name=sgd", "optimizer.rate=0.1",  # Adam would blow up what is zero but for rounding
]  # fmt: skip


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(32, 8, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)
        self.odd = nnx.Linear(8, 7, rngs=rngs)


def test_kernels_split_inputs_over_fsdp_and_outputs_over_tensor():
    mesh = make_mesh(2, 2, 2)
    _, base = split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    specs = flatten(base_specs(base, mesh))
    assert specs["up/kernel"] == P("fsdp", "tensor")
    assert specs["down/kernel"] == P("tensor", "fsdp"), "a layer that closes a branch is turned round"
    assert specs["embed/embedding"] == P("tensor", "fsdp")
    assert specs["odd/kernel"] == P("fsdp", None), "7 outputs cannot be split in two"
    assert specs["up/bias"] == P()


def test_adapters_follow_their_kernel_over_tensor_only():
    mesh = make_mesh(2, 2, 2)
    _, base = split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    adapter = jax.eval_shape(lambda key: init(LoRA(rank=4, targets="up|down"), key, base), jax.random.key(0))
    sites = adapter_specs(adapter, mesh).trainable["sites"]
    assert (sites["up"]["a"], sites["up"]["b"]) == (P(None, None), P(None, "tensor"))
    assert (sites["down"]["a"], sites["down"]["b"]) == (P("tensor", None), P(None, None))


def test_bytes_of_one_device():
    mesh = make_mesh(1, 4, 2)
    tree = {"w": jax.ShapeDtypeStruct((8, 8), "float32"), "b": jax.ShapeDtypeStruct((8,), "bfloat16")}
    assert bytes_per_device(tree, {"w": P("fsdp", "tensor"), "b": P()}, mesh) == 8 * 8 * 4 // 8 + 16


def test_a_mesh_must_multiply_to_the_devices():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(ConfigError, match="data 3 × fsdp 1 × tensor 1 does not multiply to the 8 devices"):
        make_mesh(3)
    with pytest.raises(ConfigError, match=r"data.batch 12 cannot be split over 8 devices"):
        check_batch(12, make_mesh())


def test_an_evaluation_batch_is_filled_up_to_the_devices_that_share_it():
    assert [whole_batch(size, make_mesh()) for size in (1, 8, 9, 120)] == [8, 8, 16, 120]
    assert whole_batch(7, make_mesh(1, 1, 8)) == 7, "the tensor axis shares no batch"


def three_steps(overrides: list[str], devices: list[jax.Device]) -> tuple[list[float], dict[str, np.ndarray]]:
    job = Job.of(load_config(None, TINY + overrides), devices)
    with jax.set_mesh(job.mesh):
        base, state = job.start()
        step = job.step().lower(job.state, job.base, job.batch).compile()  # takes nothing that lies elsewhere
        batches, losses = TrainBatches(job.data, 16, 1, 0), []
        for _ in range(3):
            state, metrics = step(state, base, job.place(next(batches)))
            losses.append(float(metrics["loss"]))
        where = jax.tree.map(
            lambda leaf, like: leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim), state, job.state
        )
        assert all(jax.tree.leaves(where)), "the state must stay where it was put"
    return losses, jax.device_get(flatten(state.trainable))


ADAPTER = ["adapter.method=lora", "adapter.rank=4", "adapter.full=head"]


@functools.cache
def on_one_device(*overrides: str):
    return three_steps(list(overrides), jax.devices()[:1])


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [([], (8, 1, 1)), ([], (2, 2, 2)), (["adapter.method=lora", "adapter.rank=4", "adapter.full=head"], (2, 2, 2))],
    ids=["vlora-8-1-1", "vlora-2-2-2", "lora-2-2-2"],
)
def test_eight_devices_equal_one(overrides, sizes):
    losses, leaves = on_one_device(*overrides)
    mesh = [f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), sizes, strict=True)]
    found_losses, found = three_steps(overrides + mesh, jax.devices())
    np.testing.assert_allclose(found_losses, losses, atol=1e-5)
    for path, leaf in leaves.items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-5, err_msg=path)
