"""Tensors lie where their axes say, and a mesh changes nothing but where."""

import functools
import itertools
import json
import math
from dataclasses import dataclass

import jax
import numpy as np
import pytest
import yaml
from commands import call
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlora_jax import LoRA, init, split
from vlora_jax.adapters.quantize import quantized_shapes
from vlora_jax.adapters.quantized import is_quantized
from vlora_jax.adapters.trees import flatten
from vlora_jax.data.pipeline import TrainBatches
from vlora_jax.distributed.mesh import abstract_mesh, check_batch, make_mesh, whole_batch
from vlora_jax.distributed.specs import adapter_specs, base_specs, bytes_per_device, undivided
from vlora_jax.errors import ConfigError
from vlora_jax.models.build import abstract_model
from vlora_jax.models.decoder import DecoderConfig
from vlora_jax.training.config import RunConfig, load_config
from vlora_jax.training.job import Job

TINY = [
    "model.layers=4", "model.width=16", "model.heads=2", "model.mlp_width=32", "model.vertical.size=2",
    "model.vertical.increment.rank=2", "data.batch=16", "steps=10", "optimizer.warmup=0",
    "optimizer.name=sgd", "optimizer.rate=0.03",  # Adam would blow up what is zero but for rounding
]  # fmt: skip

DECODER = [
    "model.family=decoder", "model.vocabulary=256", "data.name=pystdlib", "data.part=prose", "data.length=16",
]  # fmt: skip
WIDE = [*DECODER, "model.width=128", "model.mlp_width=256", "adapter.method=lora", "adapter.targets=all-linear"]
ADAPTER = ["adapter.method=lora", "adapter.rank=4", "adapter.full=head"]


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


def test_codes_lie_like_their_kernel_but_for_blocks_that_stay_together():
    """96 inputs are three blocks of 32, which two devices cannot share; 64 inputs are one."""
    mesh = abstract_mesh(1, 2, 2, devices=4)
    shapes = abstract_model(DecoderConfig(width=128, heads=2, mlp_width=96, layers=3, vocabulary=8))[1]
    place = lambda form, part: {
        path.removeprefix("layers/block/"): getattr(leaf, part)
        for path, leaf in flatten(base_specs(quantized_shapes(shapes, form), mesh)).items()
        if is_quantized(leaf)
    }
    codes, scale = (place("nf4", part) for part in ("codes", "scale"))
    assert codes["mlp/up/kernel"] == scale["mlp/up/kernel"] == P(None, "fsdp", "tensor")
    assert codes["mlp/down/kernel"] == scale["mlp/down/kernel"] == P(None, None, "fsdp")
    codes, scale = (place("int8", part) for part in ("codes", "scale"))
    assert (codes["mlp/down/kernel"], scale["mlp/down/kernel"]) == (P(None, "tensor", "fsdp"), P(None, None, "fsdp"))
    assert undivided(quantized_shapes(shapes, "nf4"), mesh) == [
        "layers/block/mlp/down/kernel (3): not divisible by mesh.tensor 2, replicated along it"
    ]


def test_bytes_of_one_device():
    mesh = make_mesh(1, 4, 2)
    tree = {"w": jax.ShapeDtypeStruct((8, 8), "float32"), "b": jax.ShapeDtypeStruct((8,), "bfloat16")}
    assert bytes_per_device(tree, {"w": P("fsdp", "tensor"), "b": P()}, mesh) == 8 * 8 * 4 // 8 + 16


def test_inspect_shows_where_each_tensor_of_a_run_lies(tmp_path, capsys):
    config = load_config(None, [*TINY, *ADAPTER, f"run_dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.plain()))
    code, out, _ = call(capsys, "inspect", tmp_path, "--specs", "--mesh", "1,2,4", "--json")
    found = json.loads(out)
    assert (code, found["mesh"]) == (0, {"data": 1, "fsdp": 2, "tensor": 4})
    assert found["replicated"] == ["head/kernel (10): not divisible by mesh.tensor 4, replicated along it"]
    rows = {(row["part"], row["path"]): row for row in found["tensors"]}
    up = rows["base", "layers/block/mlp/up/kernel"]
    assert (up["shape"], up["spec"], up["bytes"]) == ([2, 16, 32], [None, "fsdp", "tensor"], 2 * 16 * 32 * 4 // 8)
    assert rows["trainable", "full/head/kernel"]["spec"] == []
    job = Job.of(load_config(None, [*TINY, *ADAPTER, "mesh.data=1", "mesh.fsdp=2", "mesh.tensor=4"]))
    total = lambda part: sum(row["bytes"] for (of, _), row in rows.items() if of == part)
    assert {"base": total("base"), "trained": total("trainable"), "optimizer": total("optimizer")} == job.bytes()
    code, out, _ = call(capsys, "inspect", tmp_path, "--specs", "--mesh", "1,2,4", "--where", "head")
    assert ("fsdp, tensor" in out, "replicated" in out, "mlp" in out) == (False, True, False)
    for wrong in ("1,2", "1,0,2", "a,b,c"):
        code, _, error = call(capsys, "inspect", tmp_path, "--specs", "--mesh", wrong)
        assert (code, "must be three sizes of at least 1" in error, error.count("\n")) == (2, True, 1)


def test_a_mesh_must_multiply_to_the_devices():
    assert dict(make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(ConfigError, match="data 3 × fsdp 1 × tensor 1 does not multiply to the 8 devices"):
        make_mesh(3)
    for sizes in ((-1, 0, 1), (-1, -2, 1), (-2, -4, 1)):
        with pytest.raises(ConfigError, match="does not multiply to the 8 devices"):
            make_mesh(*sizes)
    with pytest.raises(ConfigError, match=r"data.batch 12 cannot be split over 8 devices"):
        check_batch(12, make_mesh())


@dataclass(frozen=True)
class Device:
    """As much of a device as a mesh looks at."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "a GPU"


@pytest.mark.parametrize(
    ("sizes", "slices", "apart"),
    [((4, 2, 1), 4, (4, 1)), ((2, 2, 2), 2, (2, 1)), ((1, 4, 2), 2, (1, 2)), ((2, 4, 1), 4, (2, 2))],
)
def test_slices_are_joined_by_the_batch_axes_data_first(sizes, slices, apart):
    devices = [Device(i, i * slices // 8) for i in range(8)]
    mesh = make_mesh(*sizes, devices=devices[::-1])
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    assert {device.id for device in mesh.devices.flat} == set(range(8))
    where = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    inner = (sizes[0] // apart[0], sizes[1] // apart[1])
    for data, fsdp in itertools.product(range(apart[0]), range(apart[1])):
        block = where[data * inner[0] : (data + 1) * inner[0], fsdp * inner[1] : (fsdp + 1) * inner[1]]
        assert (block == block.flat[0]).all(), "neighbours along fast axes share a slice"


def test_the_tensor_axis_stays_within_a_slice():
    with pytest.raises(ConfigError, match=r"cannot be laid over 4 slices.*data × fsdp must be a multiple of 4"):
        make_mesh(1, 2, 4, devices=[Device(i, i // 2) for i in range(8)])


def test_what_does_not_divide_is_said_once_an_axis():
    _, base = split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    assert undivided(base, make_mesh(8)) == []
    assert undivided(base, abstract_mesh(1, 1, 2, 2)) == [
        "odd/kernel (7): not divisible by mesh.tensor 2, replicated along it"
    ]
    lines = undivided(base, abstract_mesh(1, 16, 2, 32))
    assert lines[0] == (
        "down/kernel (8), embed/embedding (8), odd/kernel (8), up/kernel (8): not divisible by mesh.fsdp 16, "
        "replicated along it"
    )
    assert len(lines) == 2


def test_an_evaluation_batch_is_filled_up_to_the_devices_that_share_it():
    assert [whole_batch(size, make_mesh()) for size in (1, 8, 9, 120)] == [8, 8, 16, 120]
    assert whole_batch(7, make_mesh(1, 1, 8)) == 7, "the tensor axis shares no batch"


def tiny(overrides: list[str]) -> RunConfig:
    """A tiny run, vertical unless told otherwise."""
    dense = "model.vertical=null" in overrides
    return load_config(None, [each for each in TINY if not (dense and each.startswith("model.vertical."))] + overrides)


def ten_steps(overrides: list[str], devices: list[jax.Device]) -> tuple[list[float], dict[str, np.ndarray]]:
    job = Job.of(tiny(overrides), devices)
    with jax.set_mesh(job.mesh):
        base, state = job.start()
        step = job.step().lower(job.state, job.base, job.batch).compile()  # takes nothing that lies elsewhere
        batches, losses = TrainBatches(job.data, 16, 1, 0), []
        for _ in range(10):
            state, metrics = step(state, base, job.place(next(batches)))
            losses.append(float(metrics["loss"]))
        where = jax.tree.map(
            lambda leaf, like: leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim), state, job.state
        )
        assert all(jax.tree.leaves(where)), "the state must stay where it was put"
    return losses, jax.device_get(flatten(state.trainable))


@functools.cache
def on_one_device(*overrides: str):
    return ten_steps(list(overrides), jax.devices()[:1])


MESHES = [tuple(sizes) for sizes in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(sizes) == 8]


CASES = [  # an adapter on every shape; whole models on those that differ most
    *(pytest.param(ADAPTER, sizes, id=f"lora-{sizes}") for sizes in MESHES),
    *(pytest.param([], sizes, id=f"vlora-{sizes}") for sizes in ((2, 2, 2), (4, 2, 1), (1, 8, 1))),
    pytest.param(["model.vertical=null"], (2, 2, 2), id="dense-(2, 2, 2)"),
    *(pytest.param([*WIDE, "quantize=nf4"], sizes, id=f"nf4-{sizes}") for sizes in ((2, 2, 2), (1, 4, 2), (2, 1, 4))),
    *(pytest.param([*WIDE, "quantize=int8"], sizes, id=f"int8-{sizes}") for sizes in ((2, 2, 2), (1, 8, 1))),
    *(pytest.param(DECODER, sizes, id=f"decoder-{sizes}") for sizes in ((2, 2, 2), (2, 4, 1), (1, 8, 1))),
]


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "sizes"), CASES)
def test_eight_devices_equal_one(overrides, sizes):
    losses, leaves = on_one_device(*overrides)
    mesh = [f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), sizes, strict=True)]
    found_losses, found = ten_steps(overrides + mesh, jax.devices())
    np.testing.assert_allclose(found_losses, losses, atol=1e-5)
    for path, leaf in leaves.items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-5, err_msg=path)
