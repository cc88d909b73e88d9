"""Plans: collectives and loops read from programs, figures of chips, bounds, the search, and mistakes."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from commands import call
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vlora_jax.adapters.adapter import count
from vlora_jax.distributed.chips import CHIPS, topologies, topology
from vlora_jax.distributed.mesh import make_mesh
from vlora_jax.distributed.within import batch_ways, split_batch, target
from vlora_jax.errors import ConfigError, ModelFileError, ResourceError
from vlora_jax.hub.architecture import architecture, find_config
from vlora_jax.inspection.flops import matmul_flops
from vlora_jax.inspection.hlo import Program, collectives, dot_flops
from vlora_jax.models.build import abstract_model
from vlora_jax.planning import compiler
from vlora_jax.planning.job import planned
from vlora_jax.planning.plan import bounds, check, made, tokens_of
from vlora_jax.planning.search import changed, changes, search
from vlora_jax.planning.worker import exhausted
from vlora_jax.training.config import load_config
from vlora_jax.training.job import Job

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "configs" / "models"

TPU = """
HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %p = (s32[]{:T(128)}, bf16[16,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %shard = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} fusion(%p), kind=kLoop, calls=%slice
  %gather = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%shard), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  %start = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%shard), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %done = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%start)
  %one = f32[6]{0:T(128)} fusion(%shard), kind=kOutput, calls=%chain_start
  %two = f32[6]{0:T(128)} fusion(%shard), kind=kOutput, calls=%chain_end
  ROOT %out = (s32[]{:T(128)}, bf16[16,8]{1,0}) tuple(%p, %gather)
}

%chain_start (q: bf16[4,8]) -> f32[6] {
  %q = bf16[4,8]{1,0} parameter(0)
  ROOT %piece = bf16[8,8]{1,0} all-gather(%q), channel_id=9, replica_groups=[4,2]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
}

%chain_end (r: bf16[4,8]) -> f32[6] {
  %r = bf16[4,8]{1,0} parameter(0)
  ROOT %piece.2 = bf16[8,8]{1,0} all-gather(%r), channel_id=9, replica_groups=[4,2]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
}

%slice (s: bf16[16,8]) -> bf16[4,8] {
  ROOT %s = bf16[4,8]{1,0} parameter(0)
}

%condition (c: (s32[], bf16[16,8])) -> pred[] {
  %c = (s32[]{:T(128)}, bf16[16,8]{1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} constant(80)
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

ENTRY %main (x: bf16[16,8]) -> bf16[16,8] {
  %x = (s32[]{:T(128)}, bf16[16,8]{1,0}) parameter(0)
  %loop = (s32[]{:T(128)}, bf16[16,8]{1,0}) while(%x), condition=%condition, body=%body, metadata={op_name="scan"}
  ROOT %sum = f32[10]{0:T(128)} all-reduce(%x), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%slice
}
"""  # noqa: E501  as the compiler writes it


def test_collectives_of_a_tpu_program_count_as_often_as_their_loop_runs():
    """80 turns, told by the condition alone; a chain of fusions is one gather; groups in three notations."""
    assert collectives(TPU) == {
        "all-gather": {"count": 160, "bytes": 80 * (256 + 128), "wire": 80 * (256 * 3 // 4 + 64)},
        "all-reduce": {"count": 1, "bytes": 40, "wire": 60},
        "collective-permute": {"count": 80, "bytes": 80 * 64, "wire": 80 * 64},
    }


def test_groups_of_devices_in_every_notation():
    told = "replica_groups=[4,2]<=[8]"
    for other in (
        "{{0,1},{2,3},{4,5},{6,7}}",
        "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}",
        "mesh['a'=8] {'a':(4)2}",
    ):
        assert collectives(TPU.replace(told, f"replica_groups={other}")) == collectives(TPU)
    of_two = TPU.replace(told, "replica_groups={}").replace("is_scheduled=true", "num_partitions=2").lstrip()
    assert collectives(of_two) == collectives(TPU)
    with pytest.raises(ResourceError, match="all-gather piece: its groups of devices are not to be read"):
        collectives(TPU.replace(told, "replica_groups=else"))


def test_a_loop_without_a_limit_is_not_guessed():
    with pytest.raises(ResourceError, match="loop loop in main: its trip count is not to be read"):
        collectives(TPU.replace("constant(80)", "parameter(1)"))


LAYERS, ROWS, WIDTH = 5, 16, 24


def sharded_layers():
    """Kernels over eight devices by their inputs, the batch by its rows: each layer is gathered as it is used."""
    mesh = make_mesh(1, 8, 1)
    place = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
    kernels, x = place((LAYERS, WIDTH, WIDTH), None, "fsdp"), place((ROWS, WIDTH), "fsdp")

    def loss(kernels, x):
        return jax.lax.scan(lambda h, kernel: (split_batch(jnp.tanh(h @ kernel)), None), x, kernels)[0].sum()

    return mesh, loss, kernels, x


def test_collectives_of_a_compiled_program():
    mesh, loss, kernels, x = sharded_layers()
    with jax.set_mesh(mesh):
        text = jax.jit(loss).lower(kernels, x).compile().as_text()
    found, whole = collectives(text), 4 * WIDTH * WIDTH
    assert found["all-gather"] == {"count": LAYERS, "bytes": LAYERS * whole, "wire": LAYERS * whole * 7 // 8}
    assert found["all-reduce"]["count"] == 1


def test_trip_counts_from_conditions_are_those_that_the_compiler_knew():
    mesh, loss, kernels, x = sharded_layers()
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(kernels, x).compile().as_text()
    assert "known_trip_count" in text
    assert Program.of(text.replace("known_trip_count", "forgotten")).times() == Program.of(text).times()


def test_flops_of_the_traced_program_are_those_of_the_compiled_one():
    """Scan, remat, gradient; and shards of a manual region count for all devices."""
    _, _, kernels, x = sharded_layers()
    plain = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (kernels, x)]
    layer = jax.checkpoint(lambda h, kernel: (jnp.tanh(h @ kernel), None), prevent_cse=False)
    slope = jax.value_and_grad(lambda kernels, x: jax.lax.scan(layer, x, kernels)[0].sum(), argnums=(0, 1))
    compiled = jax.jit(slope).lower(*plain).compile().as_text()
    assert matmul_flops(jax.make_jaxpr(slope)(*plain).jaxpr) == dot_flops(compiled)
    mesh = make_mesh(1, 8, 1)
    shards = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))
    inside = jax.make_jaxpr(shards)(jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)).jaxpr
    assert matmul_flops(inside) == 8 * 2 * (ROWS // 8) ** 2 * WIDTH


def test_the_platform_is_the_meshs_and_the_batch_is_split_as_it_says():
    assert (target(), batch_ways()) == ("cpu", 1)
    device = jax.sharding.AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    sizes, names = (2, 4), ("data", "fsdp")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(sizes, names, abstract_device=device)):
        assert (target(), batch_ways()) == ("tpu", 8)


def test_figures_of_chips_are_sane_and_have_sources():
    for chip in CHIPS.values():
        assert chip.source.startswith("https://")
        assert 16e9 <= chip.memory <= 220e9, chip.name
        assert chip.memory < chip.bandwidth * 0.15, f"{chip.name}: a chip reads its memory in a tenth of a second"
        assert 100 < chip.flops / chip.bandwidth < 700, f"{chip.name}: FLOPs a byte"
        assert 1e11 <= chip.network < chip.bandwidth
    assert (topology("v5p:8x8x8").chips, topology("V5E:4x4").name, topology("h100:24").chips) == (512, "v5e:4x4", 24)
    assert topology("tpu7x:2x2x1").devices == 8
    assert all(topology(name).name == name for name in topologies())


def test_bounds_are_the_chips_figures():
    found = bounds(CHIPS["v5e"], 16, flops=16 * 197e12, moved=819e9 / 2, wire=400e9, tokens=1000)
    assert (found.compute, found.memory, found.network, found.tokens) == (1.0, 0.5, 2.0, 500.0)
    assert (found.step, found.by) == (2.0, "network")


def test_two_devices_of_a_chip_count_together():
    found = {
        "devices": 8, "mesh": {}, "parameters": 1, "fits": True, "flops": 1.0, "seconds": {},
        "bytes": {"base": 5, "adapter": 1, "optimizer": 2, "batch": 1, "peak": 20},
        "collectives": {"all-gather": {"count": 3, "bytes": 10, "wire": 7}},
    }  # fmt: skip
    plan = made(load_config(None), topology("tpu7x:2x2x1"), found)
    assert (plan.peak, plan.memory["base"], plan.memory["temporaries"]) == (40, 10, 22)
    assert plan.collectives["all-gather"] == {"count": 3, "bytes": 20, "wire": 14}


def test_what_the_compiler_says_of_a_program_that_does_not_fit():
    said = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory. Used 1.50T of 31.25G hbm."
    assert exhausted(said) == {"needed": round(1.5 * 2**40), "available": round(31.25 * 2**30)}
    assert exhausted("RESOURCE_EXHAUSTED: else")["message"] == "RESOURCE_EXHAUSTED: else"


def llama(*overrides: str):
    return load_config(ROOT / "configs" / "llama3_8b_lora.yaml", overrides)


def test_changes_are_single_and_mild_ones_come_first():
    found = list(changes(llama("model.remat=none", "data.batch=64"), 16))
    assert found[:4] == [
        ("model.remat=dots",), ("model.remat=full",),
        ("data.batch=32", "accumulate=2"), ("data.batch=16", "accumulate=4"),
    ]  # fmt: skip
    assert found[4] == ("mesh.data=1", "mesh.fsdp=8", "mesh.tensor=2")
    assert all(tokens_of(changed(llama(), change)) for change in found)
    same = {tokens_of(changed(llama("model.remat=none", "data.batch=64"), change)) for change in found}
    assert same == {64 * 4096}, "none changes what is learnt in a step"


def test_the_search_ends_at_the_first_change_that_fits():
    asked = []

    def attempt(config, change):
        asked.append(change)
        fits = config.accumulate == 2
        return dataclasses.replace(PLAN, fits=fits, changes=change)

    found, tried = search(llama("model.remat=none", "data.batch=64"), 16, attempt)
    assert found is not None
    assert (found.changes, tried) == (("data.batch=32", "accumulate=2"), 3)
    assert search(llama(), 16, lambda config, change: PLAN)[0] is None


PLAN = made(
    llama(),
    topology("v5e:4x4"),
    {
        "devices": 16, "mesh": {}, "parameters": 1, "fits": False, "flops": 1.0, "seconds": {},
        "bytes": {"base": 5, "adapter": 1, "optimizer": 2, "batch": 1}, "needed": 30, "available": 20,
    },
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Llama-2-7b-hf", 6_738_415_616),
        ("Meta-Llama-3-8B", 8_030_261_248),
        ("Qwen3-32B", 32_762_123_264),
        ("Meta-Llama-3-70B", 70_553_706_496),
        ("Llama-3.1-405B", 405_853_388_800),
    ],
)
def test_architectures_have_the_published_numbers_of_parameters(name, parameters):
    config = architecture(find_config(f"org/{name}", folder=MODELS), remat="full")
    assert count(abstract_model(config)[1]) == parameters
    assert (config.param_dtype, config.remat) == ("bfloat16", "full")


def test_a_config_json_is_found_where_it_is(tmp_path):
    file = MODELS / "Qwen3-32B.json"
    (tmp_path / "config.json").write_text(file.read_text())
    assert find_config("org/none", given=tmp_path) == tmp_path / "config.json"
    assert find_config("org/none", given=file) == file
    assert find_config(str(tmp_path)) == tmp_path / "config.json"
    with pytest.raises(ModelFileError, match=r"--model .* is no config.json"):
        find_config("org/none", given=tmp_path / "nothing")
    with pytest.raises(ModelFileError, match=r"org/none: its config.json is not here.* --model FILE, or hf download"):
        find_config("org/none", folder=MODELS)


def test_a_plan_is_of_the_step_that_training_compiles():
    config = load_config(None, ["data.batch=16", "adapter.method=lora", "adapter.rank=2"])
    job = Job.of(config)
    shapes = planned(config, make_mesh())
    alike = lambda one, other: one.shape == other.shape and one.dtype == other.dtype and one.sharding == other.sharding
    mine, theirs = (jax.tree.leaves((each.state, each.base, each.batch)) for each in (shapes, job))
    assert len(mine) == len(theirs)
    assert all(map(alike, mine, theirs))


CONFIG = ["--config", str(ROOT / "configs" / "llama3_8b_lora.yaml")]
BAD = {
    "no topology": ([], "a plan is for a topology: --topology v5e:4x4, or another of v4, v5e, "),
    "unknown topology": (["-t", "v5e:4x5"], "topology 'v5e:4x5' is unknown; nearest: v5e:4x4"),
    "unknown chip": (["-t", "v7:4x4"], "topology 'v7:4x4' is unknown; nearest: "),
    "batch": (["-t", "v5e:4x4", "data.batch=24"], "data.batch 24 cannot be split over 16 devices"),
    "mesh": (["-t", "v5e:4x4", "mesh.fsdp=6"], "mesh data 1 × fsdp 6 × tensor 1 does not multiply to the 16 devices"),
    "no length": (["-t", "h100:16", "data.length=null"], "data.length is null"),
    "text of no program": (["-t", "h100:8", "data.batch=8", "--hlo", "x"], "--hlo x: GPUs are worked out by formulas"),
    "text nowhere": (["-t", "v5e:4x4", "--hlo", "no/x"], "--hlo no/x must be a file in a directory that exists"),
    "model": (["-t", "v5e:4x4", "model.source=org/none"], "org/none: its config.json is not here"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, capsys):
    arguments, message = BAD[case]
    code, out, error = call(capsys, "plan", *CONFIG, *arguments)
    assert (code, out) == (2, "")
    last = error.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    code, _, error = call(capsys, "plan", *CONFIG, "-t", "v5e:4x4")
    assert code == 2
    assert error == "error: planning for a TPU needs the TPU compiler, libtpu: pip install 'vlora_jax[plan]'\n"


def test_gpus_are_planned_by_formulas_and_it_says_so(capsys):
    code, out, _ = call(capsys, "plan", *CONFIG, "-t", "h100:8", "data.batch=8", "--json")
    found = json.loads(out)
    assert (code, found["analytic"], found["fits"], found["chips"]) == (0, True, True, 8)
    assert found["memory"]["base"] == pytest.approx(8_030_261_248 * 2 / 8, rel=1e-3)
    assert found["collectives"]["all-gather"]["bytes"] == pytest.approx(2 * 2 * 8.03e9, rel=0.01)
    assert found["collectives"]["all-gather"]["count"] == 2 * (7 * 32 + 2)
    forward_and_back = 4 * 8.03e9 * 8 * 4096  # a frozen kernel has no weight gradient; remat repeats a third
    assert 1.2 * forward_and_back < found["flops"] < 2.2 * forward_and_back


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'vlora_jax[plan]'")
def test_the_tpu_compiler_compiles_the_step(capsys):
    """A tiny Llama for four chips: gathers of each layer in either pass, splash attention, memory of one chip."""
    tiny = [
        "model.family=decoder", "model.width=256", "model.heads=2", "model.head_dim=128", "model.mlp_width=512",
        "model.layers=4", "model.vocabulary=1024", "model.tied_head=false", "model.remat=full",
        "model.dtype=bfloat16", "model.param_dtype=bfloat16", "data.length=256", "data.batch=8",
    ]  # fmt: skip
    code, out, _ = call(capsys, "plan", *CONFIG, "-t", "v5e:2x2", *tiny, "--json")
    found = json.loads(out)
    assert (code, found["fits"], found["devices"], found["analytic"]) == (0, True, 4, False)
    assert found["memory"]["base"] < found["memory"]["peak"] < 1e9
    assert sum(each["count"] for each in found["collectives"].values()) >= 4
    assert found["bounds"]["tokens"] > 0


def test_a_mesh_and_a_batch_are_checked_before_anything_is_compiled():
    with pytest.raises(ConfigError, match="does not multiply to the 256 devices"):
        check(llama("mesh.tensor=3"), topology("v5e:16x16"))
    check(llama("data.batch=256"), topology("v5e:16x16"))
