"""Long rows are split over `tensor` between the branches of blocks: less memory, the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_specs import ADAPTER, DECODER, on_one_device, ten_steps, tiny

from vlora_jax.adapters.trees import flatten
from vlora_jax.data.pipeline import TrainBatches
from vlora_jax.distributed.activations import after_layers
from vlora_jax.distributed.mesh import BATCH_AXES, abstract_mesh, check_sequence, make_mesh
from vlora_jax.errors import ConfigError
from vlora_jax.planning.search import changed, changes
from vlora_jax.training.config import load_config
from vlora_jax.training.job import Job

LONG = [
    "model.family=decoder", "model.layers=16", "model.width=64", "model.heads=8", "model.mlp_width=128",
    "model.remat=full", "data.name=pystdlib", "data.part=prose", "data.length=512", "data.batch=1",
    "adapter.method=lora", "adapter.rank=2", "mesh.tensor=8",
]  # fmt: skip
DENSE = [*DECODER, "model.vertical=null"]
CASES = [
    pytest.param(what, sizes, id=f"{name}-{sizes}")
    for name, what, meshes in (
        ("lora", [*DENSE, *ADAPTER[:2]], ((1, 1, 8), (2, 1, 4), (4, 1, 2), (1, 2, 4), (1, 4, 2))),
        ("lora, remat", [*DENSE, *ADAPTER[:2], "model.remat=full"], ((1, 1, 8), (1, 4, 2))),
        ("whole", DENSE, ((1, 1, 8), (2, 1, 4), (1, 2, 4), (1, 4, 2))),
        ("whole vlora", DECODER, ((2, 1, 4), (1, 2, 4))),
        ("norms after", [*DENSE, "model.norm_place=post", "model.norm=layer"], ((1, 2, 4),)),
    )
    for sizes in meshes
]


def on(sizes: tuple[int, int, int]) -> list[str]:
    return [f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), sizes, strict=True)]


def one_step(*overrides: str) -> tuple[int, dict]:
    """Temporary bytes of the compiled step, and what it makes of the start."""
    job = Job.of(load_config(None, [*LONG, *overrides]))
    with jax.set_mesh(job.mesh):
        compiled = job.step().lower(job.state, job.base, job.batch).compile()
        base, state = job.start()
        batch = next(TrainBatches(job.data, 1, 1, 0))
        state, metrics = compiled(state, base, job.place(batch))
        numbers = flatten(state.trainable) | {"loss": metrics["loss"], "norm": metrics["gradient_norm"]}
        return compiled.memory_analysis().temp_size_in_bytes, jax.device_get(numbers)


def test_what_leaves_the_layers_is_split_by_row_where_it_has_rows_that_the_compiler_lays_out():
    h = {"x": jnp.ones((8, 3, 16)), "odd": jnp.ones((7, 16)), "sum": jnp.ones(())}
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        found = jax.jit(after_layers)(h)
        shards = jax.shard_map(after_layers, in_specs=P(), out_specs=P(), check_vma=False)(h)
    with jax.set_mesh(jax.make_mesh((4, 2), ("fsdp", "own"), axis_types=(jax.sharding.AxisType.Auto,) * 2)):
        assert jax.jit(after_layers)(h)["x"].sharding.spec == P("fsdp"), "a mesh need not have every axis"
    assert found["x"].sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, P(BATCH_AXES)), 3)
    assert all(leaf.sharding.is_fully_replicated for leaf in (found["odd"], found["sum"], shards["x"]))


def test_a_long_row_takes_less_memory():
    """What every layer keeps is an eighth; the rest, of one layer and the loss, is as before. So are the numbers."""
    (plain, numbers), (split, others) = one_step(), one_step("mesh.sequence=true")
    assert plain - split > 0.9 * 16 * 512 * 64 * 4 * 7 / 8
    for name, value in numbers.items():
        np.testing.assert_allclose(others[name], value, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "sizes"), CASES)
def test_lengths_that_are_split_change_no_number(overrides, sizes):
    """Losses and tensors of ten steps, of one device and of eight."""
    losses, leaves = on_one_device(*overrides)
    found_losses, found = ten_steps([*overrides, *on(sizes), "mesh.sequence=true"], jax.devices())
    np.testing.assert_allclose(found_losses, losses, atol=1e-5)
    for path, leaf in leaves.items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    ("length", "sizes", "message"),
    [
        (None, (1, 1, 8), "mesh.sequence splits the rows of a decoder; this model is none"),
        (64, (8, 1, 1), "mesh.sequence splits rows over mesh.tensor, which is 1"),
        (64, (2, 2, 2), "mesh.sequence with data 2 × fsdp 2 × tensor 2: one of data and fsdp must be 1"),
        (60, (1, 1, 8), "mesh.sequence: rows of 60 tokens cannot be split over mesh.tensor 8"),
    ],
)
def test_what_cannot_be_split_is_refused(length, sizes, message):
    with pytest.raises(ConfigError, match=message):
        check_sequence(length, abstract_mesh(*sizes, devices=8))


def test_a_run_that_cannot_be_split_is_refused():
    with pytest.raises(ConfigError, match="this model is none"):
        Job.of(tiny(["mesh.tensor=8", "mesh.sequence=true"]))


def test_a_plan_tries_it():
    config = load_config(None, LONG)
    assert ("mesh.sequence=true",) in list(changes(config, 8))
    assert changed(config, ("mesh.sequence=true",)).mesh.sequence
    assert ("mesh.sequence=true",) not in list(changes(load_config(None, [*LONG, "mesh.sequence=true"]), 8))
    assert ("mesh.sequence=true",) not in list(changes(load_config(None, [*LONG, "mesh.fsdp=2", "mesh.data=2"]), 32))
