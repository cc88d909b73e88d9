"""One of two processes that load a checkpoint together: process id, port, checkpoint, file with the expected values."""

import sys

import jax
import jax.monitoring
import numpy as np

from vlora_jax.adapters.trees import flatten
from vlora_jax.distributed.mesh import make_mesh
from vlora_jax.hub.load import load_model


def main(process: int, port: str, directory: str, values: str) -> None:
    expected = np.load(values)
    jax.distributed.initialize(f"localhost:{port}", 2, process, initialization_timeout=60, heartbeat_timeout_seconds=20)

    read = []
    jax.monitoring.register_scalar_listener(
        lambda name, value, **_: read.append(value) if name == "/jax/orbax/read/safetensors/bytes_read" else None
    )
    base = flatten(load_model(directory, make_mesh(data=1, fsdp=4, tensor=2)).base)
    for path, leaf in base.items():
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[path][shard.index], err_msg=path)
    held = {
        path: sum(s.data.nbytes for s in leaf.addressable_shards if s.replica_id == 0) for path, leaf in base.items()
    }
    print(
        "read", int(sum(read)), "of", sum(leaf.nbytes for leaf in base.values()), "held", sum(held.values()), flush=True
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
