"""Fixtures of the adapters' tests."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked(monkeypatch):
    """Calls as users make them, their types not checked: for mistakes that have an error of their own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
