"""The configuration of a run: YAML files, `key.sub=value` overrides, one error line for a mistake."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from vlora_jax.adapters.quantized import Form
from vlora_jax.data.config import DatasetConfig
from vlora_jax.distributed.mesh import AXES
from vlora_jax.errors import ConfigError
from vlora_jax.models.decoder import DecoderConfig
from vlora_jax.models.encoder import EncoderConfig
from vlora_jax.models.matrix import MatrixConfig
from vlora_jax.models.seq2seq import Seq2SeqConfig
from vlora_jax.models.stack import Remat
from vlora_jax.models.vit import ViTConfig
from vlora_jax.training.optimizers import OptimizerConfig
from vlora_jax.training.profiling import window
from vlora_jax.training.reading import TAGS, explain, flat_keys, parse_override, read_yaml, set_key
from vlora_jax.vertical.config import MethodField, Vertical

ANYTIME: dict[str, Any] = {"anytime": True}  # may change between a run's start and its continuation
ADDED = ("quantize",)  # options that came later: where they are not used, what was done before stays valid


class Section(BaseModel):
    """Strict and immutable, like all of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PretrainedConfig(Section):
    """A model in the files of transformers."""

    family: Literal["pretrained"] = "pretrained"
    source: str = Field(description="a directory, a name on the Hugging Face hub, or package:NAME")
    head: Literal["lm", "sequence", "token", "masked_lm", "image", "none"] | None = Field(
        default=None, description="null: that of the files; another one starts at random"
    )
    classes: PositiveInt | None = Field(default=None, description="of a sequence, token or image head")
    untie: bool = Field(default=False, description="give a tied head a kernel of its own, a copy of the embedding")
    dtype: Literal["float32", "bfloat16"] | None = Field(default=None, description="null: as stored")
    remat: Remat = "none"
    ignore: list[str] = Field(default=[], description="keys of config.json to be read as if they were absent")

    def options(self) -> dict[str, Any]:
        """What `hub.load` takes by keyword."""
        return {"classes": self.classes, "untie": self.untie, "remat": self.remat, "ignore": self.ignore}


ModelSection = Annotated[
    ViTConfig | DecoderConfig | EncoderConfig | Seq2SeqConfig | MatrixConfig | PretrainedConfig, Discriminator("family")
]


class DigitsConfig(Section):
    """Handwritten digits, as images."""

    name: Literal["digits"] = "digits"
    batch: PositiveInt = Field(default=64, description="examples a micro-batch, over all devices")
    augment: bool = Field(default=False, description="shift training images by up to a pixel")
    turns: int = Field(default=0, ge=0, le=3, description="quarter turns of all images, to the left")
    shots: PositiveInt | None = Field(default=None, description="so many training images of each class")
    shots_seed: NonNegativeInt = Field(default=0, description="which ones")


class PystdlibConfig(Section):
    """The standard library of the running Python, as bytes."""

    name: Literal["pystdlib"] = "pystdlib"
    batch: PositiveInt = Field(default=16, description="windows a micro-batch, over all devices")
    part: Literal["code", "prose"] = Field(default="code", description="source files, or the manual's prose")
    length: PositiveInt = Field(default=256, description="tokens a window")


class LowRankConfig(Section):
    """A random matrix of low rank, some of whose entries are seen."""

    name: Literal["low_rank"] = "low_rank"
    batch: Literal[1] = Field(default=1, description="the whole matrix is one example")
    rows: PositiveInt = 100
    columns: PositiveInt = 100
    rank: PositiveInt = 5
    observed: float = Field(default=0.3, gt=0, lt=1, description="share of the entries to learn from")
    seed: NonNegativeInt = Field(default=0, description="of the matrix and of what is seen of it")


DataConfig = Annotated[DigitsConfig | PystdlibConfig | LowRankConfig | DatasetConfig, Discriminator("name")]


class EvaluateConfig(Section):
    """When to look at held-out data, and what to conclude."""

    every: PositiveInt = Field(default=100, description="steps")
    metric: Literal["accuracy", "loss"] = "accuracy"
    patience: PositiveInt | None = Field(default=None, description="stop after so many evaluations without a new best")
    batch: PositiveInt = Field(default=120, description="examples at a time", json_schema_extra=ANYTIME)


class CheckpointConfig(Section):
    """When to save. The best step by `evaluate.metric` is kept as well."""

    every: PositiveInt = Field(default=100, description="steps", json_schema_extra=ANYTIME)
    keep: int = Field(default=2, ge=2, description="newest checkpoints that stay", json_schema_extra=ANYTIME)


class LogConfig(Section):
    """What to write down while training."""

    every: PositiveInt = Field(
        default=10, description="steps between lines of metrics.jsonl", json_schema_extra=ANYTIME
    )
    tensorboard: bool = Field(default=True, json_schema_extra=ANYTIME)
    progress: bool = Field(default=True, description="a live bar on a terminal", json_schema_extra=ANYTIME)
    profile_steps: str | None = Field(
        default=None,
        description="FIRST:LAST, of which the profiler keeps a trace in run_dir",
        json_schema_extra=ANYTIME,
    )

    @field_validator("profile_steps")
    @classmethod
    def _check(cls, steps: str | None) -> str | None:
        if steps is not None:
            window(steps)
        return steps

    @property
    def profiled(self) -> range:
        """Steps to profile; empty if there are none."""
        return range(0) if self.profile_steps is None else window(self.profile_steps)


class MeshConfig(Section):
    """Devices along each axis; one axis may be -1, which takes what the others leave."""

    data: int = Field(default=-1, json_schema_extra=ANYTIME)
    fsdp: int = Field(default=1, json_schema_extra=ANYTIME)
    tensor: int = Field(default=1, json_schema_extra=ANYTIME)
    sequence: bool = Field(
        default=False,
        description="split lengths over tensor between a block's branches: less memory for long rows",
        json_schema_extra=ANYTIME,
    )

    @property
    def sizes(self) -> dict[str, int]:
        """By axis."""
        return {axis: getattr(self, axis) for axis in AXES}


class DistributedConfig(Section):
    """Of a run with several processes: how long they wait for each other."""

    start_seconds: PositiveInt = Field(default=300, description="for all to come", json_schema_extra=ANYTIME)
    lost_seconds: PositiveInt = Field(
        default=60, description="silence after which one is taken for lost and all stop", json_schema_extra=ANYTIME
    )


class RunConfig(Section):
    """One run. The defaults train the embedded VLoRA Vision Transformer on digits."""

    run_dir: str = Field(default="runs/digits", json_schema_extra=ANYTIME)
    seed: NonNegativeInt = 0
    model: ModelSection | None = Field(
        default_factory=lambda: ViTConfig(vertical=Vertical()), description="null: that of init_from"
    )
    init_from: str | None = Field(
        default=None, description="a run directory whose best checkpoint gives the parameters"
    )
    adapter: MethodField | None = Field(
        default=None, description="train this on the frozen model; null: train the model"
    )
    quantize: Form | None = Field(
        default=None, description="hold the kernels of the frozen layers in 8 or 4 bits (QLoRA, arXiv 2305.14314)"
    )
    data: DataConfig = DigitsConfig()
    steps: PositiveInt = 500
    accumulate: PositiveInt = Field(default=1, description="micro-batches a step")
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()

    model_config = ConfigDict(arbitrary_types_allowed=True)

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.model is None and self.init_from is None:
            raise ValueError("model is null: give a model, or init_from to take one from a run")
        if isinstance(self.model, PretrainedConfig):
            if self.init_from is not None:
                raise ValueError("model is pretrained and init_from is given: a run starts from one of them")
        elif self.model is not None and self.model.vertical is not None:
            self.model.vertical.compounds(self.model.layers)
        if set(self.run_dir) & set("*?[]"):
            raise ValueError(f"run_dir {self.run_dir!r} must be without * ? [ ], which Orbax reads as patterns")
        sizes = list(self.mesh.sizes.values())
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh {sizes} must be sizes of at least 1, at most one of them -1")
        if self.log.profiled and self.log.profiled[-1] > self.steps:
            raise ValueError(f"log.profile_steps {self.log.profile_steps} ends beyond the last step, {self.steps}")
        object.__setattr__(self, "optimizer", self.optimizer.resolved(self.adapter))  # what is stored is not open
        return self

    def plain(self) -> dict[str, Any]:
        """Everything as JSON values, methods included."""
        return self.model_dump(mode="json")

    def decisive(self) -> dict[str, Any]:
        """What a run's result depends on, by dotted key; the rest may change at any time."""
        schema = anytime_keys(RunConfig)
        at_any_time = lambda key: any(f"{key}.".startswith(f"{each}.") for each in schema)
        added = lambda key, value: value is None and key in ADDED
        flat = flat_keys(self.plain()).items()
        return {key: value for key, value in flat if not at_any_time(key) and not added(key, value)}

    def identity(self) -> dict[str, Any]:
        """What makes a continued run the same run, by dotted key."""
        kept = self.decisive()
        open_ended = self.optimizer.schedule == "constant" and self.optimizer.warmup <= self.steps
        if open_ended and (self.adapter is None or self.adapter.for_run(self.steps) == self.adapter):
            kept.pop("steps")  # nothing that was done depends on how long it goes on
        return kept


def load_config(path: Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """A config from a YAML file (or the defaults) with overrides applied.

    Args:
      path: a YAML file; None for the embedded digits run.
      overrides: `"optimizer.rate=1e-3"`; values are YAML. `null` empties a key.

    Raises:
      ConfigError: the file is missing or no YAML, a key is unknown (the nearest is named), a value impossible.
    """
    values = RunConfig().plain() | {"optimizer": {}} if path is None else read_yaml(path)
    outer_first = lambda pair: (pair[0].count("."), pair[0] not in TAGS)  # else a section would undo its own keys
    pairs = sorted(map(parse_override, overrides), key=outer_first)
    for key, _ in pairs:
        emptied = next((outer for outer, value in pairs if value is None and key.startswith(f"{outer}.")), None)
        if emptied is not None:
            raise ConfigError(f"{emptied}=null leaves no room for {key}; drop one of them")
    for key, value in pairs:
        set_key(values, key, value)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path or 'config'}: {explain(error, RunConfig)}") from None


def anytime_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted keys of the fields that may change between a run's start and its continuation."""
    keys = []
    for name, info in section.model_fields.items():
        if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("anytime"):
            keys.append(prefix + name)
        elif isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += anytime_keys(info.annotation, f"{prefix}{name}.")
    return keys
