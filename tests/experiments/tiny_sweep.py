"""A tiny base that nobody trained, and members of sweeps over it."""

from pathlib import Path

import jax
import yaml

from vlora_jax import checkpoint
from vlora_jax.distributed.mesh import make_mesh
from vlora_jax.experiments.sweep import Member
from vlora_jax.training.config import RunConfig, load_config
from vlora_jax.training.job import TRAINABLE, model_config_of, parameters
from vlora_jax.training.runs import CHECKPOINTS, CONFIG

MODEL = [
    "model.layers=1", "model.width=16", "model.heads=2", "model.mlp_width=16", "model.patch=4", "model.vertical=null",
]  # fmt: skip
RUN = [
    "data.batch=16", "steps=6", "optimizer.warmup=1", "evaluate.every=3", "checkpoint.every=100", "log.every=1",
    "log.tensorboard=false", "evaluate.batch=360",
]  # fmt: skip
LORA = ["model=null", "adapter.method=lora", "adapter.targets=attn|mlp", "adapter.rank=2", "adapter.full=head"]


def write_base(run: Path) -> Path:
    """A run directory that `init_from` takes, of random parameters."""
    config = load_config(None, [*MODEL, f"run_dir={run}"])
    model = model_config_of(config)
    params = parameters(config, model, make_mesh(devices=jax.devices()[:1]))
    saver = checkpoint.Checkpoints(run / CHECKPOINTS)
    saver.save(0, {TRAINABLE: params}, {"model": model.model_dump(mode="json"), "best": None})
    saver.close()
    (run / CONFIG).write_text(yaml.safe_dump(config.plain(), sort_keys=False))
    return run


def config(base: Path, *changes: str) -> RunConfig:
    """A run of LoRA on the base."""
    return load_config(None, [*RUN, *LORA, f"init_from={base}", *changes])


def members(base: Path, *changes: list[str]) -> list[Member]:
    """Members by what they change."""
    return [Member(number, {"set": own}, config(base, *own)) for number, own in enumerate(changes)]
