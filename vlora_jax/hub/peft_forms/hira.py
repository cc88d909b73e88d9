"""HiRA: `hira_A (r, in)`, `hira_B (out, r)`, ours transposed; `hira_embedding_A`, `_B` of embeddings.

huggingface/peft, `tuners/hira`. Up to 0.21 it reads `rank_pattern` and does nothing with it: all ranks are `r`.
"""

from typing import Any

from pydantic import Field

from vlora_jax.adapters import hira
from vlora_jax.adapters.adapter import Adapter
from vlora_jax.errors import ConversionError
from vlora_jax.hub.peft_config import PeftConfig
from vlora_jax.hub.peft_forms.form import Form, Leaf, Place, Places, turned


class HiraConfig(PeftConfig):
    """PEFT's `HiraConfig`."""

    lacks = frozenset({"bias"})
    ignored = frozenset({"init_weights", "rank_pattern"})

    r: int = Field(32, gt=0)
    hira_dropout: float = Field(0.0, ge=0, lt=1)
    fan_in_fan_out: bool = False


def options(config: HiraConfig, places: Places) -> dict[str, Any]:
    return {"rank": config.r, "dropout": config.hira_dropout}


def fields(adapter: Adapter, places: Places, targets: list[str]) -> dict[str, Any]:
    ranks = {adapter.method.for_site(place.site).rank for place in places.values()}
    if len(ranks) > 1:
        raise ConversionError(
            f"hira: ranks are {sorted(ranks)}; PEFT has one for all modules, whatever rank_pattern says"
        )
    return {"r": ranks.pop(), "hira_dropout": adapter.method.dropout}


def leaves(method: hira.HiRA, config: HiraConfig, place: Place) -> dict[str, Leaf]:
    site = place.site
    kind = "hira_embedding" if site.kind == "embed" else "hira"
    return {f"{kind}_A": turned("a", (config.r, site.in_dim)), f"{kind}_B": turned("b", (site.out_dim, config.r))}


HIRA = Form(
    peft_type="HIRA",
    method=hira.HiRA,
    config=HiraConfig,
    options=options,
    fields=fields,
    leaves=leaves,
    embeddings=True,
)
