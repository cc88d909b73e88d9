"""How treescope shows an adapter, where it is installed."""

import jax
import jax.numpy as jnp
import pytest

import vlora_jax as vj

treescope = pytest.importorskip("treescope", reason="treescope is in the extra notebook")


def test_an_adapter_is_summed_up_in_a_line_and_can_be_unfolded():
    base = {"mlp": {"up": {"kernel": jnp.ones((6, 5))}, "down": {"kernel": jnp.ones((5, 6))}}}
    adapter = vj.init(vj.LoRA(rank=2), jax.random.key(0), base)
    text = treescope.render_to_text(adapter)
    assert "# ΔW = s·A B; 44 numbers at 2 kernels" in text
    assert "LoRA(" in text
    assert "'mlp/up': 'dense 6×5'" in text
    assert "TreescopeContainer" in treescope.render_to_html(adapter)
