"""Chosen rows of an embedding trained whole: new or special tokens (PEFT's `trainable_token_indices`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import FactorDict
from vlora_jax.adapters.method import Factors, SiteMethod
from vlora_jax.adapters.options import check_type
from vlora_jax.adapters.sites import Patterns, Site
from vlora_jax.adapters.view import Lookup
from vlora_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TokenRows(SiteMethod):
    """W'[indices] = R: trained rows take the place of the base's, from which they start.

    Of a dense kernel the rows are those of its inputs.

    Attributes:
      indices: which rows, each once.
    """

    name = "token_rows"
    paper = "none"
    formula = "W'[indices] = R"
    trains = "indices · out"
    vertical = False
    verified = "PEFT"
    peft = "TRAINABLE_TOKENS"
    reads_base = True

    targets: Patterns = "embeddings"
    indices: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.indices, tuple):
            raise ConfigError(f"token_rows: indices is {self.indices!r}; it must be a list of whole numbers")
        for index in self.indices:
            check_type("token_rows: an entry of indices", index, int)
            if index < 0:
                raise ConfigError(f"token_rows: indices has {index}; rows count from 0")
        if len(set(self.indices)) < len(self.indices):
            raise ConfigError("token_rows: indices has a row twice")

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        if not self.indices:
            raise ConfigError("token_rows: indices is empty, so that nothing would be trained; name rows of targets")
        last = max(self.indices)
        if last >= site.in_dim:
            raise ConfigError(f"token_rows: indices has {last}; {site.path} has {site.in_dim} rows")
        if kernel is None:
            raise ConfigError("token_rows: the start needs the base's values")
        return Factors({"rows": kernel[np.array(self.indices)].astype(jnp.float32)})

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Float[Array, "tokens out"]:
        rows, chosen = factors["rows"], np.array(self.indices)
        if isinstance(x, Lookup):
            places = np.full(kernel.shape[0], -1, np.int32)
            places[chosen] = np.arange(len(chosen))
            place = jnp.asarray(places)[x.ids]
            return jnp.where(place[:, None] >= 0, rows[place].astype(y.dtype) - y, 0)
        return x[:, chosen] @ (rows - kernel[chosen]).astype(x.dtype)

    def delta(self, kernel: Array, factors: FactorDict) -> Float[Array, "in out"]:
        chosen = np.array(self.indices)
        change = factors["rows"] - kernel[chosen]
        return jnp.zeros(kernel.shape, jnp.float32).at[chosen].set(change)
