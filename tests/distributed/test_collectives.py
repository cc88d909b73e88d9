"""What devices tell each other in a train step: split kernels, the adapter's gradient, nothing of the base's."""

import math
import re

import jax
import pytest
from helpers import mostly_slow

from vlora_jax.adapters.adapter import count
from vlora_jax.adapters.trees import flatten
from vlora_jax.training.config import load_config
from vlora_jax.training.job import Job

LORA = [
    "model.family=decoder", "model.layers=3", "model.width=64", "model.heads=4", "model.mlp_width=256",
    "model.vocabulary=256", "data.name=pystdlib", "data.part=prose", "data.length=16", "data.batch=8",
    "adapter.method=lora", "adapter.rank=2", "adapter.targets=all-linear",
]  # fmt: skip
LARGEST_SCALARS = 64  # losses, weights, flags, norms
CALL = re.compile(r" = (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of what comes out of each kind of collective in a compiled program; a loop's body counts once."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for result, kind in CALL.findall(text):
        shapes = [tuple(int(dim) for dim in dims.split(",") if dim) for _, dims in SHAPE.findall(result)]
        found.setdefault(kind, []).extend(shapes)
    return found


def numbers(shapes: list[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def compiled(sizes: tuple[int, int, int], *more: str) -> tuple[Job, dict]:
    mesh = [f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), sizes, strict=True)]
    job = Job.of(load_config(None, [*LORA, *mesh, *more]), jax.devices()[: math.prod(sizes)])
    with jax.set_mesh(job.mesh):
        return job, collectives(job.step().lower(job.state, job.base, job.batch).compile().as_text())


@pytest.mark.parametrize("sizes", mostly_slow([(8, 1, 1), (1, 8, 1), (2, 4, 1)], [(1, 8, 1)]), ids=str)
def test_only_split_kernels_and_the_gradient_of_the_adapter_travel(sizes):
    job, found = compiled(sizes)
    kernels = {leaf.shape[-2:] for path, leaf in flatten(job.base).items() if path.endswith("kernel")}
    gathered = found.get("all-gather", [])
    tokens = 8 * 16
    assert all(shape in kernels or numbers([shape]) <= tokens for shape in gathered), (
        "only kernels, one layer at a time"
    )
    assert bool(gathered) == (sizes[1] > 1), "what is replicated needs no gathering"
    assert numbers(found["all-reduce"]) <= count(job.state.trainable) + LARGEST_SCALARS
    assert "reduce-scatter" not in found


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 1, 4)], ids=str)
def test_no_reduction_is_as_large_as_a_kernel(sizes):
    """With kernels split over `tensor`, activations are added up; a kernel is not, nor is an adapter gathered."""
    job, found = compiled(sizes)
    smallest = min(leaf.size // 3 for path, leaf in flatten(job.base).items() if path.endswith("kernel"))
    rows = 8 // sizes[0]
    of_activations = lambda shape: rows * 16 in shape or shape[:1] == (rows,)
    assert all(numbers([shape]) < smallest or of_activations(shape) for shape in found["all-reduce"])
    of_adapter = {leaf.shape[-2:] for leaf in jax.tree.leaves(job.state.trainable)}
    assert not of_adapter & {shape[-2:] for shape in found.get("all-gather", [])}, "adapters are not gathered"


@pytest.mark.parametrize("form", mostly_slow(("nf4", "int8"), ["nf4"]))
def test_of_a_quantised_base_codes_travel_once_in_either_direction(form):
    """Not what they stand for; and no device keeps those of all layers."""
    job, found = compiled((1, 2, 1), f"quantize={form}", "model.width=128", "model.mlp_width=128")
    held = [leaf for path, leaf in flatten(job.base).items() if path.startswith("layers/") and path.endswith("kernel")]
    assert len(held) == 7
    codes = sorted(math.prod(leaf.codes.shape[1:]) for leaf in held)
    gathered = sorted(numbers([shape]) for shape in found["all-gather"] if numbers([shape]) >= codes[0])
    of_embedding = math.prod(flatten(job.base)["embed/embedding"].shape)
    assert gathered in ([*codes, *codes], sorted([*codes, *codes, of_embedding]))
