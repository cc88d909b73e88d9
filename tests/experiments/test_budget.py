"""Sizes for a budget of numbers, counted from shapes."""

import pytest
from helpers import trained_numbers

from vlora_jax.adapters.registry import METHODS
from vlora_jax.adapters.sites import find_sites
from vlora_jax.errors import ConfigError
from vlora_jax.experiments.budget import fitted, largest
from vlora_jax.models.build import abstract_model
from vlora_jax.training.config import load_config

SMALL = ["model.layers=2", "model.width=16", "model.heads=2", "model.mlp_width=24", "model.vertical=null"]
SITES = "layers"  # the head is trained whole


def run(name, *changes):
    own = [f"adapter.method={name}", f"adapter.targets={SITES}", "adapter.full=head"]
    return load_config(None, [*SMALL, *own, *changes])


def numbers_at(config, size):
    """By the shapes of an adapter of this size on the same sites, without a base."""
    shapes = abstract_model(config.model)[1]
    sites = [site for site in find_sites(shapes) if site.path.startswith(SITES)]
    method = type(config.adapter)(**{config.adapter.size: size})
    return trained_numbers(method, sites)


@pytest.mark.parametrize(("name", "numbers"), [("lora", 4000), ("vera", 400), ("loha", 3000), ("fourierft", 500)])
def test_the_largest_that_fits_is_chosen(name, numbers):
    config = run(name)
    fit = fitted(config, numbers)
    size = getattr(fit.adapter, fit.adapter.size)
    assert numbers_at(config, size) <= numbers < numbers_at(config, size + 1)
    assert fit.adapter.full == "head"  # which does not count
    plain, was = fit.adapter.config(), config.adapter.config()
    assert {key for key in plain if plain[key] != was[key]} <= {fit.adapter.size}  # alpha and all else stay


def test_a_method_that_refuses_small_sizes_is_fitted():
    """AdaLoRA starts above its target rank, 8 by default."""
    assert fitted(run("adalora"), 6000).adapter.rank >= METHODS["adalora"]().target_rank


@pytest.mark.parametrize("limit", range(35, 120, 7))
def test_the_search_finds_what_trying_all_sizes_finds(limit):
    for low, high in ((1, 9), (3, 9), (5, 8), (6, 100)):
        trained = lambda size, low=low, high=high: 10 * size + size**2 % 7 if low <= size <= high else None
        fits = [size for size in range(low, high + 1) if trained(size) <= limit]
        assert largest(trained, limit) == max(fits, default=None)


def test_what_cannot_be_fitted_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="ia3 has no option that sets how many numbers it trains"):
        fitted(run("ia3"), 4000)
    with pytest.raises(ConfigError, match="randlora has no option"):
        fitted(run("randlora"), 4000)
    with pytest.raises(ConfigError, match="lora does not fit 10 numbers: at rank 1 it trains "):
        fitted(run("lora"), 10)
    with pytest.raises(ConfigError, match="a budget of 10 numbers is for adapters; this trains the whole model"):
        fitted(load_config(None, SMALL), 10)
