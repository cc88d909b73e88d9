"""The command `vlora-jax`: its verbs, and how a mistake is shown."""

import sys
from collections.abc import Sequence

import typer
from rich.console import Console

from vlora_jax.cli import (
    compare,
    diff,
    doctor,
    eval,
    export,
    generate,
    import_,
    inspect,
    merge,
    methods,
    plan,
    sweep,
    train,
)
from vlora_jax.distributed.watch import leaving
from vlora_jax.errors import VloraError
from vlora_jax.training.allocator import keep_large_buffers

app = typer.Typer(
    name="vlora-jax",
    help="Parameter-efficient Transformers in JAX: train, look into and merge Vertical LoRA and adapters.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for name, verb in {
    "train": train,
    "eval": eval,
    "generate": generate,
    "inspect": inspect,
    "diff": diff,
    "merge": merge,
    "import": import_,
    "export": export,
    "methods": methods,
    "compare": compare,
    "sweep": sweep,
    "plan": plan,
    "doctor": doctor,
}.items():
    app.command(name)(verb.command)


def run(arguments: Sequence[str]) -> None:
    """Run the command line and exit: 0 done, 1 the run failed, 2 the input is wrong, 75 stopped and saved."""
    try:
        with leaving():
            app(args=list(arguments))
    except VloraError as error:
        fail(str(error), error.exit_code)


def main() -> None:
    """The command as started from a shell."""
    if sys.argv[1:2] and sys.argv[1] in ("train", "eval", "generate", "compare", "sweep"):
        keep_large_buffers()
    run(sys.argv[1:])


def fail(message: str, code: int) -> None:
    """One line on standard error, and the exit."""
    Console(stderr=True).print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
