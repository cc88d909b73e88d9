"""The process that compiles train steps for TPU topologies: `python -m vlora_jax.planning.worker`.

libtpu wants its environment set before JAX is imported, writes to standard output, and may abort: so it has a process
of its own. Requests and answers are lines of JSON: a request is `Request.line`, an answer `{"doing": …}`,
`{"error": …}` or `{"found": …}`.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
SIZES = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Request:
    """What to compile.

    Attributes:
      config: a `RunConfig`, as `plain` gives it.
      model: a `config.json`, for a pretrained model.
      topology: `"v5e:4x4"`.
      text: a file to write the optimised program to.
    """

    config: dict[str, Any]
    model: str | None
    topology: str
    text: str | None = None

    @property
    def line(self) -> str:
        return json.dumps(asdict(self))


def answer(request: Request, say: Callable[[str], None]) -> dict[str, Any]:
    """Compile the step and tell what the compiler found.

    Returns:
      `fits`, bytes of one device by part, collectives by kind, FLOPs of a step, seconds by stage; where it does not
      fit, the bytes that the compiler needed and had.

    Raises:
      VloraError: the config is impossible.
    """
    import jax
    from jax.experimental import topologies

    from vlora_jax.distributed.chips import topology
    from vlora_jax.inspection.flops import matmul_flops
    from vlora_jax.inspection.hlo import collectives
    from vlora_jax.planning.analytic import estimate
    from vlora_jax.planning.job import lasting_bytes, planned
    from vlora_jax.training.config import RunConfig

    config, there = RunConfig.model_validate(request.config), topology(request.topology)
    if there.chip.kind == "tpu":
        devices = topologies.get_topology_desc(platform="tpu", topology_name=request.topology).devices
    else:
        devices = jax.devices()  # as many as GPUs: shapes are placed on them, nothing is compiled
    mesh = mesh_of(config, devices)
    clocks, seconds = (time.monotonic(), time.process_time()), {}

    def lap(stage: str) -> None:
        nonlocal clocks
        now = time.monotonic(), time.process_time()
        seconds[stage], seconds[f"{stage}_cpu"] = now[0] - clocks[0], now[1] - clocks[1]
        clocks = now

    say("tracing")
    shapes = planned(config, mesh, None if request.model is None else Path(request.model))
    arguments = (shapes.state, shapes.base, shapes.batch)
    found: dict[str, Any] = {
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "parameters": shapes.model_parameters,
        "bytes": lasting_bytes(shapes),
    }
    with jax.set_mesh(mesh):
        traced = shapes.step().trace(*arguments)
        found["flops"] = matmul_flops(traced.jaxpr.jaxpr)
        lap("trace")
        if there.chip.kind == "gpu":
            return found | estimate(shapes, there.chip) | {"seconds": seconds}
        lowered = traced.lower()
        lap("lower")
        say("compiling")
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            lap("compile")
            return found | {"fits": False, "seconds": seconds} | exhausted(str(error))
    lap("compile")
    text = compiled.as_text()
    if request.text is not None:
        Path(request.text).write_text(text)
    memory = compiled.memory_analysis()
    found["bytes"] |= {"peak": memory.peak_memory_in_bytes, "temporaries": memory.temp_size_in_bytes}
    return found | {"fits": True, "collectives": collectives(text), "seconds": seconds}


def mesh_of(config: Any, devices: Any) -> Any:
    """The run's mesh. v4's topologies list two devices a chip, which JAX's own order of a mesh refuses."""
    import jax
    import numpy as np

    from vlora_jax.distributed.mesh import AXES, filled, make_mesh

    sizes = config.mesh.sizes
    try:
        return make_mesh(**sizes, devices=devices)
    except AssertionError:
        shape = filled(**sizes, devices=len(devices))
        return jax.sharding.Mesh(
            np.array(devices).reshape(shape), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
        )


def exhausted(message: str) -> dict[str, Any]:
    """Bytes needed and there, from the compiler's error.

    >>> exhausted("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.")
    {'needed': 22011707392, 'available': 16911433728}
    >>> exhausted("RESOURCE_EXHAUSTED: … for HLO temporaries (96.5G) exceeds available HBM (95.74G).")
    {'needed': 103616086016, 'available': 102800042230}
    """
    size = r"([\d.]+)([KMGTB]?)"
    told = re.search(rf"Used {size} of {size} hbm|\({size}\) exceeds available HBM \({size}\)", message)
    if not told:
        return {"needed": None, "available": None, "message": message.splitlines()[0][:400]}
    needed, unit, available, other = (each for each in told.groups() if each is not None)
    return {"needed": round(float(needed) * SIZES[unit]), "available": round(float(available) * SIZES[other])}


def main() -> None:
    """Answer requests until standard input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libtpu's own prints would come between the answers
    from vlora_jax.errors import VloraError

    tell = lambda **what: print(json.dumps(what), file=out)
    for line in sys.stdin:
        try:
            tell(found=answer(Request(**json.loads(line)), lambda stage: tell(doing=stage)))
        except VloraError as error:
            tell(error=str(error), code=error.exit_code)


if __name__ == "__main__":
    main()
