"""SpIEL: sparse fine-tuning whose places move (arXiv 2401.16405)."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.kept import times_built
from vlora_jax.adapters.method import Factors, Method, over_stack, site_key
from vlora_jax.adapters.options import check_least, check_steps
from vlora_jax.adapters.probe import measured
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree
from vlora_jax.adapters.view import Lookup
from vlora_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SpIEL(Method):
    """ΔW is φ at the k places η of a kernel and zero elsewhere: φ (k,) trains, η is kept as `i·out + o`.

    φ starts at zero at places drawn (almost) uniformly, in order. Each `every` steps the places move by the paper's AG
    rule. From the first step, and from each step t with t mod every = 0, it collects: that step's first micro-batch
    names as candidates the k places where the slope of the whole kernel is largest, and the following steps add their
    slopes there up. After the step with t mod every = collect, the n = ⌊k·p(t)⌋ smallest |φ| are dropped, and in their
    places go the candidates, not in η, of the largest sum, φ = 0; a place that would go and come back stays
    as it is. p is 1 at first, then falls from `reselect` to 0 as `schedule` says.

    Where the optimiser is Adam, a new entry's moments start so that their corrected values are the mean and mean square
    of the collected slopes; those of Lion and momentum start at zero. The authors' optimiser keeps an age for each
    entry, so that a new one forgets this start within its first steps; here it weighs as much as an old entry's past.
    Theirs counts the candidates' slopes in the naming step too, one micro-batch at a time; here whole steps count.
    The paper's MA rule, which grows by row and column sums that its own optimiser (SM3) keeps, is not here.

    A step builds ΔW, in·out numbers of one layer at a time, and the slope of the whole kernel, which is where
    the gradient of φ comes from; the search for the largest runs in naming steps only. Only k numbers a layer are kept.

    Attributes:
      density: k as a share of a kernel's entries, at least 1 (the authors' share is of the whole model).
      number: if not 0, all k together; a kernel gets its share by size.
      every, collect: R and S.
      reselect: share of the places that may move at the start (the first time all may).
      schedule: of that share; `"linear"`: reselect·(1 − t/T), `"cosine"`: reselect·(1 + cos(πt/T))/2.
      steps: length T of the run; 0: that of the run it is used in.
      b1, b2: of the run's Adam, for the moments of new entries.
    """

    name = "spiel"
    decays = frozenset({"values"})
    paper = "2401.16405"
    formula = "ΔW = φ at places η"
    trains = "k"
    size = "number"
    vertical = False
    verified = "NumPy"
    cost = "builds ΔW, forward and backward, and takes the slope of all its entries"
    default_rate = 3e-3
    aside = Method.aside | {"every", "collect", "reselect", "schedule", "steps", "b1", "b2"}

    density: float = 0.01
    number: int = 0
    every: int = 20
    collect: int = 5
    reselect: float = 0.2
    schedule: Literal["linear", "cosine"] = "linear"
    steps: int = 0
    b1: float = 0.9
    b2: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.density <= 1.0:
            raise ConfigError(f"spiel: density is {self.density}; it must be above 0 and at most 1")
        if not 2 <= self.collect < self.every:
            raise ConfigError(f"spiel: collect is {self.collect}; it must be from 2 to below every, {self.every}")
        for field in ("b1", "b2", "reselect"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ConfigError(f"spiel: {field} is {getattr(self, field)}; it must be from 0 to 1")
        for field in ("number", "steps"):
            check_least(f"spiel: {field}", getattr(self, field), 0)

    def counts(self, sites: list[Site]) -> dict[str, int]:
        """K of one layer of each site.

        Raises:
          ConfigError: more than there are entries, or a kernel too large for 32-bit places.
        """
        sizes = {site.path: site.in_dim * site.out_dim for site in sites}
        total = sum(site.layers * sizes[site.path] for site in sites)
        share = lambda size: int(self.number * size / total) if self.number else int(self.density * size)
        for path, size in sizes.items():
            if size >= 2**31:
                raise ConfigError(f"spiel: {path} has {size} entries, 2³¹ or more; exclude it")
            if share(size) > size:
                raise ConfigError(
                    f"spiel: number {self.number} is above the {total} entries of the adapted kernels; lower it"
                )
        return {path: max(1, share(size)) for path, size in sizes.items()}

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        trainable, frozen, counts = {}, {}, self.counts(sites)
        for site in sites:
            size, k = site.in_dim * site.out_dim, counts[site.path]
            keys = jax.random.split(site_key(key, site.path), site.stack)
            factors = over_stack(lambda key: self.start(key, size, k), len(site.stack))(keys)  # noqa: B023
            trainable[site.path], frozen[site.path] = factors.trainable, factors.frozen
        return Adapter.of(self, sites, trainable=trainable, frozen=frozen)

    def start(self, key: PRNGKeyArray, size: int, k: int) -> Factors:
        """One layer: k places out of `size`, each once, without a table of them all."""
        index = jnp.sort(jax.random.randint(key, (k,), 0, size - k + 1)) + jnp.arange(k)
        none, zero = jnp.zeros(()), jnp.zeros(k)
        return Factors(
            {"values": zero}, {"index": index, "candidate": index, "sum": zero, "square": zero, "number": none}
        )

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Float[Array, "tokens out"]:
        def change(kernel: Array, factors: FactorDict) -> Any:
            if "first" not in factors:
                return self.delta(kernel, factors)
            probe = {name: factors[name] for name in ("first", "slope", "place")}
            return measured(look, self.delta(kernel, factors), probe, factors["candidate"])

        if isinstance(x, Lookup):
            return x @ change(kernel, factors).astype(y.dtype)
        return times_built(change, x, kernel, factors)

    def delta(self, kernel: Array, factors: FactorDict) -> Float[Array, "in out"]:
        rows, columns = jnp.divmod(factors["index"], kernel.shape[-1])
        return jnp.zeros(kernel.shape[-2:], jnp.float32).at[rows, columns].add(factors["values"])

    def names(self, t: Array) -> Array:
        """Whether step t, counted from 1, names candidates."""
        return (t == 1) | (t % self.every == 0)

    def amounts(self, k: int) -> list[int]:
        """N of every selection in turn, at t = collect, collect + every, …"""
        found = [k]
        for t in range(self.collect + self.every, self.steps + 1, self.every):
            left = 1 - t / self.steps
            if self.schedule == "cosine":
                left = (1 + math.cos(math.pi * t / self.steps)) / 2
            found.append(int(k * self.reselect * left))
        return found

    def probe(self, step: Array, adapter: Adapter) -> dict[str, FactorDict]:
        first = self.names(step + 1).astype(jnp.float32)
        sites = {}
        for path, factors in adapter.trainable["sites"].items():
            none = jnp.zeros_like(factors["values"])
            sites[path] = {
                "first": jnp.broadcast_to(first, none.shape[:-1]),
                "slope": none,
                "place": jnp.stack([none, none], axis=-2),
            }
        return sites

    def advance(self, step: Array, adapter: Adapter, grads: Tree, opt_state: Tree) -> tuple[Adapter, Tree]:
        check_steps(self.name, self.steps)
        t, seen = step + 1, grads["probe"]
        states = {}
        for site in adapter.sites:
            one, own = seen["sites"][site.path], adapter.frozen["sites"][site.path]
            place = one["place"].astype(jnp.int32)  # rows and columns: a flat place may be too large for a float
            named = place[..., 0, :] * site.out_dim + place[..., 1, :]
            slope, keep = one["slope"] / seen["weight"], jnp.where(self.names(t), 0.0, 1.0)
            states[site.path] = {
                "index": own["index"],
                "candidate": jnp.where(self.names(t), named, own["candidate"]),
                "sum": keep * (own["sum"] + slope),
                "square": keep * (own["square"] + slope**2),
                "number": keep * (own["number"] + 1),
            }
        names = [name for name in ("mu", "nu", "trace") if optax.tree.get(opt_state, name) is not None]
        moments = {name: optax.tree.get(opt_state, name) for name in names}
        inside = (adapter.trainable["sites"], states, {name: m["sites"] for name, m in moments.items()})
        move = lambda inside: self.move(t, adapter.sites, *inside)
        sites, states, new = jax.lax.cond(t % self.every == self.collect, move, lambda inside: inside, inside)
        moments = {name: moment | {"sites": new[name]} for name, moment in moments.items()}
        if moments:
            opt_state = optax.tree.set(opt_state, **moments)
        adapter = dataclasses.replace(adapter, frozen=adapter.frozen | {"sites": states})
        return adapter.with_trainable(adapter.trainable | {"sites": sites}), opt_state

    def move(self, t: Array, sites: tuple[Site, ...], trained: Tree, states: Tree, moments: Tree) -> tuple:
        """Values, state and moments of all sites with their places chosen anew after step t."""
        trained, states = dict(trained), dict(states)
        moments = {name: dict(moment) for name, moment in moments.items()}
        for site in sites:
            path, values = site.path, trained[site.path]["values"]
            amounts = jnp.array(self.amounts(values.shape[-1]))
            amount = amounts[jnp.minimum((t - self.collect) // self.every, len(amounts) - 1)]
            own = {name: moment[path]["values"] for name, moment in moments.items()}
            move = over_stack(functools.partial(self.move_layer, t, amount), len(site.stack))
            values, states[path], own = move(values, states[path], own)
            trained[path] = {"values": values}
            for name, moment in own.items():
                moments[name][path] = {"values": moment}
        return trained, states, moments

    def move_layer(
        self, t: Array, amount: Array, values: Float[Array, " k"], state: FactorDict, moments: FactorDict
    ) -> tuple[Array, FactorDict, FactorDict]:
        """The same of one layer; at most `amount` entries move."""
        slots, sources, moves = exchange(amount, values, state["index"], state["candidate"], state["sum"])
        slots, zero, number = (
            jnp.where(moves, slots, values.size),
            jnp.zeros_like(values),
            jnp.maximum(state["number"], 1),
        )
        put = lambda old, new: old.at[slots].set(new, mode="drop")
        fresh = dict.fromkeys(moments, zero)
        if "nu" in moments:
            fresh["mu"] = (1 - self.b1**t) * (state["sum"] / number)[sources]
            fresh["nu"] = (1 - self.b2**t) * (state["square"] / number)[sources]
        state = state | {"index": put(state["index"], state["candidate"][sources])}
        return put(values, zero), state, {name: put(moments[name], fresh[name]) for name in moments}


def look(slope: Float[Array, "in out"], probe: FactorDict, candidate: Int[Array, " k"]) -> FactorDict:
    """What is seen of a kernel's slope: its values at the candidates, and where it is largest if that is asked for."""
    flat = slope.reshape(-1)

    def largest() -> Float[Array, "2 k"]:
        places = jax.lax.top_k(jnp.abs(flat), candidate.size)[1]
        return jnp.stack(jnp.divmod(places, slope.shape[1])).astype(jnp.float32)

    place = jax.lax.cond(probe["first"] > 0, largest, lambda: jnp.zeros_like(probe["place"]))
    return {"first": jnp.zeros_like(probe["first"]), "slope": flat[candidate], "place": place}


def exchange(
    amount: Int[Array, ""],
    values: Float[Array, " k"],
    index: Int[Array, " k"],
    candidate: Int[Array, " k"],
    total: Float[Array, " k"],
) -> tuple[Int[Array, " k"], Int[Array, " k"], Array]:
    """Which entries give way to which candidates.

    Args:
      amount: how many may, at most.
      total: sum of each candidate's slopes.

    Returns:
      Entries and candidates that change places, in order, and which of these pairs count; an entry k is none.
    """
    k, places = values.size, jnp.arange(values.size)
    first = lambda order: jnp.zeros(k, bool).at[order].set(places < amount)

    def in_order(order: Int[Array, " k"], chosen: Array) -> Int[Array, " k"]:
        taken = chosen[order]
        return jnp.full(k, k, jnp.int32).at[jnp.where(taken, taken.cumsum() - 1, k)].set(order, mode="drop")

    by_place = index.argsort()
    entry = by_place[jnp.minimum(jnp.searchsorted(index[by_place], candidate), k - 1)]
    there = index[entry] == candidate  # then `entry` is the one at the candidate's place
    smallest = jnp.abs(values).argsort()
    dropped = first(smallest)
    valid = ~there | dropped[entry]
    largest = jnp.where(valid, -jnp.abs(total), jnp.inf).argsort()
    grown = valid & first(largest)
    again = jnp.zeros(k, bool).at[entry].max(grown & there)
    leave, enter = dropped & ~again, grown & ~there
    return in_order(smallest, leave), in_order(largest, enter), places < jnp.minimum(leave.sum(), enter.sum())
