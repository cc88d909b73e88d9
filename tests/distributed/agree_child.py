"""One of two processes that agree on things."""

import time

import jax
import numpy as np
import pytest

from vlora_jax.distributed import processes
from vlora_jax.distributed.mesh import make_mesh
from vlora_jax.distributed.rows import global_batch, local_rows
from vlora_jax.distributed.watch import leaving
from vlora_jax.errors import ConfigError, ProcessError, ResumeError


def refuse() -> None:
    raise ResumeError("another process is training here")


def main() -> None:
    processes.start(60, 20)
    me = jax.process_index()
    assert processes.is_writer() == (me == 0)
    assert processes.gathered("place", me) == [0, 1]
    assert processes.decided("step", lambda: 7 if me == 0 else 1 / 0) == 7
    with pytest.raises(ResumeError, match="another process is training here"):
        processes.decided("run", refuse)
    processes.same("config", {"steps": 3})
    with pytest.raises(ConfigError, match="process 1 has another config than process 0: steps is 4, not 3"):
        processes.same("config", {"steps": 3 + me})
    with pytest.raises(ConfigError, match=r"than process 0: a is None, not absent; a\.b is absent, not 3"):
        processes.same("config", {"seed": 1, "a": None} if me else {"seed": 1, "a.b": 3})
    if me == 0:
        with pytest.raises(ProcessError, match=r"process 1 did not come to 'lunch' in 0.5 seconds"):
            processes.barrier("lunch", 0.5)

    calls = iter(range(5))
    asks = processes.agreed(lambda: next(calls) == 2 and me == 1, mesh := make_mesh(2, 2, 2))
    answers = [asks() for _ in range(5)]
    assert answers == [False, False, False, True, False], answers

    for mesh in (mesh, make_mesh(1, 1, 8), make_mesh(8, 1, 1)):
        rows, whole = local_rows(8, mesh), np.arange(32).reshape(1, 8, 4)
        batch = {"id": whole[:, :, 0], "x": whole[:, rows]}
        placed = global_batch(batch, mesh)
        assert placed["x"].shape == (1, 8, 4)
        for shard in placed["x"].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
        assert len(rows) == (8 if mesh.shape["tensor"] == 8 else 4)
    if me == 1:
        raise ConfigError("one has enough")
    time.sleep(60)


if __name__ == "__main__":
    with leaving():
        main()
