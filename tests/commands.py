"""The command line, called within the process."""

import pytest

from vlora_jax.cli.main import run


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one call."""
    with pytest.raises(SystemExit) as ended:
        run([str(each) for each in arguments])
    out, error = capsys.readouterr()
    return ended.value.code or 0, out, error
