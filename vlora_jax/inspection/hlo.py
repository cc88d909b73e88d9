"""What a compiled XLA program does: products and collectives, with loop bodies counted as often as they run.

`compiled.cost_analysis()` counts the body of a loop once. The text of the optimised program names each loop's trip
count on CPU and GPU. The TPU compiler leaves it out: there it is the constant that the loop's condition compares its
counter with, which JAX's scans start at 0 and raise by 1.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field

from vlora_jax.errors import ResourceError

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=(%?[\w.\-]+|\{[^}]*\})")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\][^{]*\{([^}]*)\})")
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
_BITS = re.compile(r"\d+")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclass(frozen=True)
class Instruction:
    """A line of a program: `name = kind opcode(rest`."""

    name: str
    kind: str
    opcode: str
    rest: str

    def called(self, role: str = "") -> list[str]:
        """Computations that it names, all or those of one role, such as `body=`."""
        found = re.findall(rf"{role}=(%?[\w.\-]+)", self.rest) if role else _CALLED.findall(self.rest)
        return [name.strip(" %") for names in found for name in names.strip("{}").split(",")]

    @property
    def operands(self) -> list[str]:
        """Names of what it reads."""
        inside = self.rest[: _closing(self.rest)]
        return re.findall(r"%([\w.\-]+)", inside) or re.findall(r"([\w.\-]+)(?:,|$)", inside)


@dataclass
class Program:
    """The computations of an optimised program by name, each as its instructions by name; and the devices it is for."""

    entry: str = ""
    devices: int = 1
    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> "Program":
        """Read `compiled.as_text()`."""
        program, current = cls(), {}
        if partitions := re.search(r"num_partitions=(\d+)", text.partition("\n\n")[0]):
            program.devices = int(partitions[1])
        for raw in text.splitlines():
            line = raw.strip()
            if opened := _COMPUTATION.match(line):
                current = program.computations.setdefault(opened[1], {})
                program.entry = opened[1] if line.startswith("ENTRY") else program.entry
            elif found := _INSTRUCTION.match(line):
                current[found[1]] = Instruction(*found.groups())
        return program

    def times(self) -> dict[str, int]:
        """How often each computation runs.

        Raises:
          ResourceError: a loop's trip count is not to be found.
        """
        calls: dict[str, list[tuple[str, int]]] = {
            name: [
                (called, self.trips(name, each) if each.opcode == "while" else 1)
                for each in instructions.values()
                for called in each.called()
            ]
            for name, instructions in self.computations.items()
        }
        totals: dict[str, int] = defaultdict(int)

        def visit(name: str, times: int) -> None:
            totals[name] += times
            for called, turns in calls.get(name, ()):
                visit(called, times * turns)

        visit(self.entry, 1)
        return dict(totals)

    def trips(self, within: str, loop: Instruction) -> int:
        """How often a loop's body runs."""
        if known := _TRIPS.search(loop.rest):
            return int(known[1])
        limits = {int(limit) for name in loop.called("condition") for limit in self._constants(name)}
        if len(limits) != 1:
            raise ResourceError(f"loop {loop.name} in {within}: its trip count is not to be read from this program")
        return limits.pop()

    def _constants(self, name: str) -> list[str]:
        """Whole numbers in a computation and those that it calls."""
        found: list[str] = []
        for each in self.computations.get(name, {}).values():
            if each.opcode == "constant" and re.match(r"[su]\d+\[\]", each.kind):
                found.append(each.rest.partition(")")[0])
            found += [number for called in each.called() for number in self._constants(called)]
        return found


def dot_flops(text: str) -> float:
    """FLOPs (2 a multiply-add) of all matrix products that a compiled program executes; of branches, those of each.

    The TPU compiler turns products into convolutions, which are not counted: count those from the traced program,
    `vlora_jax.inspection.flops.matmul_flops`.

    Args:
      text: `jax.jit(f).lower(…).compile().as_text()`.

    Raises:
      ResourceError: a loop's trip count is not in the text.

    >>> import jax, jax.numpy as jnp
    >>> f = lambda x: jax.lax.scan(lambda h, _: (h @ h, None), x, length=5)[0]
    >>> dot_flops(jax.jit(f).lower(jnp.ones((8, 8))).compile().as_text()) == 5 * 2 * 8**3
    True
    """
    program = Program.of(text)
    total = 0.0
    for name, times in program.times().items():
        instructions = program.computations.get(name, {})
        for each in instructions.values():
            if each.opcode != "dot":
                continue
            found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.rest)
            axes = [int(axis) for axis in found[1].split(",")] if found else []
            left = _dims(instructions[each.operands[0]].kind)
            total += times * 2.0 * math.prod(_dims(each.kind)) * math.prod(left[axis] for axis in axes)
    return total


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Collectives of a compiled program by kind, over one run of it on one device.

    The TPU compiler spreads one collective over a chain of fusions that each name it: a chain counts once.

    Returns:
      By kind: `count`, executions; `bytes`, of their results (of a reduce-scatter: of what it reduces); `wire`, bytes
      that a device must receive for them at least, (n-1)/n of `bytes` in a group of n, twice that for an all-reduce.

    Raises:
      ResourceError: a loop's trip count is not to be found.
    """
    program = Program.of(text)
    found: dict[str, dict[str, int]] = {}
    chains: dict[tuple, tuple[int, Instruction, dict[str, Instruction]]] = {}
    for name, times in program.times().items():
        instructions = program.computations.get(name, {})
        for each in instructions.values():
            if each.opcode.removesuffix("-start") in KINDS:
                chain = _CHAIN.search(each.rest)
                key = chain.groups() if chain else (name, each.name)
                if key not in chains or times < chains[key][0]:
                    chains[key] = times, each, instructions
    for times, each, instructions in chains.values():
        kind = each.opcode.removesuffix("-start")
        size, share = _bytes_of(each, instructions), 1.0
        if kind != "collective-permute":
            members = _members(each, program.devices)
            share = (members - 1) / members
        if share:
            of_kind = found.setdefault(kind, {"count": 0, "bytes": 0, "wire": 0})
            of_kind["count"] += times
            of_kind["bytes"] += times * size
            of_kind["wire"] += round(times * size * share * (2 if kind == "all-reduce" else 1))
    return dict(sorted(found.items()))


def _bytes_of(each: Instruction, instructions: dict[str, Instruction]) -> int:
    """Bytes that a collective handles on one device."""
    if each.opcode == "reduce-scatter" or each.opcode == "reduce-scatter-start":
        return sum(_size(instructions[name].kind) for name in each.operands if name in instructions)
    if not each.opcode.endswith("-start"):
        return _size(each.kind)
    # A start's result holds its operands too, and on TPU counters behind them.
    reads = sum(_size(instructions[name].kind) for name in each.operands if name in instructions)
    whole = sum(size for size in _sizes(each.kind) if size > 16)
    return reads if each.opcode == "all-reduce-start" and whole == reads else whole - reads


def _members(each: Instruction, devices: int) -> int:
    """Devices of one group: `{}` for all, `{{0,1},{2,3}}`, `[2,2]<=[4]`, `mesh['a'=2,'b'=2], device_ids=(…) {'b'}`.

    Raises:
      ResourceError: the groups are given in another way.
    """
    found = _GROUPS.search(each.rest)
    if "replica_groups={}" in each.rest:
        return devices
    if not found:
        raise ResourceError(f"{each.opcode} {each.name}: its groups of devices are not to be read from this program")
    listed, second, axes, chosen = found.groups()
    if listed is not None:
        return len(listed.split(","))
    if second is not None:
        return int(second)
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes))
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", chosen)
    return math.prod(int(part or sizes[axis]) for axis, part in parts)


def _sizes(kind: str) -> list[int]:
    sizes = []
    for dtype, dims in _SHAPE.findall(kind):
        bits = 8 if dtype == "pred" else int(found[0]) if (found := _BITS.search(dtype)) else 0
        sizes.append(math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8)
    return sizes


def _size(kind: str) -> int:
    return sum(_sizes(kind))


def _dims(kind: str) -> tuple[int, ...]:
    inside = _SHAPE.search(kind)
    return tuple(int(dim) for dim in inside[2].split(",") if dim) if inside else ()


def _closing(text: str) -> int:
    """Where the bracket that is open at the start of `text` closes."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(text)
