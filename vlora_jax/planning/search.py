"""The one change that makes a run fit: rematerialisation, smaller micro-batches, the mesh, in this order."""

from collections.abc import Callable, Iterator

from vlora_jax.distributed.mesh import filled
from vlora_jax.planning.plan import Plan
from vlora_jax.training.config import RunConfig
from vlora_jax.training.reading import parse_override, set_key

LEANER = ("none", "dots", "full")  # remat policies, each with less memory than the one before
Change = tuple[str, ...]  # overrides of a config


def search(
    config: RunConfig, devices: int, attempt: Callable[[RunConfig, Change], Plan | None]
) -> tuple[Plan | None, int]:
    """The first single change with which the run fits, and how many were tried.

    Args:
      devices: of the topology.
      attempt: plans a changed config; None if that is impossible.
    """
    tried = 0
    for change in changes(config, devices):
        tried += 1
        found = attempt(changed(config, change), change)
        if found is not None and found.fits:
            return found, tried
    return None, tried


def changes(config: RunConfig, devices: int) -> Iterator[Change]:
    """Single changes that need less memory, the mildest of a kind first. None changes what is learnt."""
    remat = getattr(config.model, "remat", None)
    if remat in LEANER:
        for policy in LEANER[LEANER.index(remat) + 1 :]:
            yield (f"model.remat={policy}",)
    shape = filled(**config.mesh.sizes, devices=devices)
    batch, accumulate, ways = config.data.batch, config.accumulate, shape[0] * shape[1]
    while batch % 2 == 0 and (batch // 2) % ways == 0:
        batch, accumulate = batch // 2, accumulate * 2
        yield f"data.batch={batch}", f"accumulate={accumulate}"
    if shape[2] > 1 and min(shape[:2]) == 1 and not config.mesh.sequence:
        yield ("mesh.sequence=true",)
    for tensor in (1, 2, 4, 8, 16):
        other = (1, devices // tensor, tensor)
        if devices % tensor == 0 and other != shape and config.data.batch % other[1] == 0:
            yield tuple(f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), other, strict=True))


def changed(config: RunConfig, change: Change) -> RunConfig:
    """A config with overrides."""
    values = config.plain()
    for override in change:
        set_key(values, *parse_override(override))
    return RunConfig.model_validate(values)
