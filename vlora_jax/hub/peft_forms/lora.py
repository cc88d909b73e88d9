"""LoRA and DoRA, with PEFT's rank-stabilised scale, biases of B, patterns, and PiSSA and OLoRA starts.

PEFT's matrices are ours transposed: `lora_A (r, in)`, `lora_B (out, r)`. huggingface/peft, `tuners/lora`.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.dora import DoRA
from vlora_jax.adapters.kernel_start import doubled_alpha
from vlora_jax.adapters.lora import LoRA
from vlora_jax.adapters.method import over_stack
from vlora_jax.adapters.sites import Site
from vlora_jax.errors import AdapterFileError
from vlora_jax.hub.peft_config import PeftConfig, check_patterns, pattern_value
from vlora_jax.hub.peft_forms.form import Form, Leaf, Place, Places, plain, reshaped
from vlora_jax.hub.peft_modules import Modules
from vlora_jax.hub.peft_starts import converted

SWITCHES = """
    alora_invocation_tokens layer_replication target_parameters use_qalora use_bdlora kasa_config monteclora_config
    velora_config arrow_config megatron_config
""".split()  # noqa: SIM905
ASIDE = """
    megatron_core loftq_config eva_config corda_config lora_ga_config qalora_group_size runtime_config
""".split()  # noqa: SIM905
KEEPING_STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")  # of A and B that leave the base as it is


class LoraConfig(PeftConfig):
    """PEFT's `LoraConfig`."""

    unsupported = frozenset(SWITCHES)
    ignored = frozenset(ASIDE)
    only = "lora_only"

    r: int = Field(8, gt=0)
    lora_alpha: float = 8.0
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    fan_in_fan_out: bool = False

    @property
    def start(self) -> str | None:
        """`"pissa"` or `"olora"`, where PEFT takes a start off the base when it loads the file; else None."""
        return str(self.init_lora_weights).lower() if self.init_lora_weights not in KEEPING_STARTS else None

    def fault(self) -> str | None:
        alphas = {f"alpha_pattern[{pattern!r}]": alpha for pattern, alpha in (self.alpha_pattern or {}).items()}
        for where, alpha in ({"lora_alpha": self.lora_alpha} | alphas).items():
            if not math.isfinite(alpha) or alpha == 0:
                return f"{where} is {alpha}; it must be finite and not 0"
        for pattern, rank in (self.rank_pattern or {}).items():
            if rank <= 0:
                return f"rank_pattern[{pattern!r}] is {rank}; it must be at least 1"
        if self.lora_bias and self.use_dora:
            return "lora_bias and use_dora exclude each other"
        if self.start not in (None, "pissa", "olora"):
            return (
                f"init_lora_weights is {self.init_lora_weights!r}, a start that the file does not hold and the base "
                f"does not give; let PEFT convert it: "
                f"save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        return super().fault()


def rank_of(config: LoraConfig, place: Place) -> int:
    return pattern_value(config.rank_pattern, place.name, config.r, "rank_pattern")


def alpha_of(config: LoraConfig, place: Place) -> float:
    return pattern_value(config.alpha_pattern, place.name, config.lora_alpha, "alpha_pattern")


def options(config: LoraConfig, places: Places) -> dict[str, Any]:
    """Layers that are not adapted have rank 0; a PiSSA or OLoRA start doubles rank and alpha."""
    check_patterns("rank_pattern", config.rank_pattern, places)
    check_patterns("alpha_pattern", config.alpha_pattern, places)
    doubled = config.start is not None
    rank = 2 * config.r if doubled else config.r
    alpha = doubled_alpha(config.lora_alpha, config.use_rslora) if doubled else config.lora_alpha
    ranks, alphas = {}, {}
    for place in places.values():
        layers = place.site.layers
        of_site = ranks.setdefault(place.pattern, [0] * layers), alphas.setdefault(place.pattern, [alpha] * layers)
        twice = doubled and place.site.kind != "embed"  # PEFT starts embeddings as ever
        one = alpha_of(config, place)
        of_site[0][place.layer or 0] = rank_of(config, place) * (2 if twice else 1)
        of_site[1][place.layer or 0] = doubled_alpha(one, config.use_rslora) if twice else one
    return {
        "method": (DoRA if config.use_dora else LoRA).name,
        "rank": rank,
        "alpha": alpha,
        "rank_stabilised": config.use_rslora,
        "dropout": config.lora_dropout,
        "rank_pattern": varying(ranks, rank),
        "alpha_pattern": varying(alphas, alpha),
        "bias": config.lora_bias,
    }


def varying(table: Mapping[str, list], default: float) -> dict[str, Any]:
    """The sites whose value is not the default, with a list where layers differ."""
    each = {pattern: values[0] if len(set(values)) == 1 else values for pattern, values in table.items()}
    return {pattern: value for pattern, value in each.items() if value != default}


def fields(adapter: Adapter, places: Places, targets: list[str]) -> dict[str, Any]:
    method: LoRA = adapter.method
    layers = {place.name: method.by_layer(place.site)[place.layer or 0] for place in places.values()}
    rank, alpha = (common(each[column] for each in layers.values()) for column in (0, 1))
    if (method.rank, method.alpha) in layers.values():
        rank, alpha = method.rank, method.alpha
    return {
        "r": rank,
        "lora_alpha": plain(alpha),
        "lora_dropout": method.dropout,
        "use_rslora": method.rank_stabilised,
        "use_dora": isinstance(method, DoRA),
        "lora_bias": method.bias,
        "init_lora_weights": True,
        "rank_pattern": {name: r for name, (r, _) in sorted(layers.items()) if r != rank},
        "alpha_pattern": {name: plain(a) for name, (_, a) in sorted(layers.items()) if a != alpha},
    }


def common(values: Iterable[Any]) -> Any:
    """The most frequent value, the smallest of several."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def leaves(method: LoRA, config: LoraConfig, place: Place) -> dict[str, Leaf]:
    """Ours are as wide as the widest layer of a site; files have each layer's rank."""
    site, rank = place.site, rank_of(config, place)
    conv = len(place.shape) == 4
    side = (rank, *place.shape[2:], place.shape[1])  # of A in files of convolutions, channels last
    of_a = lambda a: a.reshape(side).transpose(0, 3, 1, 2) if conv else a
    as_a = lambda a: a.transpose(0, 2, 3, 1).reshape(rank, -1) if conv else a
    a = Leaf(
        "a",
        (rank, *place.shape[1:]) if conv else (rank, site.in_dim),
        lambda a: of_a(a[:, :rank].T),
        lambda a: np.pad(as_a(a).T, ((0, 0), (0, method.rank - rank))),
    )
    b = Leaf(
        "b",
        (site.out_dim, rank, 1, 1) if conv else (site.out_dim, rank),
        lambda b: b[:rank].T.reshape(b.shape[1], rank, 1, 1) if conv else b[:rank].T,
        lambda b: np.pad(b.reshape(b.shape[:2]).T, ((0, method.rank - rank), (0, 0))),
    )
    embed = site.kind == "embed"
    found = {"lora_embedding_A": a, "lora_embedding_B": b} if embed else {"lora_A.weight": a, "lora_B.weight": b}
    if config.lora_bias:
        found["lora_B.bias"] = Leaf("bias", (site.out_dim,))
    if config.use_dora:
        magnitude = (1, site.out_dim, 1, 1) if conv else (site.out_dim,)
        found["lora_magnitude_vector"] = reshaped("m", magnitude, (site.out_dim,))
    return found


def blank(method: LoRA, sites: Sequence[Site], leaves: Mapping[str, Any]) -> Adapter:
    """A and B zero, with the gains and DoRA's magnitudes that layers need; a rank may be above a kernel's side."""
    trainable, frozen = {}, {}
    for site in sites:
        own, layers = method.for_site(site), method.by_layer(site)
        shapes = {"a": (site.in_dim, own.rank), "b": (own.rank, site.out_dim)}
        shapes |= {"bias": (site.out_dim,)} if method.bias else {}
        factors = {name: jnp.zeros((*site.stack, *shape)) for name, shape in shapes.items()}
        if isinstance(own, DoRA):
            factors["m"] = over_stack(own.norm, len(site.stack))(site.read(dict(leaves)), factors)
        trainable[site.path] = factors
        frozen[site.path] = {"gain": method.gain(site)} if len(set(layers)) > 1 else {}
    return Adapter.of(method, list(sites), trainable=trainable, frozen=frozen)


def adapted(adapter: Adapter, place: Place) -> bool:
    return adapter.method.by_layer(place.site)[place.layer or 0][0] > 0


def finish(adapter: Adapter, config: LoraConfig, places: Places, modules: Modules) -> Adapter:
    """With the start that PEFT takes off the base, as further columns of A and rows of B."""
    if config.start is None:
        return adapter
    sites = jax.tree.map(np.array, adapter.trainable["sites"])
    for place in places.values():
        if place.site.kind == "embed":
            continue
        if len(place.shape) == 4 or (config.start == "olora" and place.as_is):
            raise AdapterFileError(f"{place.name}: a {config.start} start is not defined for this kind of layer")
        rank, alpha = rank_of(config, place), alpha_of(config, place)
        own, layer = sites[place.site.path], ... if place.layer is None else place.layer
        a, b = own["a"][layer], own["b"][layer]
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        kernel = modules.matrix(place.site, place.layer)
        a[:, : 2 * rank], b[: 2 * rank] = converted(config.start, kernel, a[:, :rank], b[:rank], scale)
    return adapter.with_trainable(adapter.trainable | {"sites": sites})


def about(fields: Mapping[str, Any]) -> str:
    stabilised = ", divided by the root of the rank" if fields["use_rslora"] else ""
    return f"Rank {fields['r']}, alpha {fields['lora_alpha']}{stabilised}"


LORA = Form(
    peft_type="LORA",
    method=LoRA,
    config=LoraConfig,
    options=options,
    fields=fields,
    leaves=leaves,
    when=lambda config: not config.use_dora,
    start=blank,
    adapted=adapted,
    finish=finish,
    about=about,
    embeddings=True,
    patches=True,
)
DORA = dataclasses.replace(LORA, method=DoRA, when=lambda config: config.use_dora)
