"""Several runs as one program: states on an axis of members, one frozen base, each with its own numbers and data.

A member is what it would be by itself: tensors filled up with zeros to a common shape neither change it nor train, and
a member that has ended stays as it is while the others go on.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.trees import Tree, flatten, unflatten
from vlora_jax.data.dataset import Example
from vlora_jax.distributed.mesh import BATCH_AXES, make_mesh
from vlora_jax.distributed.specs import adapter_specs, is_spec
from vlora_jax.training.config import MeshConfig, RunConfig
from vlora_jax.training.job import Job
from vlora_jax.training.optimizers import Numbers, chain, decayed, numbers_of, schedule
from vlora_jax.training.outline import placed, state_of
from vlora_jax.training.step import Batch, Subject, TrainState, evaluated, leaf_names, updated

MEMBERS = "data"  # the mesh axis that members lie over


@dataclass(frozen=True)
class Joint:
    """Runs that train together, as shapes with their place on the mesh, no numbers.

    Attributes:
      jobs: the runs, each as by itself.
      slots: which of them is in each place of the members' axis; the last is there again where that fills devices up.
      mesh: that the program runs on.
      apart: members lie over the mesh, and devices exchange nothing; else batches do, as those of a single run.
      subject: what is trained, in a form in which all can be written.
      numbers: of the optimisers: a float where members agree, else an array `(slots,)`.
      state: what changes, with an axis of members in front of everything.
    """

    jobs: tuple[Job, ...]
    slots: tuple[int, ...]
    mesh: Mesh
    apart: bool
    subject: Subject
    numbers: Numbers
    state: TrainState

    @classmethod
    def of(cls, jobs: Sequence[Job], devices: Sequence[Any]) -> "Joint":
        """The program of runs that can share one: see `vlora_jax.experiments.sweep.programs`.

        Args:
          jobs: made for what `place_of_one` gives.
          devices: to run on.
        """
        first, apart = jobs[0], is_whole(jobs[0].config.mesh)
        ways = min(len(jobs), len(devices)) if apart else 1
        slots = tuple(min(place, len(jobs) - 1) for place in range(-(-len(jobs) // ways) * ways))
        mesh = make_mesh(devices=devices[:ways]) if apart else first.mesh
        adapters = [job.subject.adapter for job in jobs if job.subject.adapter is not None]
        subject = dataclasses.replace(first.subject, adapter=common(adapters) if adapters else None)
        tensors, specs = tensors_of(subject, first, mesh)
        numbers = numbers_of_all(jobs, slots, list(flatten(tensors[0])))
        constant = chain(first.config.optimizer.name, lambda count: 0.0, numbers, decayed(tensors[0], subject.adapter))
        shapes, specs = state_of(constant, tensors, specs)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(slots), *leaf.shape), leaf.dtype), shapes)
        specs = jax.tree.map(lambda spec: P(MEMBERS if apart else None, *spec), specs, is_leaf=is_spec)
        return cls(tuple(jobs), slots, mesh, apart, subject, numbers, placed(shapes, specs, mesh))

    @cached_property
    def members(self) -> NamedSharding:
        """The place of an array `(slots, …)` that is small."""
        return NamedSharding(self.mesh, P(MEMBERS if self.apart else None))

    @cached_property
    def shared(self) -> NamedSharding:
        """The place of an array that all members use."""
        return NamedSharding(self.mesh, P())

    @cached_property
    def rates(self) -> np.ndarray:
        """Learning rates `(members, steps)`."""
        steps = np.arange(max(job.config.steps for job in self.jobs))
        found = [jax.vmap(schedule(job.config.optimizer, job.config.steps))(steps) for job in self.jobs]
        return np.stack([np.asarray(each, np.float32) for each in found])

    def own(self) -> dict[str, Any]:
        """What of the step's arguments differs between members and does not change: numbers, and rates by step."""
        varied = {str(place): leaf for place, leaf in enumerate(jax.tree.leaves(self.numbers)) if np.ndim(leaf)}
        host = {"rates": self.rates[list(self.slots)], "numbers": varied}
        return jax.device_put(host, self.members)

    def step(self) -> Callable[[TrainState, Tree, Batch, dict[str, Any], Any], tuple]:
        """`(state, base, batch, own, active) → (state, metrics)`, jitted, the state donated.

        Arrays of the batch are `(slots, micro-batches, examples, …)`; members that are not active stay as they are.
        """
        structure, leaves = jax.tree.structure(self.numbers), jax.tree.leaves(self.numbers)
        decays = decayed(one_of(self.state.trainable), self.subject.adapter)

        def one(state: TrainState, base: Tree, batch: Batch, own: dict[str, Any]) -> tuple[TrainState, dict]:
            known = [own["numbers"].get(str(place), leaf) for place, leaf in enumerate(leaves)]
            rate = lambda count: own["rates"][count]
            tx = chain(self.jobs[0].config.optimizer.name, rate, jax.tree.unflatten(structure, known), decays)
            return updated(self.subject, tx)(state, base, batch)

        def all_of(state: TrainState, base: Tree, batch: Batch, own: dict[str, Any], active: Any) -> tuple:
            new, metrics = jax.vmap(one, in_axes=(0, None, 0, 0))(state, base, batch, own)
            return chosen(active, new, state), metrics

        where = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        program = self._over_members(all_of, (True, False, True, True, True))
        return jax.jit(program, donate_argnums=0, out_shardings=(where, self.members))

    def evaluate(self) -> Callable[[TrainState, Tree, Batch], dict[str, Any]]:
        """`(state, base, batch) → sums` of each member on one batch `(1, examples, …)`, jitted."""
        each = jax.vmap(evaluated(self.subject), in_axes=(0, None, None))
        return jax.jit(self._over_members(each, (True, False, False)), out_shardings=self.members)

    def _over_members(self, function: Callable, split: tuple[bool, ...]) -> Callable:
        if not self.apart:
            return function
        specs = tuple(P(MEMBERS) if each else P() for each in split)
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=P(MEMBERS), check_vma=False)

    def place(self, batches: Sequence[Example]) -> Batch:
        """Each member's batch on the devices, in the order of members."""
        stacked = {name: np.stack([batches[slot][name] for slot in self.slots]) for name in batches[0]}
        where = self.members if self.apart else NamedSharding(self.mesh, P(None, None, BATCH_AXES))
        return jax.device_put(stacked, where)

    def flags(self, of_members: Sequence[bool]) -> jax.Array:
        """One truth a slot; False in those that only fill up."""
        filled = [of_members[slot] and place < len(self.jobs) for place, slot in enumerate(self.slots)]
        return jax.device_put(np.asarray(filled), self.members)

    def held_out(self, batch: Example) -> Batch:
        """A batch that all members are judged on, on the devices."""
        return jax.device_put(dict(batch), self.shared) if self.apart else self.jobs[0].place(batch)

    def base(self, base: Tree) -> Tree:
        """The frozen base, from where it was read to where the program needs it."""
        return jax.device_put(base, self.shared) if self.apart else base

    def stacked(self, joined: Sequence[Mapping[str, np.ndarray]]) -> TrainState:
        """States of all members on the devices, from what `joined` gives of each."""
        return self.on_devices({name: np.stack([flat[name] for flat in joined]) for name in joined[0]})

    def joined(self, job: Job, state: TrainState) -> dict[str, np.ndarray]:
        """One run's state in the common form, by path, on the host."""
        adapter = job.subject.adapter
        if adapter is not None and self.subject.adapter is not None and adapter.method != self.subject.adapter.method:
            joined = adapter.method.join(job.subject.adapter_of(state.trainable, state.frozen))
            state = dataclasses.replace(state, frozen=joined.frozen)
        flat = host(state)
        shapes = flatten(jax.eval_shape(raw, one_of(self.state)))
        return {path: filled_up(flat.get(path), like.shape, like.dtype) for path, like in shapes.items()}

    def on_devices(self, flat: Mapping[str, Any]) -> TrainState:
        """A state from arrays `(members or slots, …)` by path."""
        template = jax.eval_shape(raw, self.state)
        found = unflatten(template, {path: np.asarray(leaf)[list(self.slots)] for path, leaf in flat.items()}, "state")
        found = dataclasses.replace(found, key=jax.random.wrap_key_data(found.key))
        return jax.device_put(found, jax.tree.map(lambda leaf: leaf.sharding, self.state))

    def names(self) -> list[str]:
        """What each entry of a member's `metrics["finite"]` is about."""
        return leaf_names(self.state.trainable)


def alone(job: Job, flat: Mapping[str, Any], member: int) -> TrainState:
    """One run's state as by itself, from arrays `(members, …)` by path: without what filled it up."""
    template = jax.eval_shape(raw, job.state)
    cut = lambda leaf, shape: np.asarray(leaf)[(member, *(slice(0, size) for size in shape))]
    state = unflatten(template, {path: cut(flat[path], like.shape) for path, like in flatten(template).items()})
    state = dataclasses.replace(state, key=jax.random.wrap_key_data(jnp.asarray(state.key)))
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, job.state))


def tensors_of(subject: Subject, job: Job, mesh: Mesh) -> tuple[tuple, tuple]:
    """Shapes of what a member trains and of what is frozen beside it, and their specs."""
    adapter = subject.adapter
    if adapter is None:
        tensors = (job.state.trainable, {})
        return tensors, jax.tree.map(lambda leaf: leaf.sharding.spec, tensors)
    specs = adapter_specs(adapter, mesh)
    return (adapter.trainable, adapter.frozen), (specs.trainable, specs.frozen)


def numbers_of_all(jobs: Sequence[Job], slots: Sequence[int], paths: Sequence[str]) -> Numbers:
    """Numbers of several optimisers: a float where they agree, else an array `(slots,)`.

    Args:
      paths: of all that trains in one of them or another.
    """

    def of(job: Job) -> Numbers:
        numbers = numbers_of(job.config.optimizer, job.state.trainable, job.subject.adapter)
        return dataclasses.replace(numbers, relative={path: numbers.relative.get(path, 1.0) for path in paths})

    def one_or_all(*values: float) -> Any:
        return values[0] if len(set(values)) == 1 else np.asarray([values[slot] for slot in slots], np.float32)

    return jax.tree.map(one_or_all, *map(of, jobs))


def common(adapters: Sequence[Adapter]) -> Adapter:
    """Shapes of an adapter in whose form all of these can be written."""
    first = adapters[0]
    if all(adapter.method == first.method for adapter in adapters):
        return first
    joined = [jax.eval_shape(lambda each: each.method.join(each), adapter) for adapter in adapters]
    sites = {site.path: site for adapter in joined for site in adapter.sites}
    trainable, frozen = (union([getattr(each, part) for each in joined]) for part in ("trainable", "frozen"))
    return Adapter(trainable, frozen, joined[0].method, tuple(sites.values()))


def union(trees: Sequence[Any]) -> Any:
    """Nested dictionaries of shapes as one that has room for each: all keys, and the largest size along each axis."""
    if isinstance(trees[0], dict):
        keys = dict.fromkeys(key for tree in trees for key in tree)
        return {key: union([tree[key] for tree in trees if key in tree]) for key in keys}
    shape = tuple(max(sizes) for sizes in zip(*(tree.shape for tree in trees), strict=True))
    return jax.ShapeDtypeStruct(shape, trees[0].dtype)


def filled_up(leaf: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in the first corner of zeros; only zeros where it is None."""
    if leaf is not None and leaf.shape == shape:
        return np.asarray(leaf)
    room = np.zeros(shape, dtype)
    if leaf is not None:
        room[tuple(slice(0, size) for size in leaf.shape)] = leaf
    return room


def chosen(flags: Any, new: Tree, old: Tree) -> Tree:
    """Trees `(members, …)`: of each member the new one where its flag is set, else the old one."""
    pick = lambda new, old: jnp.where(flags.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
    return jax.tree.map(pick, new, old)


def one_of(tree: Tree) -> Tree:
    """Shapes `(members, …)` as those of one member."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)


def raw(state: TrainState) -> TrainState:
    """A state whose key is numbers."""
    return dataclasses.replace(state, key=jax.random.key_data(state.key))


def host(state: TrainState) -> dict[str, np.ndarray]:
    """A state's arrays by path, on the host."""
    return jax.device_get(flatten(raw(state)))


def is_whole(mesh: MeshConfig) -> bool:
    """Whether each member fits one device, as far as the config says: then members, not batches, lie over them."""
    return (mesh.fsdp, mesh.tensor) == (1, 1)


def place_of_one(config: RunConfig, devices: Sequence[Any]) -> tuple[RunConfig, Sequence[Any]]:
    """Config and devices of a run as those of one member, by itself."""
    if not is_whole(config.mesh):
        return config, devices
    return config.model_copy(update={"mesh": MeshConfig()}), devices[:1]
