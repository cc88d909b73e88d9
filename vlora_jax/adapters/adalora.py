"""AdaLoRA: a budget of ranks that moves to where it matters (arXiv 2303.10512)."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Factors
from vlora_jax.adapters.options import check_least, check_rank, check_steps
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree
from vlora_jax.adapters.triplets import Triplets, orthogonality
from vlora_jax.errors import ConfigError

FACTORS = ("a", "e", "b")
MEMORY = frozenset(("alive", *(f"{name}_{what}" for name in FACTORS for what in ("mean", "spread"))))


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Triplets):
    """ΔW = s·A diag(e) B with s = alpha / (rank + 1e-5); each entry of e stands for a triplet (A[:, k], e_k, B[k, :]).

    A and B are normal with deviation 0.02, e is zero. A penalty keeps A and B near orthonormal. After every step the
    triplets are scored, and at the schedule's times e is set to zero in all but the best `budget` triplets of the
    whole model; A, B and the optimiser's moments stay, so that a triplet may come back until the budget is final.

    Attributes:
      rank: triplets of each layer at the start (PEFT's `init_r`).
      target_rank: triplets a layer at the end, on average (PEFT's `target_r`).
      alpha: numerator of s; 0: the rank. s stays as it is, however many triplets are left.
      dropout: share of A's inputs that is dropped in training.
      steps: length T of the run; 0: that of the run it is used in.
      warmup: first steps t_i without a cut.
      final: last steps t_f with the final budget and a fixed choice.
      interval: steps ΔT between two choices; between them e is free.
      mean_decay, spread_decay: β1 of the importance's running mean, β2 of its uncertainty (equations 9 and 10).
      orthogonality: weight γ of the penalty.
      penalty_form: `"norm"` is the code's, a mean of ‖AᵀA − I‖ and ‖BBᵀ − I‖; `"square"` the paper's, a sum of squares.

    After step t the importance of an entry w with gradient g is I = |w·g|, its mean Ī ← β1·Ī + (1 − β1)·I, its
    uncertainty U ← β2·U + (1 − β2)·|I − Ī|, and a triplet's score the Ī·U of e_k plus the means of Ī·U over A[:, k] and
    over B[k, :]. With f = 1 − (t − t_i) / (T − t_f − t_i) the budget of N layers is N·rank until t_i, then
    ⌊N·(rank − target_rank)·f³ + N·target_rank⌋ (as in the code; the paper's numerator is a misprint). g is the
    gradient with the penalty's, before clipping. Of equal scores at the threshold all are cut, as in PEFT.
    """

    name = "adalora"
    decays = frozenset({"a", "b"})
    paper = "2303.10512"
    formula = "ΔW = s·A diag(e) B"
    trains = "r·(in + out + 1)"
    vertical = False
    verified = "PEFT"
    peft = "ADALORA"
    default_rate = 1e-2
    memory = MEMORY
    aside = Triplets.aside | {
        "target_rank", "steps", "warmup", "final", "interval", "mean_decay", "spread_decay", "orthogonality",
        "penalty_form",
    }  # fmt: skip

    rank: int = 12
    target_rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    steps: int = 0
    warmup: int = 0
    final: int = 0
    interval: int = 1
    mean_decay: float = 0.85
    spread_decay: float = 0.85
    orthogonality: float = 0.5
    penalty_form: Literal["norm", "square"] = "norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"rank": 1, "target_rank": 1, "alpha": 0, "steps": 0, "warmup": 0, "final": 0, "interval": 1}
        for field, value in (least | {"orthogonality": 0}).items():
            check_least(f"adalora: {field}", getattr(self, field), value)
        for field in ("dropout", "mean_decay", "spread_decay"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ConfigError(f"adalora: {field} is {getattr(self, field)}; it must be at least 0 and below 1")
        if self.target_rank > self.rank:
            raise ConfigError(f"adalora: target_rank {self.target_rank} is above the rank {self.rank} at the start")
        if self.steps and self.warmup >= self.steps - self.final:
            raise ConfigError(
                f"adalora: warmup {self.warmup} and final {self.final} leave none of {self.steps} steps to cut ranks in"
            )

    @property
    def scale(self) -> float:
        return (self.alpha or self.rank) / (self.rank + 1e-5)

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        for site in sites:
            check_rank(self.name, self.rank, site)
        return super().init(key, sites, base)

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        key_a, key_b = jax.random.split(key)
        trainable = {
            "a": 0.02 * jax.random.normal(key_a, (site.in_dim, self.rank)),
            "e": jnp.zeros(self.rank),
            "b": 0.02 * jax.random.normal(key_b, (self.rank, site.out_dim)),
        }
        seen = {f"{name}_{what}": jnp.zeros_like(trainable[name]) for name in FACTORS for what in ("mean", "spread")}
        return Factors(trainable, seen | {"alive": jnp.ones(self.rank)})

    def gain(self, factors: FactorDict) -> Float[Array, " r"]:
        return self.scale * factors["e"]

    def penalty(self, adapter: Adapter) -> Array | float:
        return self.orthogonality * orthogonality(adapter, self.penalty_form)

    def budget(self, step: int, layers: int) -> int:
        """How many triplets of all `layers` there are after a step; steps count from 1."""
        first, last = layers * self.rank, layers * self.target_rank
        if step <= self.warmup:
            return first
        if step > self.steps - self.final:
            return last
        left = 1 - (step - self.warmup) / (self.steps - self.final - self.warmup)
        return int((first - last) * left**3 + last)

    def advance(self, step: Array, adapter: Adapter, grads: Tree, opt_state: Tree) -> tuple[Adapter, Tree]:
        check_steps(self.name, self.steps)
        t, end = step + 1, self.steps - self.final
        trained, states = adapter.trainable["sites"], adapter.frozen["sites"]
        seen = {path: self.observe(trained[path], grads["sites"][path], states[path]) for path in trained}
        seen = jax.tree.map(lambda new, old: jnp.where(t < end, new, old), seen, states)
        scores = {path: self.scores(state) for path, state in seen.items()}

        layers = sum(site.layers for site in adapter.sites)
        budgets = jnp.array([self.budget(each, layers) for each in range(self.steps + 1)])
        surplus = layers * self.rank - budgets[jnp.minimum(t, self.steps)]
        ranked = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores.values()]))
        threshold = jnp.where(surplus > 0, ranked[jnp.maximum(surplus, 1) - 1], -jnp.inf)

        chooses = (t == end) | ((t < end) & (t > self.warmup) & (t % self.interval == 0))
        sites, frozen = {}, {}
        for path, state in seen.items():
            alive = jnp.where(chooses, (scores[path] > threshold).astype(jnp.float32), state["alive"])
            cut = trained[path]["e"] * jnp.where(chooses | (t > end), alive, 1.0)
            sites[path] = trained[path] | {"e": cut}
            over = {name: jnp.where(t < end, value, 0.0) for name, value in state.items() if name != "alive"}
            frozen[path] = over | {"alive": alive}
        adapter = dataclasses.replace(adapter, frozen=adapter.frozen | {"sites": frozen})
        return adapter.with_trainable(adapter.trainable | {"sites": sites}), opt_state

    def exported(self, adapter: Adapter) -> Adapter:
        """The same change, with nothing left of the triplets that are cut: A and B are zero where e is."""
        sites = {}
        for path, own in adapter.trainable["sites"].items():
            kept = (adapter.frozen["sites"][path]["alive"] != 0) | (own["e"] != 0)
            sites[path] = own | {"a": own["a"] * kept[..., None, :], "b": own["b"] * kept[..., :, None]}
        return adapter.with_trainable(adapter.trainable | {"sites": sites})

    def observe(self, values: FactorDict, grads: FactorDict, state: FactorDict) -> FactorDict:
        """The state of a site with one step's importance in it."""
        new = {}
        for name in FACTORS:
            importance = jnp.abs(values[name] * grads[name])
            mean = self.mean_decay * state[f"{name}_mean"] + (1 - self.mean_decay) * importance
            away = jnp.abs(importance - mean)
            new[f"{name}_mean"] = mean
            new[f"{name}_spread"] = self.spread_decay * state[f"{name}_spread"] + (1 - self.spread_decay) * away
        return state | new

    def scores(self, state: FactorDict) -> Float[Array, "*stack r"]:
        """How much every triplet of a site matters."""
        entry = {name: state[f"{name}_mean"] * state[f"{name}_spread"] for name in FACTORS}
        return entry["e"] + entry["a"].mean(-2) + entry["b"].mean(-1)
