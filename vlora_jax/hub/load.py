"""Load a model of transformers: its config, then its tensors straight onto the mesh, group by group."""

import ctypes
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PRNGKeyArray

from vlora_jax.adapters.quantize import quantized_shapes, turned_into
from vlora_jax.adapters.quantized import Form, is_quantized
from vlora_jax.adapters.sites import split
from vlora_jax.adapters.trees import Tree, flatten, unflatten
from vlora_jax.distributed.mesh import make_mesh
from vlora_jax.distributed.specs import base_specs, shardings
from vlora_jax.errors import ConfigError, ModelFileError
from vlora_jax.hub.configs import ModelConfig, choose_head, head_of, read_config
from vlora_jax.hub.files import CONFIG, FLOATS, Store, read_json
from vlora_jax.hub.names import CLASSES, Names, names_of
from vlora_jax.hub.plan import Plan, Read, plan
from vlora_jax.hub.where import locate
from vlora_jax.models.build import abstract_model, build
from vlora_jax.models.encoder import EncoderConfig
from vlora_jax.models.seq2seq import Seq2SeqConfig

SMALL = 16 << 20  # bytes up to which parameters are read together
DTYPES = ("float32", "bfloat16")
BITS = {2: jnp.uint16, 4: jnp.uint32}


@dataclass(frozen=True)
class Loaded:
    """A model as it was loaded.

    Attributes:
      graphdef, base: the model, as `split` gives it.
      config: ours.
      names: of its parameters in files.
      given: its `config.json`.
      directory: where its files are.
      fresh: parameters that the files do not have, drawn at random: a new head.
      left_out: tensors of the files that the model does not have: another head, buffers, copies of tied tensors.
    """

    graphdef: nnx.GraphDef
    base: Tree
    config: ModelConfig
    names: Names
    given: dict[str, Any]
    directory: Path
    fresh: tuple[str, ...]
    left_out: tuple[str, ...]


def load(
    where: str | os.PathLike,
    mesh: Mesh | None = None,
    dtype: Any = None,
    head: str | None = None,
    *,
    classes: int | None = None,
    untie: bool = False,
    remat: str = "none",
    quantize: Form | None = None,
    key: PRNGKeyArray | None = None,
    ignore: Sequence[str] = (),
    notify: Callable[[str], None] = print,
) -> tuple[nnx.GraphDef, Tree]:
    """A pretrained model: its graph and its parameters, as `split` gives them.

    Args:
      where: a directory in transformers' form, a name on the hub, or `"package:NAME"`; see `hub.where.locate`.
      mesh: to put the parameters on, by the rules of `distributed.specs`; the first device if not given.
      dtype: of the parameters and of computation, `"float32"`, `jnp.bfloat16`; as stored if not given.
      head: `"lm"`, `"sequence"`, `"token"`, `"masked_lm"`, `"image"` or `"none"`; that of the files if not given.
      classes: of a sequence, token or image head, if not those of the files.
      untie: give the head a kernel of its own where it is the embedding; it starts as a copy.
      remat: what the backward pass computes again; see `Stack`.
      quantize: `"int8"` or `"nf4"`: hold the layers' kernels so, see `vlora_jax.quantize`; one kernel at a time is in
        memory as it was stored.
      key: draws a head that the files do not have; key 0 if not given.
      ignore: keys of `config.json` to be read as if they were absent.
      notify: told, in a line each, what was drawn afresh and what was left out.

    Raises:
      ConfigError: the config asks for what our models do not have.
      ModelFileError: files are missing, damaged or unsafe, tensors are missing, unexpected, of another shape, or
        hold values that are not finite.
    """
    chosen: dict[str, Any] = {"classes": classes, "untie": untie, "remat": remat, "ignore": ignore}
    loaded = load_model(where, mesh, dtype, head, quantize=quantize, key=key, notify=notify, **chosen)
    return loaded.graphdef, loaded.base


def load_model(
    where: str | os.PathLike,
    mesh: Mesh | None = None,
    dtype: Any = None,
    head: str | None = None,
    *,
    classes: int | None = None,
    untie: bool = False,
    remat: str = "none",
    quantize: Form | None = None,
    key: PRNGKeyArray | None = None,
    ignore: Sequence[str] = (),
    notify: Callable[[str], None] = print,
) -> Loaded:
    """`load` with a record of what was done."""
    found = describe(where, dtype, head, classes=classes, untie=untie, remat=remat, ignore=ignore)
    store, names, done, shapes = found.store, found.names, found.plan, flatten(found.shapes)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    places = flatten(shardings(base_specs(found.shapes, mesh), mesh))
    held = quantized_shapes(found.shapes, quantize)
    held_places = flatten(shardings(base_specs(held, mesh), mesh))
    values: dict[str, Any] = {}
    for group in groups(done.reads):
        values |= read_group(store, names, group, shapes, places, mesh)
        fewer_bits = {read.path: there for read in group if is_quantized(there := held_places[read.path])}
        for path, there in fewer_bits.items():
            values[path] = turned_into(values[path], there)
        if fewer_bits:
            give_back_memory()
    check_copies(store, done, values, names, places)
    if done.fresh:
        values |= draw(found.config, done.fresh, key, places)
    tell(done, names, notify)
    base = unflatten(found.shapes, values)
    return Loaded(found.graphdef, base, found.config, names, found.given, store.directory, done.fresh, done.left_out)


@dataclass(frozen=True)
class Described:
    """A model in files, before any of its numbers is read.

    Attributes:
      graphdef, shapes: the model, its parameters as shapes.
      config: ours.
      names: of its parameters in files.
      given: its `config.json`.
      store: its tensors.
      plan: which of them go where.
    """

    graphdef: nnx.GraphDef
    shapes: Tree
    config: ModelConfig
    names: Names
    given: dict[str, Any]
    store: Store
    plan: Plan


def describe(
    where: str | os.PathLike,
    dtype: Any = None,
    head: str | None = None,
    *,
    classes: int | None = None,
    untie: bool = False,
    remat: str = "none",
    ignore: Sequence[str] = (),
) -> Described:
    """What `load` would load; arguments and errors as there."""
    if dtype is not None and not isinstance(dtype, str):  # jnp.bfloat16, np.dtype("float32")
        dtype = jnp.dtype(dtype).name
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} must be one of {', '.join(map(repr, DTYPES))}")
    directory = locate(where)
    given = read_json(directory / CONFIG)
    chosen = choose_head(given, head)
    store = Store.open(directory)
    chosen_dtype = dtype or stored_dtype(store)
    fields = {"remat": remat, "dtype": chosen_dtype, "param_dtype": chosen_dtype}
    config = read_config(given, chosen, classes, ignore, **fields)
    names = names_of(config, CLASSES[given["model_type"]][chosen])
    config, names = by_files(config, names, {names.full(name) for name in store.entries}, untie)
    graphdef, shapes = abstract_model(config)
    new_head = head is not None and head != head_of(given)
    done = plan(store, names, flatten(shapes), new_head=new_head, classes=classes, untie=untie)
    return Described(graphdef, shapes, config, names, given, store, done)


def stored_dtype(store: Store) -> str:
    """The dtype of most of the bytes; half precision without bfloat16's range is read as float32."""
    totals = dict.fromkeys(FLOATS, 0)
    for entry in store.entries.values():
        totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.nbytes
    return "bfloat16" if max(totals, key=lambda name: totals[name]) == "BF16" else "float32"


def by_files(config: ModelConfig, names: Names, stored: set[str], untie: bool) -> tuple[ModelConfig, Names]:
    """The config and names with what only the files tell: whether T5 has a head of its own, BERT a pooler.

    Raises:
      ConfigError: `untie` of a model without a tied head.
    """
    changes: dict[str, Any] = {}
    if isinstance(config, Seq2SeqConfig) and "lm_head.weight" in stored and not config.head_scale:
        changes["tied_head"] = False
    if isinstance(config, EncoderConfig) and config.head == "none":
        changes["pooler"] = names.tensor("pooler/kernel") in stored
    if untie:
        if not getattr(config, "tied_head", False) or config.head != "lm":
            raise ConfigError("untie: this model's head is not tied to its embedding")
        changes["tied_head"] = False
    config = config.model_copy(update=changes)
    return config, names_of(config, names.architecture)


def groups(reads: Sequence[Read]) -> Iterator[list[Read]]:
    """What is read at a time, the largest first while little is loaded yet; small parameters together."""
    small, size = [], 0
    for read in sorted(reads, key=lambda read: -read.nbytes):
        if read.nbytes > SMALL:
            yield [read]
            continue
        twice = any(tensor in read.tensors for other in small for tensor in other.tensors)  # an untied head's
        if small and (twice or size + read.nbytes > SMALL):
            yield small
            small, size = [], 0
        small, size = [*small, read], size + read.nbytes
    if small:
        yield small


def read_group(
    store: Store, names: Names, group: Sequence[Read], shapes: dict[str, Any], places: dict[str, Any], mesh: Mesh
) -> dict[str, Array]:
    """Parameters of a model, read, turned round and stacked.

    Raises:
      ModelFileError: a tensor has values that are not finite.
    """
    as_stored = {read.path: not read.stacked and not names.changes(read.path) for read in group}
    final, first = {}, {}
    for read in group:
        final[read.path] = places[read.path]
        if not as_stored[read.path]:
            final[read.path] = NamedSharding(mesh, before_turning(names, read, places[read.path].spec))
        first[read.path] = NamedSharding(mesh, contiguous(final[read.path].spec, read.expected, mesh))
    raw = store.read(
        {
            tensor: jax.ShapeDtypeStruct(read.expected, shapes[read.path].dtype, sharding=first[read.path])
            for read in group
            for tensor in read.tensors
        }
    )
    arrays = {read.path: [_moved(raw.pop(tensor), final[read.path]) for tensor in read.tensors] for read in group}
    give_back_memory()
    turned = tuple(read for read in group if not as_stored[read.path])
    where = {read.path: places[read.path] for read in turned}
    values, finite = _assemble(names, turned, where, mesh)(arrays)
    for read in group:
        bad = [tensor for tensor, fine in zip(read.tensors, jax.device_get(finite[read.path]), strict=True) if not fine]
        if bad:
            raise ModelFileError(f"{store.directory}: {bad[0]} has values that are not finite")
    whole = values | {path: arrays[path][0] for path, same in as_stored.items() if same}
    arrays.clear()
    give_back_memory()
    return whole


def _assemble(names: Names, reads: Sequence[Read], where: dict[str, Any], mesh: Mesh) -> Callable:
    """The jitted step from tensors as stored to parameters, and whether each tensor is finite.

    Written so that XLA's CPU backend needs no memory beside the result: `jnp.stack` of many transposed tensors makes
    each transpose first, bfloat16 is widened on the way, and `isfinite(…).all()` keeps a mask of the tensor's size.
    """

    def assemble(arrays: dict[str, list[Array]]) -> tuple[dict[str, Array], dict[str, Array]]:
        values = {read.path: _stacked(names, read, arrays[read.path]) for read in reads}
        # The largest value is NaN where any is.
        finite = {path: jnp.isfinite(jnp.stack([abs(a).max() for a in each])) for path, each in arrays.items()}
        return values, finite

    return jax.jit(assemble, out_shardings=(where, NamedSharding(mesh, P())))


def _stacked(names: Names, read: Read, arrays: list[Array]) -> Array:
    """One parameter from its layers' tensors, put in place one after the other, as bits."""
    dtype = arrays[0].dtype
    turn = lambda array: names.from_file(read.path, jax.lax.bitcast_convert_type(array, BITS[dtype.itemsize]))
    if not read.stacked:
        return jax.lax.bitcast_convert_type(turn(arrays[0]), dtype)
    one = jax.eval_shape(turn, arrays[0])
    whole = jnp.zeros((len(arrays), *one.shape), one.dtype)
    for layer, array in enumerate(arrays):
        whole = jax.lax.dynamic_update_index_in_dim(whole, turn(array), layer, 0)
    return jax.lax.bitcast_convert_type(whole, dtype)


def contiguous(spec: P, shape: Sequence[int], mesh: Mesh) -> P:
    """A spec that splits the first axis over the mesh axes of `spec`, as far as they divide it: contiguous reads."""
    axes = [axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)]
    while axes and shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        axes.pop()
    return P(tuple(axes)) if axes else P()


def give_back_memory() -> None:
    """Freed memory to the system: glibc keeps blocks of a few MiB, together up to half of the model."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def before_turning(names: Names, read: Read, spec: P) -> P:
    """The spec of a stored tensor from which its parameter, of `spec`, is made without communication."""
    one = tuple(spec)[1:] if read.stacked else tuple(spec)
    if not names.changes(read.path):
        return P(*one)
    matrix = read.path.endswith("/kernel") and len(read.expected) == 2
    return P(*reversed((*one, *(None,) * (2 - len(one))))) if matrix else P()


def _moved(array: Array, there: NamedSharding) -> Array:
    """An array elsewhere on the mesh. Tensor by tensor this takes little; within a group's program, twice the group."""
    if array.sharding.is_equivalent_to(there, array.ndim):
        return array
    return jax.jit(lambda array: array, out_shardings=there)(array)


def check_copies(store: Store, done: Plan, values: dict[str, Any], names: Names, places: dict[str, Any]) -> None:
    """Raises ModelFileError if a tensor that the config ties to another has other values in the files."""
    same = jax.jit(lambda one, other: (one == other).all())
    for tensor, path in done.copies.items():
        wanted = jax.ShapeDtypeStruct(values[path].shape, values[path].dtype, sharding=places[path])
        if not bool(same(store.read({tensor: wanted})[tensor], values[path])):
            way = "; untie=True loads it as a kernel of its own" if tensor == "lm_head.weight" else ""
            raise ModelFileError(
                f"{store.directory}: {tensor} differs from {names.tensor(path)}, to which config.json ties it{way}"
            )


def draw(
    config: ModelConfig, fresh: Sequence[str], key: PRNGKeyArray | None, places: dict[str, Any]
) -> dict[str, Array]:
    """Parameters as a new model of this config would have them."""

    def start(key: PRNGKeyArray) -> dict[str, Array]:
        every = flatten(split(build(config, key))[1])
        return {path: every[path] for path in fresh}

    where = {path: places[path] for path in fresh}
    return jax.jit(start, out_shardings=where)(jax.random.key(0) if key is None else key)


def tell(done: Plan, names: Names, notify: Callable[[str], None]) -> None:
    """Say what a user would miss: new parameters, and what of the files is not in the model."""
    if done.fresh:
        notify(f"drawn afresh, the files do not have them: {', '.join(done.fresh)}")
    others = [name for name in done.left_out if name not in done.expected_left_out]
    if others:
        notify(f"left out, {names.architecture} does not have them: {', '.join(others[:6])}" + " …" * (len(others) > 6))
