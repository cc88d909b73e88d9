"""A single matrix, all zeros: what an adapter makes of it is its change alone."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import BaseModel, ConfigDict, PositiveInt

from vlora_jax.models.linear import Linear


class MatrixConfig(BaseModel):
    """A matrix that is learnt entry by entry."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    family: Literal["matrix"] = "matrix"
    rows: PositiveInt = 100
    columns: PositiveInt = 100
    vertical: None = None  # what other models can have, and what is told of all
    layers: Literal[1] = 1
    remat: Literal["none"] = "none"
    dtype: Literal["float32"] = "float32"
    param_dtype: Literal["float32"] = "float32"

    @property
    def width(self) -> int:
        """Of the only layer."""
        return self.columns


class Matrix(nnx.Module):
    """Rows of a kernel `(rows, columns)`, as a dense layer of one-hot inputs, which every method can adapt."""

    def __init__(self, config: MatrixConfig, rngs: nnx.Rngs):
        self.config = config
        self.entries = Linear(
            config.rows, config.columns, use_bias=False, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )

    def __call__(self, rows: Int[Array, "*batch"], *, train: bool = False, **_: Any) -> Float[Array, "*batch columns"]:
        """The rows with these numbers."""
        return self.entries(jax.nn.one_hot(rows, self.config.rows, dtype=jnp.float32))
