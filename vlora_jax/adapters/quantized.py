"""Kernels held in fewer bits under an adapter: 8-bit integers, or the 4-bit NormalFloats of QLoRA (arXiv 2305.14314).

In a parameter tree a `Quantized` stands where the kernel stood, and is one leaf for all that goes by path: it has the
kernel's shape and dtype. Layers decode it where they use it, in every forward and backward pass anew.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vlora_jax.errors import ConfigError

Form = Literal["int8", "nf4"]
BLOCKS = (64, 32, 16)  # inputs that share one scale in NF4: the first that divides a kernel's
INT8_BOUND = 127.5  # what the largest value of a channel becomes; it rounds to 127 or -128
# The 16 levels, arXiv 2305.14314, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A kernel `(…, in, out)`, or one of each layer, in fewer bits.

    Attributes:
      codes: of `"int8"` `(…, in, out)`, int8; of `"nf4"` `(…, in / 2, out)`, two in a uint8: within each block the
        first half of its inputs in the low bits, the second in the high ones.
      scale: float32, one for each output and all of its inputs `(…, 1, out)`, or for each block of them
        `(…, in / block, out)`.
      form: which of the two.
      dtype: of the values, as the kernel had it.
      closing: whether its layer ends a residual branch, which decides where it lies on a mesh.
    """

    codes: Any  # arrays; their shapes, and their places on a mesh, are held in the same form
    scale: Any
    form: Form = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})
    closing: bool = field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, rows, out = self.codes.shape
        return (*stack, rows if self.form == "int8" else 2 * rows, out)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def size(self) -> int:
        return self.codes.size * (1 if self.form == "int8" else 2)

    @property
    def grain(self) -> tuple[int, ...]:
        """The shape in units that must stay together when it is split over devices: blocks of inputs, and outputs."""
        return tuple((self.codes if self.form == "int8" else self.scale).shape)

    def __getitem__(self, index: Any) -> "Quantized":
        """One layer, or some; by their axis only."""
        return jax.tree.map(lambda part: part[index], self)

    def __jax_array__(self) -> Array:
        return self.values()  # for layers of others, which know arrays only

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.values(), dtype)

    def astype(self, dtype: Any) -> Array:
        """Its values, in a dtype."""
        return self.values().astype(dtype)

    def values(self) -> Float[Array, "*stack in out"]:
        """The kernel that it stands for: scale · code, in float32 and then in its dtype."""
        if self.form == "int8":
            return (self.codes.astype(jnp.float32) * self.scale).astype(self.dtype)
        *stack, blocks, out = self.scale.shape
        pairs = self.codes.reshape(*stack, blocks, -1, out)
        codes = jnp.concatenate([pairs & 15, pairs >> 4], axis=-2)
        return (levels(codes) * self.scale[..., None, :]).astype(self.dtype).reshape(self.shape)


def levels(codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The level of each NF4 code: a tree of choices, since a table's look-up is slow on TPUs and no SIMD on CPUs."""
    bits = [(codes & (8 >> place)) != 0 for place in range(4)]

    def choose(table: tuple[float, ...], depth: int) -> Any:
        if len(table) == 1:
            return jnp.float32(table[0])
        half = len(table) // 2
        return jnp.where(bits[depth], choose(table[half:], depth + 1), choose(table[:half], depth + 1))

    return choose(NF4, 0)


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def whole(leaf: Any) -> Any:
    """A leaf's values, whether it is quantised or not."""
    return leaf.values() if is_quantized(leaf) else leaf


def grain(leaf: Any) -> tuple[int, ...]:
    """What of each axis can be split over devices: see `Quantized.grain`; of an array its shape."""
    return leaf.grain if is_quantized(leaf) else tuple(leaf.shape)


def block_of(inputs: int) -> int | None:
    """Inputs that share one scale in NF4; None if a kernel of this many cannot be held so."""
    return next((block for block in BLOCKS if inputs % block == 0), None)


def checked(form: str) -> Form:
    """Raises ConfigError for what is no form."""
    if form not in get_args(Form):
        raise ConfigError(f"quantize {form!r} must be one of {', '.join(map(repr, get_args(Form)))}")
    return cast(Form, form)


def encode(kernel: Float[Array, "*stack in out"], form: Form, closing: bool = False) -> Quantized:
    """A kernel in fewer bits, each value the nearest there is; layer by layer, so that little memory is taken beside.

    `"int8"`: symmetric, the largest of a channel's inputs at 127.5. `"nf4"`: the largest of a block's inputs at ±1,
    the others at the nearest of the 16 quantiles of a normal distribution that arXiv 2305.14314 gives.

    Codes depend on products alone, which are the same on every kind of device; quotients are not, and a base that was
    held in other codes elsewhere would not be known again.

    Raises:
      ConfigError: the form is none of the two, or no block size divides the kernel's inputs.
    """
    one: Callable[[Array], tuple[Array, Array]] = _int8 if checked(form) == "int8" else _nf4
    if form == "nf4" and block_of(kernel.shape[-2]) is None:
        raise ConfigError(f"a kernel of {kernel.shape[-2]} inputs can't be held as nf4: no multiple of {BLOCKS[-1]}")
    flat = kernel.reshape(-1, *kernel.shape[-2:])
    parts = jax.lax.map(one, flat)
    codes, scale = (part.reshape(*kernel.shape[:-2], *part.shape[-2:]) for part in parts)
    return Quantized(codes, scale, form, kernel.dtype, closing)


def _int8(kernel: Array) -> tuple[Array, Array]:
    largest = jnp.abs(kernel).max(axis=0, keepdims=True).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest * (1 / INT8_BOUND), 1)
    near = jnp.round(kernel / scale)
    code = near + (kernel > (near + 0.5) * scale) - (kernel <= (near - 0.5) * scale)
    return code.clip(-128, 127).astype(jnp.int8), scale


def _nf4(kernel: Array) -> tuple[Array, Array]:
    inputs, out = kernel.shape
    blocks = kernel.reshape(-1, block_of(inputs) or 0, out)
    largest = jnp.abs(blocks).max(axis=1).astype(jnp.float32)
    scale = jnp.where(largest > 0, largest, 1)
    middles = [(low + high) / 2 for low, high in itertools.pairwise(NF4)]
    codes = sum((blocks > middle * scale[:, None]).astype(jnp.uint8) for middle in middles)
    low, high = jnp.split(codes, 2, axis=1)
    return (low | (high << 4)).reshape(-1, out), scale
