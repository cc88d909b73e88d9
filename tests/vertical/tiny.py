"""A block small enough to write out in NumPy, stacks of it, and what the papers' formulas say they compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.models.stack import Stack

WIDTH, INNER = 6, 5
TARGETS = ("up", "down")


class Tiny(nnx.Module):
    """`h + tanh(h U + b) D`; no kernel is square."""

    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, INNER, rngs=rngs)
        self.down = nnx.Linear(INNER, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, h):
        return h + self.down(jnp.tanh(self.up(h)))


def increment(rank=2, alpha=3.0, **options):
    return vj.LoRA(rank=rank, alpha=alpha, start="kaiming_both", **options)


def abstract(make_block=Tiny, layers=6, **options):
    """Graph and shapes of a stack; nothing is drawn or compiled."""
    return vj.split(nnx.eval_shape(lambda: Stack(make_block, layers, rngs=nnx.Rngs(0), **options)))


def filled(shapes, seed=0, deviation=0.4):
    """Normal values for every parameter, so that none is at its special start."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, deviation, leaf.shape).astype(leaf.dtype), shapes)


def error(got, expected):
    """The largest difference, relative to the largest expected value."""
    expected = np.asarray(expected)
    return np.abs(np.asarray(got) - expected).max() / max(np.abs(expected).max(), 1e-9)


@dataclasses.dataclass
class Reference:
    """A stack of `Tiny` in NumPy, float64: effective kernels by layer, output, and each use's cotangent Γ."""

    kernels: dict[str, np.ndarray]
    output: np.ndarray
    gammas: dict[str, np.ndarray]


def layers_of(vertical, layers, compound):
    """The layers of a compound, in the order they run."""
    if vertical.pattern == "sequence":
        return range(compound * vertical.size, (compound + 1) * vertical.size)
    return range(compound, layers, layers // vertical.size)


def reference_kernels(vertical, layers, params):
    """K_l of every layer: star `K₀ + Δᵢ`, chain `K₀ + Σ_{j≤i} Δⱼ`, with Δ = s·A B (+ diag)."""
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    kernels = {}
    for target in TARGETS:
        bases = leaves[f"block/{target}/kernel"]
        kernels[target] = np.empty((layers, *bases.shape[1:]))
        for compound, base in enumerate(bases):
            changes = [0.0] * (not vertical.adapter_on_base)
            for j in range(vertical.increments):
                a, b = (leaves[f"increments/lora/{target}/{name}"][compound, j] for name in "ab")
                change = vertical.increment.scale * a @ b
                if vertical.diagonal:
                    d = leaves[f"increments/diagonal/{target}/d"][compound, j]
                    change[range(d.size), range(d.size)] += d
                changes.append(change)
            for index, layer in enumerate(layers_of(vertical, layers, compound)):
                inside = changes[: index + 1] if vertical.structure == "chain" else [changes[index]]
                kernels[target][layer] = base + sum(inside)
    return kernels


def reference(vertical, layers, params, h, cotangent):
    """`reference_pass` with the kernels of a vertical stack."""
    return reference_pass(reference_kernels(vertical, layers, params), flatten(params)["block/up/bias"], h, cotangent)


def reference_pass(kernels, bias, h, cotangent):
    """Forward and backward pass written out; `cotangent` is that of the output."""
    kernels = {target: np.asarray(kernel, np.float64) for target, kernel in kernels.items()}
    h, inputs, hidden = np.asarray(h, np.float64), [], []
    for up, down, b in zip(kernels["up"], kernels["down"], bias, strict=True):
        inputs.append(h)
        hidden.append(np.tanh(h @ up + b))
        h = h + hidden[-1] @ down
    gammas, delta = {target: np.zeros_like(kernels[target]) for target in TARGETS}, np.asarray(cotangent, np.float64)
    for layer in reversed(range(len(bias))):
        gammas["down"][layer] = hidden[layer].T @ delta
        inner = (delta @ kernels["down"][layer].T) * (1 - hidden[layer] ** 2)
        gammas["up"][layer] = inputs[layer].T @ inner
        delta = delta + inner @ kernels["up"][layer].T
    return Reference(kernels, h, gammas)
