"""BitFit: biases only (arXiv 2106.10199)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlora_jax.adapters.selective import Selective
from vlora_jax.adapters.sites import Patterns

BIAS = re.compile(r"(^|_)bias$")


@dataclass(frozen=True, kw_only=True)
class BitFit(Selective):
    """Every bias of the base trained as it is, those of norms too; all else is frozen.

    A bias is a parameter called `bias` or `<something>_bias`, as Flax's layers and the models here have them. Llama and
    others have none, which is an error.

    Attributes:
      targets, exclude: which of them, as patterns over their paths or those of their modules; all by default. The
        paper also trains those of queries and of the MLP's first layer alone: `targets="q|up"`.
      full: what is trained whole beside them, such as a new head.
    """

    name = "bitfit"
    paper = "2106.10199"
    formula = "b trained"
    trains = "every bias"
    verified = "paper's counts, NumPy"
    default_rate = 3e-3

    targets: Patterns = ".*"

    def whole(self, leaves: Mapping[str, Any]) -> list[str]:
        return self.chosen([path for path in leaves if BIAS.search(path.rpartition("/")[2])], "biases", leaves)
