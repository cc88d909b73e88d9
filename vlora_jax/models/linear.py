"""The dense layer of all models here."""

from typing import Any, cast

from flax import nnx
from jaxtyping import Array, Float

from vlora_jax.adapters.quantized import Quantized, is_quantized
from vlora_jax.distributed.activations import gathered


class Linear(nnx.Linear):
    """`nnx.Linear` on activations flattened to `(tokens, features)`.

    XLA's CPU backend writes a transposed copy of the cotangent for products over three-dimensional activations.
    """

    def __call__(self, inputs: Float[Array, "*batch in"], out_sharding: Any = None) -> Float[Array, "*batch out"]:
        flat, stored = inputs.reshape(-1, inputs.shape[-1]), cast(Any, self.kernel.get_value())
        flat = self._decoded(flat, stored) if is_quantized(stored) else super().__call__(flat, out_sharding)
        return flat.reshape(*inputs.shape[:-1], self.out_features)

    def _decoded(self, flat: Float[Array, "tokens in"], stored: Quantized) -> Float[Array, "tokens out"]:
        bias = None if self.bias is None else self.bias.get_value()
        flat, kernel, bias = self.promote_dtype((flat, gathered(stored).values(), bias), dtype=self.dtype)
        y = flat @ kernel
        return y if bias is None else y + bias
