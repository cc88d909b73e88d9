"""What it takes to look at an adapter of a 7B model: 32 layers of 4,096 and 11,008, rank 16 on seven kernels.

Random factors, no base: all that does not need W. Each line is a call with everything, its compilation too, and the
memory that the process had at most beyond what it had with the adapters in it. With `--kernel` one stack of the base is
there as well (bfloat16, 4,096 × 4,096 in 8 layers), for what needs W.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from vlora_jax import Adapter, LoRA, Site
from vlora_jax.inspection.alignment import alignment_rows
from vlora_jax.inspection.rounding import rounding_rows
from vlora_jax.inspection.similarity import diff_rows, drift_rows, subspace_grids
from vlora_jax.inspection.tables import adapter_rows

LAYERS, WIDTH, MLP, RANK, KERNEL_LAYERS = 32, 4096, 11008, 16, 8
SHAPES = {
    **{f"layers/block/attn/{name}": (WIDTH, WIDTH) for name in "qkvo"},
    **{f"layers/block/mlp/{name}": (WIDTH, MLP) for name in ("gate", "up")},
    "layers/block/mlp/down": (MLP, WIDTH),
}


def adapter(seed: int, shapes: dict[str, tuple[int, int]], layers: int) -> Adapter:
    """A LoRA with random factors."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
    sites = [Site(path, "kernel", "dense", (layers,), shape, (0,), (1,)) for path, shape in shapes.items()]
    factors = {
        site.path: {"a": draw(layers, site.in_dim, RANK), "b": draw(layers, RANK, site.out_dim) / 1e3} for site in sites
    }
    return Adapter.of(LoRA(rank=RANK), sites, trainable=factors)


def peak() -> float:
    """MiB that this process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="store_true", help="also what needs the base, on one stack of it")
    options = parser.parse_args()
    one, other = adapter(0, SHAPES, LAYERS), adapter(1, SHAPES, LAYERS)
    calls: dict[str, Callable[[], object]] = {
        "norms, spectra, ranks, energy, dead directions": lambda: adapter_rows(None, one, per_layer=True),
        "two adapters: cosine, distance, overlap": lambda: diff_rows(one, other, per_layer=True),
        "grids of overlap": lambda: subspace_grids(one, other),
        "drift over three checkpoints": lambda: drift_rows([(0, one), (1, other), (2, one)]),
    }
    if options.kernel:
        path = "layers/block/attn/q"
        small = adapter(2, {path: SHAPES[path]}, KERNEL_LAYERS)
        draw = jax.jit(lambda key: jax.random.normal(key, (KERNEL_LAYERS, WIDTH, WIDTH), jnp.bfloat16) / WIDTH**0.5)
        base = {path: {"kernel": draw(jax.random.key(0))}}
        about = f"{KERNEL_LAYERS} layers of {WIDTH} × {WIDTH}"
        calls[f"merge to bfloat16, {about}"] = lambda: rounding_rows(base, small)
        calls[f"alignment, {about}"] = lambda: alignment_rows(base, small)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("what", "seconds", "CPU seconds", "MiB beyond the adapters"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, call in calls.items():
        before, clock, processor = peak(), time.perf_counter(), time.process_time()
        call()
        spent = time.perf_counter() - clock, time.process_time() - processor
        table.add_row(name, *(f"{each:.1f}" for each in spent), f"{peak() - before:,.0f}")
        print(f"{name}: {spent[0]:.1f} s", file=sys.stderr, flush=True)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((one, other))) / 2**20
    Console(width=120).print(table, f"two adapters of {held / 2:,.0f} MiB each on {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
