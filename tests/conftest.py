"""Before JAX starts: eight virtual devices, quick compilation, and a cache of what was compiled before."""

import os
from pathlib import Path

from compiling import QUICK

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import jaxtyping
import pytest


@pytest.fixture(autouse=True, scope="module")
def _free_compiled_programs():
    """Programs of one test module would otherwise stay in memory until the last."""
    yield
    jax.clear_caches()


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def unchecked(monkeypatch):
    """Calls as users make them, their types not checked: for mistakes that have an error of their own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
