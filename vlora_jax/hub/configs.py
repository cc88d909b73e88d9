"""Between transformers' `config.json` and our model configs, in both directions, by the tables of `families.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from vlora_jax.errors import ConfigError, ConversionError
from vlora_jax.hub.families import FAMILIES, family_of
from vlora_jax.hub.names import ARCHITECTURES, CLASSES
from vlora_jax.hub.reader import Reader, of_kind, validated
from vlora_jax.models.encoder import EncoderConfig
from vlora_jax.models.seq2seq import Seq2SeqConfig
from vlora_jax.models.vit import ViTConfig

ModelConfig = Any  # of the four config classes
# Fields that say how a model is run or was drawn, not what it computes.
RUNNING = ("dtype", "param_dtype", "remat", "kernel_std", "vertical")


def head_of(given: Mapping[str, Any]) -> str | None:
    """The head of the architecture that a `config.json` names; None where we have none like it.

    Raises:
      ConfigError: `architectures` is no list of names.
    """
    named = given.get("architectures")
    if named is not None and not (of_kind(named, list) and all(of_kind(each, str) for each in named)):
        raise ConfigError(f"config.json: architectures must be a list of names, not {named!r}")
    for architecture in named or ():
        if architecture in ARCHITECTURES:
            return ARCHITECTURES[architecture][1]
    return None


def classes_of(given: Mapping[str, Any]) -> int:
    """How many labels a `config.json` speaks of; transformers leaves the number out where it is 2.

    Raises:
      ConfigError: it is no number.
    """
    names = given.get("id2label")
    count = len(names) if isinstance(names, dict) and names else given.get("num_labels", given.get("_num_labels")) or 2
    if (names is not None and not isinstance(names, dict)) or not of_kind(count, int) or count < 1:
        raise ConfigError(f"config.json: id2label {names!r} and num_labels {count!r} give no number of classes")
    return count


def choose_head(given: Mapping[str, Any], head: str | None) -> str:
    """The head to load: the one asked for, else the config's own.

    Raises:
      ConfigError: the family has no such head, or the config's architecture is none of ours.
    """
    model_type, _ = family_of(given)
    chosen, offered = head or head_of(given), CLASSES[model_type]
    if chosen is None:
        raise ConfigError(
            f"config.json: architectures {given.get('architectures')} has no head of ours; say which to put on: "
            f"head={' | '.join(map(repr, offered))}"
        )
    if chosen not in offered:
        raise ConfigError(f"{model_type} has no head {chosen!r} here, only {', '.join(map(repr, offered))}")
    return chosen


def read_config(
    given: Mapping[str, Any],
    head: str | None = None,
    classes: int | None = None,
    ignore: Sequence[str] = (),
    **fields: Any,
) -> ModelConfig:
    """Our config of a model that transformers describes by `given`.

    Args:
      given: a parsed `config.json`.
      head: to put on another head than the config's.
      classes: of a sequence, token or image head, where the config does not say.
      ignore: keys to be read as if they were absent.
      fields: of our config, over what was read.

    Raises:
      ConfigError: a key has a value that our models have not, is not known, or a value is impossible.
    """
    _, family = family_of(given)
    chosen = choose_head(given, head)
    reader = Reader(given, family.defaults, ignore)
    values = {ours: reader(theirs) for theirs, ours in family.keys.items()} | dict(family.switches)
    for part in family.parts:
        values |= part.read(reader)
    reader.only("is_encoder_decoder", family.config is Seq2SeqConfig)
    reader("tie_word_embeddings", of=bool)
    reader.finish()
    start = reader("initializer_range", 0.02)
    values |= {"kernel_std": start} if start and family.config is not Seq2SeqConfig else {}
    if chosen in ("sequence", "token", "image"):
        values |= {"classes": classes or classes_of(given)}
    if family.config is EncoderConfig:
        values |= {"pooler": chosen == "sequence"}
        if chosen == "masked_lm":
            reader.only("tie_word_embeddings", True)
    values |= {} if family.config is ViTConfig else {"head": chosen}
    return validated(family.config, values | fields)


def write_config(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """A `config.json` for a model, in the form of transformers 5."""
    family = FAMILIES[model_type]
    exact = {"kv_heads": config.key_heads, "head_dim": config.dim}  # ours may leave them to be worked out
    written = {theirs: exact.get(ours, getattr(config, ours)) for theirs, ours in family.keys.items()}
    for part in family.parts:
        written |= part.write(config)
    if config.kernel_std and family.config is not Seq2SeqConfig:
        written |= {"initializer_range": config.kernel_std}
    head = "image" if family.config is ViTConfig else config.head
    classes = getattr(config, "classes", None)
    if classes is not None:
        written |= labels(unnamed(classes))
    architecture = CLASSES[model_type].get(head)
    if architecture is None:
        raise ConversionError(f"transformers has no {model_type} with a head {head!r}")
    return {"model_type": model_type, "architectures": [architecture], "dtype": config.param_dtype} | written


def labels(names: Sequence[str]) -> dict[str, Any]:
    """The keys by which transformers counts and names classes."""
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {n: i for i, n in enumerate(names)}}


def unnamed(classes: int) -> list[str]:
    """What transformers calls classes without names."""
    return [f"LABEL_{index}" for index in range(classes)]


def differing(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Fields in which two models would compute something else."""
    if type(one) is not type(other):
        return ["family"]
    mine, theirs = _exact(one), _exact(other)
    return [key for key in mine if key not in RUNNING and mine[key] != theirs[key]]


def _exact(config: ModelConfig) -> dict[str, Any]:
    every = config.window_layers is None or all(config.window_layers)
    window_layers = None if every else config.window_layers
    shape = {"kv_heads": config.key_heads, "head_dim": config.dim, "window_layers": window_layers}
    return config.model_dump() | shape


def model_type_of(config: ModelConfig) -> str:
    """The model type whose config says all that ours says: written and read again, it is the same.

    Raises:
      ConversionError: there is none.
    """
    faults = {}
    for model_type, family in FAMILIES.items():
        if not isinstance(config, family.config):
            continue
        try:
            head = "image" if family.config is ViTConfig else config.head
            again = read_config(write_config(config, model_type), head)
        except (ConfigError, ConversionError) as error:
            faults[model_type] = [str(error)]
            continue
        faults[model_type] = [name for name in differing(config, again) if name != "pooler"]
        if not faults[model_type]:
            return model_type
    closest = min(faults, key=lambda name: len(faults[name]))
    raise ConversionError(
        f"no model of transformers computes what this {config.family} does; the nearest, {closest}, differs in "
        f"{', '.join(faults[closest])}"
    )
