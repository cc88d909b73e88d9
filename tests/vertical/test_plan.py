"""Factored or materialised: the choice against closed formulas of FLOPs and against compiled programs."""

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import abstract, increment

import vlora_jax as vj
from vlora_jax.adapters.sites import Site
from vlora_jax.inspection.hlo import dot_flops
from vlora_jax.models.stack import per_device
from vlora_jax.vertical.config import Vertical
from vlora_jax.vertical.plan import choose


def site(inputs, outputs):
    return Site("up", "kernel", "dense", (3, 3), (inputs, outputs), (0,), (1,))


def chosen(shape, tokens, train, rank=8, **options):
    return choose(Vertical(size=4, increment=increment(rank=rank), **options), site(*shape), tokens, train)


@pytest.mark.parametrize(
    ("shape", "break_even"),
    [((768, 768), 384), ((768, 2304), 576), ((768, 3072), 614), ((4096, 4096), 2048), ((4096, 11008), 2985)],
)
@pytest.mark.parametrize("rank", [2, 8, 64])
@pytest.mark.parametrize("structure", ["star", "chain"])
def test_forward_breaks_even_where_the_formula_says(shape, break_even, rank, structure):
    """T* = in·out / (in + out), and up to a share 1/2r above it for adding ΔW; a chain masks both paths alike."""
    above = int(break_even * (1 + 1 / (2 * rank))) + 2
    assert chosen(shape, break_even, False, rank, structure=structure).factored
    assert not chosen(shape, above, False, rank, structure=structure).factored


def test_costs_are_the_closed_formulas():
    inputs, outputs, rank, tokens = 768, 3072, 8, 100
    factored, build = 2 * tokens * rank * (inputs + outputs), (2 * rank + 1) * inputs * outputs
    gradient = 2 * tokens * inputs * outputs
    costs = lambda train, **options: (
        (c := chosen((inputs, outputs), tokens, train, rank, **options)).factored_flops,
        c.materialised_flops,
    )
    assert costs(False) == (factored, build)
    assert costs(True) == (3 * factored, 3 * build + gradient)
    assert costs(True, detach="none") == (3 * factored + gradient, 3 * build + gradient)
    assert costs(False, structure="chain") == (3 * factored, 3 * build)
    assert costs(False, structure="chain", adapter_on_base=True) == (4 * factored, 4 * build)
    diagonal = 2 * tokens * inputs  # min(in, out) entries
    assert costs(False, diagonal=True)[0] == factored + diagonal


def test_detached_training_stays_factored_below_a_third_of_the_break_even():
    """At 768², T* = 384: rank 128 at any number of tokens, rank 136 no longer; an attached base as in the forward."""
    many = 10**7
    assert chosen((768, 768), many, True, rank=128).factored
    assert not chosen((768, 768), many, True, rank=136).factored
    assert chosen((768, 768), 384, True, rank=136, detach="none").factored
    assert not chosen((768, 768), 390, True, rank=136, detach="none").factored


def test_path_can_be_forced():
    assert not chosen((768, 768), 1, False, path="materialised").factored
    assert chosen((768, 768), 10**7, False, path="factored").factored


def test_a_choice_says_what_decided_it():
    assert str(chosen((768, 768), 10, False)) == "up factored (2.46e+05 FLOPs a layer, 1e+07 materialised)"
    assert str(chosen((768, 768), 10**4, False)) == "up materialised (1e+07 FLOPs a layer, 2.46e+08 factored)"


class Square(nnx.Module):
    """One product, nothing else that a program could count."""

    def __init__(self, rngs):
        self.up = nnx.Linear(32, 32, use_bias=False, rngs=rngs)

    def __call__(self, h):
        return self.up(h)


def test_compiled_programs_cost_what_the_choice_was_told():
    """Two compounds of three: FLOPs of products beyond those of hard tying, forward and in training."""
    rank, tokens, later, kernel = 2, 8, 4, 32 * 32

    def flops(train, **options):
        vertical = Vertical(size=3, increment=increment(rank=rank), **options)
        graphdef, shapes = abstract(Square, 6, vertical=vertical)
        forward = lambda base, h: vj.apply(graphdef, base, None, h).sum()
        program = jax.grad(forward, (0, 1)) if train else forward
        h = jax.ShapeDtypeStruct((tokens, 32), np.float32)
        return dot_flops(jax.jit(program).lower(shapes, h).compile().as_text())

    forward, product = flops(False, path="factored"), 2 * tokens * kernel
    thin = 2 * tokens * rank * (32 + 32)
    assert forward == 6 * product + later * thin
    assert flops(False, path="materialised") == 6 * product + later * 2 * rank * kernel
    detached = flops(True, path="factored")
    assert detached == (2 * 6 + 2) * product + later * 3 * thin  # weight gradients of the two first layers alone
    assert flops(True, path="factored", detach="none") == 3 * 6 * product + later * 3 * thin


def test_a_stack_chooses_by_the_tokens_of_one_device():
    assert per_device(64) == 64
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        assert per_device(64) == 32
