"""Linen models as other people write them: Flax's own layers only, nothing of this library."""

import jax.numpy as jnp
from flax import linen as nn
from third_party import TOKENS, X


class Tied(nn.Module):
    """A token embedding that is the output head too."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4, name="embed")
        return embed.attend(nn.Dense(4, name="mix")(embed(tokens)))


class ByName(nn.Module):
    """Layers called by keyword."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="out")(inputs=nn.DenseGeneral((2, 3), name="wide")(inputs=x).reshape(2, 3, 6))


class Attention(nn.Module):
    """Flax's own attention and a tanh MLP, with a norm and a head; the MLP's layers come from `setup`."""

    def setup(self):
        self.up = nn.Dense(6)
        self.down = nn.Dense(4)

    @nn.compact
    def __call__(self, x):
        normed = nn.LayerNorm(name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=6, name="attn")(normed)
        return nn.Dense(3, name="head")(x + self.down(jnp.tanh(self.up(x))))


class Block(nn.Module):
    """Layers of three types, no two sides alike."""

    @nn.compact
    def __call__(self, x, _=None):
        h = jnp.tanh(nn.Dense(6, name="up")(x)).reshape(*x.shape[:-1], 2, 3)
        h = jnp.tanh(nn.DenseGeneral((5, 2), axis=(-2, -1), name="mix")(h))
        return x + nn.Einsum((5, 2, 4), "...nh,nhd->...d", name="down")(h), None


class Pair(nn.Module):
    """Two dense layers."""

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(4, name="down")(jnp.tanh(nn.Dense(6, name="up")(x))), None


class Square(nn.Module):
    """As many inputs and outputs as there are layers: shapes alone don't tell which axis counts layers."""

    @nn.compact
    def __call__(self, x, _=None):
        return x + jnp.tanh(nn.Dense(4, name="mix")(x)), None


class Scanned(nn.Module):
    """Blocks whose parameters are stacked along `axis`, run by `nn.scan`."""

    block: type[nn.Module] = Block
    layers: int = 3
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(self.block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=self.layers)
        return scan(name="layers")(x)[0]


class Grid(nn.Module):
    """A scan in a scan."""

    inner_axis: int = 0

    @nn.compact
    def __call__(self, x):
        outer = nn.scan(Inner, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return outer(self.inner_axis, name="outer")(x)[0]


class Inner(nn.Module):
    """What `Grid` repeats."""

    axis: int

    @nn.compact
    def __call__(self, x, _=None):
        return Scanned(Pair, axis=self.axis, name="inner")(x), None


class Ensemble(nn.Module):
    """Two dense layers side by side, by `nn.vmap`."""

    @nn.compact
    def __call__(self, x):
        members = nn.vmap(nn.Dense, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2)
        return members(5, name="members")(x)


class Tower(nn.Module):
    """Blocks in a loop, each rematerialised, one of them called twice."""

    @nn.compact
    def __call__(self, x):
        first = nn.remat(Pair)(name="first")
        return first(nn.remat(Pair)(name="second")(first(x)[0])[0])[0]


# name: (the model, its input)
MODELS = {
    "dense": (nn.Dense(5), X),
    "dense without bias": (nn.Dense(5, use_bias=False), X),
    "general, two axes in, two out": (nn.DenseGeneral((5, 2), axis=(-2, -1)), X),
    "general, axes swapped": (nn.DenseGeneral(5, axis=(-1, 1)), X),
    "general, a middle axis": (nn.DenseGeneral((5, 2), axis=1), X),
    "general, last axis counted from the front": (nn.DenseGeneral(5, axis=2), X),
    "einsum": (nn.Einsum((2, 4, 5), "btd,ndh->bnth"), X),
    "einsum, ellipsis and capitals": (nn.Einsum((4, 2, 5), "...A,ABC->...BC"), X),
    "embedding": (nn.Embed(7, 4), TOKENS),
    "tied embedding": (Tied(), TOKENS),
    "input by keyword": (ByName(), X),
    "attention": (Attention(), X),
    "remat, called twice": (Tower(), X),
    "scan": (Scanned(), X),
    "scan, layers on axis 1": (Scanned(Pair, axis=1), X),
    "scan of remat": (Scanned(nn.remat(Pair)), X),
    "scan, layers on axis 1, square": (Scanned(Square, 4, 1), X),
    "scan in scan": (Grid(), X),
    "vmap": (Ensemble(), X),
}
