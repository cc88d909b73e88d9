"""What PEFT draws with torch's generator and doesn't save, bit by bit: RandLoRA's bases and FourierFT's places."""

import numpy as np
import pytest
from helpers import stacked_sites

import vlora_jax as vj
from vlora_jax.adapters.fourierft import permuted
from vlora_jax.adapters.randlora import bfloat16_within
from vlora_jax.adapters.torch_draws import TorchDraws

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own


@pytest.mark.parametrize("seed", [0, 777, 2**33 + 5])
def test_bfloat16_numbers_of_a_seed(seed):
    """The largest of so many are rounded up to the bound, which is not in reach."""
    theirs = torch.empty(70_000, dtype=torch.bfloat16).uniform_(
        -0.3, 0.3, generator=torch.Generator().manual_seed(seed)
    )
    np.testing.assert_array_equal(
        bfloat16_within(TorchDraws(seed), 0.3, (70_000,)).astype(np.float32), theirs.float().numpy()
    )


@pytest.mark.parametrize("total", [1, 50, 4096, 589_824])
def test_the_first_entries_of_a_permutation(total):
    count = min(total, 1000)
    theirs = torch.randperm(total, generator=torch.Generator().manual_seed(777))[:count]
    np.testing.assert_array_equal(permuted(total, count, 777), theirs.numpy())


@pytest.mark.parametrize("bases", ["dense", "sparse", "very_sparse"])
@pytest.mark.parametrize(("rank", "key"), [(8, 0), (7, 3)])
def test_bases_of_randlora(bases, rank, key):
    model = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.Linear(64, 24))
    sparse = {} if bases == "dense" else {bases: True}
    config = peft.RandLoraConfig(r=rank, projection_prng_key=key, target_modules=["0", "1"], **sparse)
    tuned = peft.get_peft_model(model, config).base_model
    method = vj.RandLoRA(rank=rank, bases=bases, projection_key=key)
    ours = method.draw(stacked_sites(1, one=(48, 64), two=(64, 24)))
    theirs = {"a": tuned.randlora_A["default"][:, 0], "b": tuned.randlora_B["default"]}
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value.numpy(), rtol=0 if bases == "dense" else 2e-7, atol=0)
