"""NNX models as other people write them: Flax's own layers only, nothing of this library."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Containers(nnx.Module):
    """Layers in lists and dicts of Flax and of Python, and in a Sequential."""

    def __init__(self, rngs):
        self.listed = nnx.List([nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)])
        self.named = nnx.Dict({"left": nnx.Linear(4, 3, rngs=rngs)})
        self.plain = nnx.data([{"right": nnx.Linear(3, 4, rngs=rngs)}])
        self.chain = nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), jnp.tanh, nnx.Linear(6, 2, rngs=rngs))

    def __call__(self, x):
        for layer in self.listed:
            x = jnp.tanh(layer(x))
        return self.chain(self.plain[0]["right"](self.named["left"](x)))


class Twice(nnx.Module):
    """One layer under two names."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.again = self.first

    def __call__(self, x):
        return self.again(jnp.tanh(self.first(x)))


class Tied(nnx.Module):
    """A token embedding that is the output head too."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.mix = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.mix(self.embed(tokens)))


class Block(nnx.Module):
    """Layers of three types, no two sides alike."""

    def __init__(self, rngs):
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.mix = nnx.LinearGeneral((2, 3), (5, 2), axis=(-2, -1), rngs=rngs)
        self.down = nnx.Einsum("...nh,nhd->...d", (5, 2, 4), (4,), rngs=rngs)

    def __call__(self, x):
        h = jnp.tanh(self.up(x)).reshape(*x.shape[:-1], 2, 3)
        return x + self.down(jnp.tanh(self.mix(h)))


class LaxScanned(nnx.Module):
    """Stacked blocks run by `jax.lax.scan` over their split state."""

    def __init__(self, rngs, layers=3):
        self.blocks = nnx.split_rngs(splits=layers)(nnx.vmap(Block))(rngs)

    def __call__(self, x):
        graphdef, layers = nnx.split(self.blocks)
        return jax.lax.scan(lambda h, layer: (nnx.merge(graphdef, layer)(h), None), x, layers)[0]


class NNXScanned(LaxScanned):
    """Stacked blocks run by `nnx.scan`, each rematerialised."""

    def __call__(self, x):
        run = nnx.scan(nnx.remat(lambda h, block: block(h)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.blocks)


class Attention(nnx.Module):
    """Flax's own attention and a tanh MLP, with a norm and a head."""

    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(2, 4, qkv_features=6, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.mlp = nnx.Dict(up=nnx.Linear(4, 6, rngs=rngs), down=nnx.Linear(6, 4, rngs=rngs))
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return self.head(x + self.mlp["down"](jnp.tanh(self.mlp["up"](x))))


class ReadsKernel(nnx.Module):
    """A model that multiplies by a layer's kernel itself."""

    def __init__(self, rngs):
        self.proj = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return x @ self.proj.kernel.get_value() + self.proj.bias.get_value()


def called_by_name(layer):
    """`layer` in a model that passes its input by keyword."""

    class ByName(nnx.Module):
        def __init__(self, rngs):
            self.layer = layer(rngs)

        def __call__(self, x):
            return self.layer(inputs=x)

    return ByName


X = jnp.asarray(np.random.default_rng(9).normal(size=(2, 3, 4)), jnp.float32)
TOKENS = jnp.array([[0, 3, 6], [6, 6, 1]])

# name: (what builds the model from rngs, its input)
MODELS = {
    "linear": (lambda rngs: nnx.Linear(4, 5, rngs=rngs), X),
    "linear without bias": (lambda rngs: nnx.Linear(4, 5, use_bias=False, rngs=rngs), X),
    "general, two axes in, two out": (lambda rngs: nnx.LinearGeneral((3, 4), (5, 2), axis=(-2, -1), rngs=rngs), X),
    "general, axes swapped": (lambda rngs: nnx.LinearGeneral((3, 4), 5, axis=(-1, 1), rngs=rngs), X),
    "general, a middle axis": (lambda rngs: nnx.LinearGeneral(3, (5, 2), axis=1, rngs=rngs), X),
    "general, last axis counted from the front": (lambda rngs: nnx.LinearGeneral(4, 5, axis=2, rngs=rngs), X),
    "einsum": (lambda rngs: nnx.Einsum("btd,ndh->bnth", (2, 4, 5), (2, 1, 5), rngs=rngs), X),
    "einsum, ellipsis": (lambda rngs: nnx.Einsum("...d,dnh->...nh", (4, 2, 5), (2, 5), rngs=rngs), X),
    "einsum, ellipsis and capitals": (lambda rngs: nnx.Einsum("...A,AB->...B", (4, 5), rngs=rngs), X),
    "embedding": (lambda rngs: nnx.Embed(7, 4, rngs=rngs), TOKENS),
    "tied embedding": (Tied, TOKENS),
    "containers": (Containers, X),
    "one layer, two names": (Twice, X),
    "input by keyword": (called_by_name(lambda rngs: nnx.Linear(4, 5, rngs=rngs)), X),
    "attention": (Attention, X),
    "lax.scan": (LaxScanned, X),
    "nnx.scan": (NNXScanned, X),
    "reads a kernel": (ReadsKernel, X),
}
