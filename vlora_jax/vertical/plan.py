"""Factored or materialised: what an increment costs either way, and which is cheaper."""

from dataclasses import dataclass

from vlora_jax.adapters.sites import Site
from vlora_jax.vertical.config import Vertical


@dataclass(frozen=True)
class Choice:
    """How one target of a vertical stack is applied, with the FLOPs a layer that decided it.

    Both figures leave out what the two paths share: the product with the base kernel and its activation gradient.
    """

    path: str
    factored: bool
    factored_flops: float
    materialised_flops: float

    def __str__(self) -> str:
        form, other = ("factored", "materialised") if self.factored else ("materialised", "factored")
        flops = sorted((self.factored_flops, self.materialised_flops))
        return f"{self.path} {form} ({flops[0]:.3g} FLOPs a layer, {flops[1]:.3g} {other})"


def choose(vertical: Vertical, site: Site, tokens: int, train: bool) -> Choice:
    """The cheaper form of the increments of one target, for the layers after a compound's first.

    Args:
      tokens: rows that the target sees in one call on one device.
      train: count the backward pass too.

    Factored, a star layer pays 2·tokens·p (p numbers in its factors), a chain layer that of all increments of
    its compound (the later ones masked); in training three times that, and the dense weight gradient
    2·tokens·in·out only if the base is not detached. Materialised, it pays for building ΔW and adding it, and
    in training always for the dense weight gradient.
    """
    active = vertical.increments if vertical.structure == "chain" else 1
    kernel = site.in_dim * site.out_dim
    per_token = sum(active * method.for_site(site).flops(site)[0] for method in vertical.methods)
    build = sum(active * (method.for_site(site).flops(site)[1] + kernel) for method in vertical.methods)
    factored, materialised = tokens * per_token, build
    if train:
        weight_gradient = 2.0 * tokens * kernel
        factored = 3 * factored + (0 if vertical.detached else weight_gradient)
        materialised = 3 * materialised + weight_gradient
    cheaper = factored <= materialised if vertical.path == "auto" else vertical.path == "factored"
    chains = vertical.structure == "chain" and not all(method.adds_up for method in vertical.methods)
    return Choice(site.path, cheaper and not chains, factored, materialised)
