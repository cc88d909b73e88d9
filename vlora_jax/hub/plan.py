"""Which tensor of a model's files becomes which parameter, and what does not fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from vlora_jax.errors import ModelFileError, nearest
from vlora_jax.hub.files import FLOATS, Store
from vlora_jax.hub.names import BESIDE, BUFFERS, Names


@dataclass(frozen=True)
class Read:
    """One parameter and where it comes from.

    Attributes:
      path: ours.
      tensors: names in the files, one a layer.
      expected: the shape of each there.
      stacked: whether the parameter has a layer axis.
      nbytes: in the files.
    """

    path: str
    tensors: tuple[str, ...]
    expected: tuple[int, ...]
    stacked: bool
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """What to do with each tensor and parameter.

    Attributes:
      reads: parameters from the files.
      fresh: parameters to be drawn.
      copies: tensors that must equal a parameter.
      left_out: tensors that the model does not have.
      expected_left_out: those of them that no user would miss: buffers, and copies.
    """

    reads: tuple[Read, ...]
    fresh: tuple[str, ...]
    copies: dict[str, str]
    left_out: tuple[str, ...]
    expected_left_out: frozenset[str]


def plan(
    store: Store, names: Names, shapes: Mapping[str, Any], *, new_head: bool, classes: int | None, untie: bool
) -> Plan:
    """Match a model's parameters with tensors.

    Args:
      shapes: the model's parameters by path.
      new_head: the head is another than the files', so what they lack of it is drawn.
      classes: asked for; a head with another number of them is drawn too.
      untie: a head that the files do not have starts as a copy of the embedding.

    Raises:
      ModelFileError: tensors are missing, unexpected, of another shape or no floating-point numbers; all are counted,
        the first named.
    """
    found: dict[str, str] = {}
    for name in store.entries:
        full = names.full(name)
        if full in found:
            raise ModelFileError(f"{store.directory}: {found[full]} and {name} are the same tensor")
        found[full] = name
    reads, fresh, missing, shaped, used = [], [], [], [], set()
    for path, leaf in shapes.items():
        layers = names.layers(path)
        expected = in_file(names, path, leaf.shape if layers is None else leaf.shape[1:])
        tensors = [names.tensor(path, layer) for layer in range(layers or 1)]
        if untie and path == "head/kernel" and tensors[0] not in found:
            tensors = [names.tensor("embed/embedding")]
        absent = [tensor for tensor in tensors if tensor not in found]
        entries = {tensor: store.entries[found[tensor]] for tensor in tensors if tensor in found}
        other = {tensor: entry.shape for tensor, entry in entries.items() if entry.shape != expected}
        used |= set(tensors)
        of_head = path in names.head or path.rpartition("/")[0] in names.head
        if of_head and ((len(absent) == len(tensors) and new_head) or (other and classes is not None)):
            fresh.append(path)
        elif absent or other:
            missing += absent
            shaped += [f"{tensor} {list(shape)}, expected {list(expected)}" for tensor, shape in other.items()]
        else:
            stored, nbytes = tuple(found[tensor] for tensor in tensors), sum(e.nbytes for e in entries.values())
            reads.append(Read(path, stored, expected, layers is not None, nbytes))
    rest = [full for full in found if full not in used]
    buffers = {full for full in rest if BUFFERS.search(full)}
    copies = {found[full]: names.copies[full] for full in rest if names.copies.get(full) in shapes}
    beside = (*BESIDE, f"{names.prefix}pooler.")
    unexpected = [f for f in rest if f not in buffers and found[f] not in copies and not f.startswith(beside)]
    check(store, names, missing, unexpected, shaped)
    numbers = [name for read in reads for name in read.tensors if store.entries[name].dtype not in FLOATS]
    if numbers:
        raise ModelFileError(
            f"{store.directory}: {numbers[0]} is {store.entries[numbers[0]].dtype} ({len(numbers)} tensors are no "
            f"{', '.join(FLOATS)}): quantised models are not supported; load the model it was made from"
        )
    quiet = frozenset(found[full] for full in buffers) | frozenset(copies)
    return Plan(tuple(reads), tuple(fresh), copies, tuple(found[full] for full in rest), quiet)


def in_file(names: Names, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in files of one layer's parameter."""
    return jax.eval_shape(lambda a: names.to_file(path, a), jax.ShapeDtypeStruct(shape, "float32")).shape


def check(store: Store, names: Names, missing: list[str], unexpected: list[str], shaped: list[str]) -> None:
    """Raises ModelFileError, for all of them at once, if a tensor is missing, unexpected or of another shape."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shaped))
    faults = [
        f"{len(which)} {kind} ({'; '.join(which[:3])}{' …' * (len(which) > 3)})" for kind, which in kinds if which
    ]
    if not faults:
        return
    hint = ""
    if missing:
        hint = f"; nearest to {missing[0]}: {', '.join(nearest(missing[0], unexpected or store.entries))}"
    elif unexpected:
        hint = "; a tensor that the config does not speak of would be lost"
    raise ModelFileError(f"{store.directory} does not fit {names.architecture}: {', '.join(faults)}{hint}")
