"""Error classes carry an exit code, and `nearest` finds what was meant."""

from vlora_jax.errors import ConfigError, NonFiniteError, ResourceError, nearest


def test_exit_codes_tell_wrong_input_from_failed_runs():
    assert ConfigError("x").exit_code == 2
    assert NonFiniteError("x").exit_code == 1
    assert ResourceError("disk full", exit_code=1).exit_code == 1


def test_nearest_looks_at_path_components():
    paths = ["layers/block/attn/q", "layers/block/mlp/up", "head"]
    assert nearest("attm", paths, 1) == ["layers/block/attn/q"]
    assert nearest("x", []) == []
