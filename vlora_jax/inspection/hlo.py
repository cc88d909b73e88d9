"""What a compiled XLA program computes: matrix-product FLOPs with loop bodies counted as often as they run.

`compiled.cost_analysis()` counts the body of a loop once. The text of the optimised program names each loop's
trip count (on CPU and GPU; the TPU compiler leaves it out).
"""

import math
import re
from dataclasses import dataclass, field

from vlora_jax.errors import ResourceError

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|[^ (]+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=(%?[\w.\-]+|\{[^}]*\})")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclass
class _Computation:
    flops: float = 0.0
    calls: list[tuple[str, int]] = field(default_factory=list)  # name, times


def dot_flops(text: str) -> float:
    """FLOPs (2 a multiply-add) of all matrix products that a compiled program executes.

    Args:
      text: `jax.jit(f).lower(…).compile().as_text()`.

    Raises:
      ResourceError: a loop's trip count is not in the text.

    >>> import jax, jax.numpy as jnp
    >>> f = lambda x: jax.lax.scan(lambda h, _: (h @ h, None), x, length=5)[0]
    >>> dot_flops(jax.jit(f).lower(jnp.ones((8, 8))).compile().as_text()) == 5 * 2 * 8**3
    True
    """
    computations: dict[str, _Computation] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    current, entry = _Computation(), ""
    for raw in text.splitlines():
        line = raw.strip()
        if opened := _COMPUTATION.match(line):
            current, shapes = computations.setdefault(opened[1], _Computation()), {}
            entry = opened[1] if line.startswith("ENTRY") else entry
        elif found := _INSTRUCTION.match(line):
            name, kind, opcode, rest = found.groups()
            shapes[name] = _dims(kind)
            if opcode == "dot":
                left = re.match(r"(?:\S+\[[\d,]*\]\S* )?%?([\w.\-]+)", rest)[1]  # type: ignore[index]
                contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
                axes = [int(axis) for axis in contracted[1].split(",")] if contracted else []
                current.flops += 2.0 * math.prod(shapes[name]) * math.prod(shapes[left][axis] for axis in axes)
            times = 1
            if opcode == "while":
                trips = _TRIPS.search(rest)
                if not trips:
                    raise ResourceError(f"loop {name} has no known trip count in this backend's program text")
                times = int(trips[1])
            for names in _CALLED.findall(rest):
                current.calls += [(called.strip(" %"), times) for called in names.strip("{}").split(",")]
    return _total(entry, computations, {})


def _dims(shape: str) -> tuple[int, ...]:
    inside = _SHAPE.search(shape)
    return tuple(int(dim) for dim in inside[1].split(",") if dim) if inside else ()


def _total(name: str, computations: dict[str, _Computation], known: dict[str, float]) -> float:
    if name not in known:
        own = computations.get(name, _Computation())
        known[name] = own.flops + sum(times * _total(called, computations, known) for called, times in own.calls)
    return known[name]
