"""Intruder dimensions, counted and scaled down, against PEFT's own utility on the same matrices."""

import re

import numpy as np
import pytest
from planted import base_of, change_of, lora_on, normal, orthonormal

torch = pytest.importorskip("torch")
intruders = pytest.importorskip("peft.tuners.lora.intruders", reason="PEFT with this utility is not installed")

from peft import LoraConfig, get_peft_model  # noqa: E402  behind the skips

from vlora_jax.inspection.intruders import intruder_rows, reduce_intruders  # noqa: E402

IN, OUT, RANK, ALPHA = 32, 48, 2, 6.0
KERNEL = normal(IN, OUT)


class Single(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Linear(IN, OUT, bias=False)


@pytest.mark.parametrize("strength", [0.01, 3.0, 10.0])
@pytest.mark.parametrize("keep", [0.75, 0.0])
def test_counts_and_reduced_changes_are_pefts(strength, keep):
    a, b = strength * orthonormal(IN, RANK), orthonormal(OUT, RANK).T
    ours = lora_on("w", (), np.float32(a), np.float32(b), ALPHA)
    model = get_peft_model(Single(), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["w"]))
    layer = model.base_model.model.w
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor(KERNEL.T))
        layer.lora_A["default"].weight.copy_(torch.tensor(a.T))
        layer.lora_B["default"].weight.copy_(torch.tensor(b.T))
    said = []
    with torch.no_grad():
        intruders.reduce_intruder_dimension(model, mitigation_lambda=keep, logging_sink=said.append)
    counted = re.search(r"Intruders: (\d+)", " ".join(said))
    (row,) = intruder_rows(base_of("w", KERNEL), ours)
    assert row.output == (int(counted[1]) if counted else 0)
    reduced, _ = reduce_intruders(base_of("w", KERNEL), ours, keep=keep)
    expected = layer.get_delta_weight("intruder_reduced").detach().numpy().T
    np.testing.assert_allclose(change_of(reduced, "w"), expected, atol=1e-4 * np.abs(expected).max())
