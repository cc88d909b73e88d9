"""A model's config from its `config.json` alone: what planning needs, without weights or a tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlora_jax.errors import ConfigError, ModelFileError
from vlora_jax.hub.configs import ModelConfig, choose_head, read_config
from vlora_jax.hub.files import CONFIG, read_json
from vlora_jax.hub.where import HUB_NAME, PACKAGE, of_package


def architecture(
    path: Path,
    head: str | None = None,
    dtype: str | None = None,
    *,
    classes: int | None = None,
    untie: bool = False,
    remat: str = "none",
    ignore: Sequence[str] = (),
) -> ModelConfig:
    """Our config of the model that a `config.json` describes; arguments as of `hub.load.describe`.

    Where `dtype` is not given it is the file's; half precision without bfloat16's range counts as float32.

    Raises:
      ModelFileError: the file is missing or no JSON object.
      ConfigError: it asks for what our models do not have.
    """
    given = read_json(path)
    stored = "bfloat16" if given.get("dtype", given.get("torch_dtype")) == "bfloat16" else "float32"
    fields = {"remat": remat, "dtype": dtype or stored, "param_dtype": dtype or stored}
    config = read_config(given, choose_head(given, head), classes, ignore, **fields)
    if untie:
        if not getattr(config, "tied_head", False) or config.head != "lm":
            raise ConfigError("untie: this model's head is not tied to its embedding")
        config = config.model_copy(update={"tied_head": False})
    return config


def find_config(source: str, given: Path | None = None, folder: Path | None = None) -> Path:
    """The `config.json` of a model, wherever it is to be had; nothing is fetched.

    Args:
      source: a directory, `package:NAME`, or a name on the hub, which is looked up in its cache.
      given: a file, or a directory that holds `config.json`; goes before all else.
      folder: of architectures as `NAME.json`, by the last part of a hub name.

    Raises:
      ModelFileError: there is none.
    """
    if given is not None:
        found = given / CONFIG if given.is_dir() else given
        if not found.is_file():
            raise ModelFileError(f"--model {given} is no config.json and no directory that holds one")
        return found
    if source.startswith(PACKAGE):
        return of_package(source.removeprefix(PACKAGE)) / CONFIG
    if (Path(source).expanduser() / CONFIG).is_file():
        return Path(source).expanduser() / CONFIG
    name, _, revision = source.partition("@")
    if HUB_NAME.fullmatch(source):
        from huggingface_hub import try_to_load_from_cache

        cached: Any = try_to_load_from_cache(name, CONFIG, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
    beside = [] if folder is None else [folder / f"{name.rsplit('/', 1)[-1]}.json"]
    for path in beside:
        if path.is_file():
            return path
    where = "".join(f" or as {path}" for path in beside)
    raise ModelFileError(
        f"{source}: its {CONFIG} is not here, in the hub's cache{where}; name one: --model FILE, or hf download {name} "
        f"{CONFIG}"
    )
