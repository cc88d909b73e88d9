"""Memory while a checkpoint is loaded: peak resident bytes above the start, over the bytes loaded.

A Llama-shaped checkpoint with random values is written shard by shard to a temporary directory and loaded in a fresh
process. No more than 1.3 times the bytes loaded may be resident at once.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

GOAL = 1.3
DTYPES = {"bfloat16": ("BF16", np.uint16), "float32": ("F32", np.float32)}


def config(layers: int, dtype: str) -> dict[str, Any]:
    """Llama's shape, 2,048 wide; the head is the embedding."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
        "dtype": dtype,
    }


def tensors(about: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of its tensors."""
    width, inner = about["hidden_size"], about["intermediate_size"]
    keys = width // about["num_attention_heads"] * about["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (about["vocab_size"], width)}
    for i in range(about["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        for name, rows in (("q", width), ("k", keys), ("v", keys), ("o", width)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, width)
        shapes |= {f"{layer}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (width, inner)
    return shapes | {"model.norm.weight": (width,)}


def generate(directory: Path, gigabytes: float, dtype: str, shard: float) -> int:
    """Write a checkpoint of about that size; the bytes of its tensors."""
    name, kind = DTYPES[dtype]
    itemsize = np.dtype(kind).itemsize
    size = lambda about: sum(int(np.prod(shape)) for shape in tensors(about).values()) * itemsize
    outer, one = size(config(0, dtype)), size(config(1, dtype)) - size(config(0, dtype))
    about = config(max(1, round((gigabytes * 1e9 - outer) / one)), dtype)
    (directory / "config.json").write_text(json.dumps(about))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for tensor, shape in tensors(about).items():
        nbytes = int(np.prod(shape)) * itemsize
        if shards[-1] and filled + nbytes > shard * 1e9:
            shards.append({})
            filled = 0
        shards[-1][tensor] = shape
        filled += nbytes
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    rng = np.random.default_rng(0)
    for file, shapes in zip(files, shards, strict=True):
        header, end = {}, 0
        for tensor, shape in shapes.items():
            nbytes = int(np.prod(shape)) * itemsize
            header[tensor] = {"dtype": name, "shape": shape, "data_offsets": (end, end + nbytes)}
            end += nbytes
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for shape in shapes.values():
                values = rng.standard_normal(shape, np.float32)
                halves = (values.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16 is float32's upper half
                out.write((halves if kind is np.uint16 else values).tobytes())
    places = {tensor: file for file, shapes in zip(files, shards, strict=True) for tensor in shapes}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return size(about)


def resident() -> int:
    """Bytes of this process in memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def measure(directory: str, devices: int) -> dict[str, float]:
    """Load in this process, and watch its memory from another thread."""
    import jax
    import jax.numpy as jnp

    from vlora_jax.distributed.mesh import make_mesh
    from vlora_jax.hub.load import load_model

    mesh = make_mesh(data=1, fsdp=devices, devices=jax.devices()[:devices])
    jax.block_until_ready(jnp.ones(8) @ jnp.ones((8, 8)))  # the backend and its threads are there
    start, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    loaded = load_model(directory, mesh)
    jax.block_until_ready(loaded.base)
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.base))
    high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"kept": kept, "peak": peak[0] - start, "after": resident() - start, "seconds": seconds, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/load_peak.py --gigabytes 2 --dtype float32 --devices 8",
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (default: 2)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of its tensors (default: bfloat16)")
    parser.add_argument("--shard", type=float, default=0.5, help="gigabytes a file (default: 0.5)")
    parser.add_argument("--devices", type=int, default=1, help="virtual devices to spread it over (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(measure(options.load, options.devices)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        nbytes = generate(Path(temporary), options.gigabytes, options.dtype, options.shard)
        command = [sys.executable, __file__, "--load", temporary, "--devices", str(options.devices)]
        where = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
        done = subprocess.run(command, env=where, check=True, capture_output=True, text=True)
    row = json.loads(done.stdout.splitlines()[-1]) | {"bytes": nbytes}
    row["ratio"] = row["peak"] / row["bytes"]
    if options.json:
        print(json.dumps(row | {"dtype": options.dtype, "devices": options.devices}))
        return
    table = Table("dtype", "devices", "bytes loaded", "peak above start", "after", "ratio", "seconds", title="Loading")
    cells = (f"{row[key] / 1e9:.3f} GB" for key in ("bytes", "peak", "after"))
    table.add_row(options.dtype, str(options.devices), *cells, f"{row['ratio']:.3f}", f"{row['seconds']:.1f}")
    console = Console()
    console.print(table)
    console.print(f"Goal at most {GOAL}: {'met' if row['ratio'] <= GOAL else 'NOT met'}.")


if __name__ == "__main__":
    main()
