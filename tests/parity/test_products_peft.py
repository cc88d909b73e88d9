"""LoHa, LoKr, HiRA and DeLoRA against PEFT's layers: their starts, and HiRA on an embedding.

Trained ones are compared in `test_methods_peft.py`.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_models import error, logits, model_of, peft, stored, their_logits, torch

import vlora_jax as vj
from vlora_jax.adapters.lokr import sides
from vlora_jax.hub.peft import read_peft, write_peft

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own

IN, OUT = 960, 800  # (30·32) × (25·32)
LOHA = {"a1": "hada_w1_b", "b1": "hada_w1_a", "a2": "hada_w2_b", "b2": "hada_w2_a"}  # of linear layers: ours transposed
LOKR = {"w1": "lokr_w1", "a1": "lokr_w1_b", "b1": "lokr_w1_a", "w2": "lokr_w2", "a2": "lokr_w2_b", "b2": "lokr_w2_a"}
HIRA, DELORA = ({"a": f"{name}_A", "b": f"{name}_B"} for name in ("hira", "delora"))
BOTH = {"rank": 8, "decompose_both": True}
CASES = {
    "LoHa": (vj.LoHa(rank=4), LOHA, peft.LoHaConfig(r=4)),
    "LoKr": (vj.LoKr(rank=8), LOKR, peft.LoKrConfig(r=8)),
    "LoKr, second whole": (vj.LoKr(rank=40), LOKR, peft.LoKrConfig(r=40)),
    "LoKr, both products": (vj.LoKr(**BOTH), LOKR, peft.LoKrConfig(r=8, decompose_both=True)),
    "LoKr, LyCORIS": (
        vj.LoKr(**BOTH, start="zero_w2"),
        LOKR,
        peft.LoKrConfig(r=8, decompose_both=True, init_weights="lycoris"),
    ),
    "HiRA": (vj.HiRA(rank=4), HIRA, peft.HiraConfig(r=4)),
    "HiRA, gaussian": (vj.HiRA(rank=8, start="gaussian"), HIRA, peft.HiraConfig(r=8, init_weights="gaussian")),
    "DeLoRA": (vj.DeLoRA(rank=4, boundary=15.0), DELORA, peft.DeloraConfig(r=4)),
}


def theirs(config, names, in_dim=IN, out_dim=OUT):
    """PEFT's layer on a linear one, and what it trains by our names, transposed."""
    torch.manual_seed(0)
    config.target_modules = ["0"]
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(in_dim, out_dim)), config)
    layer = model.base_model.model[0]
    held = {ours: getattr(layer, name) for ours, name in names.items() if hasattr(layer, name)}
    return layer, {ours: held[ours]["default"].detach().numpy().T for ours in held if "default" in held[ours]}


def site(in_dim=IN, out_dim=OUT):
    return vj.Site("up", "kernel", "dense", (), (in_dim, out_dim), (0,), (1,))


@pytest.mark.parametrize("case", CASES)
def test_starts_have_the_same_tensors_zeros_and_spread(case):
    method, names, config = CASES[case]
    drawn = method.init_site(jax.random.key(0), site(), jnp.ones((IN, OUT))).trainable
    layer, expected = theirs(config, names)
    assert {name: leaf.shape for name, leaf in drawn.items() if name != "boundary"} == {
        name: leaf.shape for name, leaf in expected.items()
    }
    for name, leaf in expected.items():
        ours, spread = np.asarray(drawn[name]), leaf.std()
        assert abs(ours.std() - spread) <= 0.2 * spread, name
        if "gaussian" not in case:
            assert abs(np.abs(ours).max() - np.abs(leaf).max()) <= 0.1 * np.abs(leaf).max(), name
    if "boundary" in drawn:
        assert drawn["boundary"] == layer.delora_lambda["default"].item() == 15


def test_sizes_are_split_as_peft_splits_them():
    from peft.tuners.lokr.layer import factorization

    for size, factor in itertools.product((*range(1, 130), 768, 3072, 11008, 50257), (-1, *range(1, 20), 64)):
        assert sides(size, factor) == factorization(size, factor), (size, factor)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 9])
def test_lokr_keeps_the_factors_that_peft_keeps(rank):
    for (in_dim, out_dim), both, factor in itertools.product(((24, 40), (7, 12)), (False, True), (-1, 2, 4, 5)):
        method = vj.LoKr(rank=rank, decompose_both=both, decompose_factor=factor)
        config = peft.LoKrConfig(r=rank, decompose_both=both, decompose_factor=factor)
        shapes = jax.eval_shape(
            lambda m=method, s=site(in_dim, out_dim): m.init_site(jax.random.key(0), s, None).trainable
        )
        expected = theirs(config, LOKR, in_dim, out_dim)[1]
        ours = {name: leaf.shape for name, leaf in shapes.items()}
        assert ours == {name: leaf.shape for name, leaf in expected.items()}, (in_dim, out_dim, both, factor)


def test_delora_has_peft_s_gradient_where_b_is_zero():
    layer, _ = theirs(peft.DeloraConfig(r=4), DELORA)
    rng = np.random.default_rng(0)
    x, cotangent = (rng.normal(size=(5, size)).astype(np.float32) for size in (IN, OUT))
    (layer(torch.from_numpy(x)) * torch.from_numpy(cotangent)).sum().backward()
    names = DELORA | {"boundary": "delora_lambda"}
    slopes = {ours: getattr(layer, name)["default"].grad.numpy().T for ours, name in names.items()}
    ours = {name: jnp.asarray(getattr(layer, name_)["default"].detach().numpy().T) for name, name_ in names.items()}
    kernel = jnp.asarray(layer.base_layer.weight.detach().numpy().T)
    frozen = {"w": jnp.linalg.norm(kernel, axis=1)}
    np.testing.assert_allclose(frozen["w"], layer.delora_w_norm["default"].numpy(), rtol=1e-5)

    def loss(factors):
        y = jnp.asarray(x) @ kernel
        return (vj.DeLoRA(rank=4).forward(jnp.asarray(x), y, kernel, factors | frozen) * cotangent).sum()

    gradient = jax.grad(loss)(ours | {"boundary": ours["boundary"][0]})
    assert not slopes["a"].any()
    for name, slope in slopes.items():
        np.testing.assert_allclose(gradient[name], slope.reshape(gradient[name].shape), atol=1e-5 * np.abs(slope).max())


def test_hira_changes_an_embedding_as_peft_s_does(tmp_path):
    """There, and through our file."""
    torch.manual_seed(3)
    config = peft.HiraConfig(r=3, target_modules=["embed_tokens", "q_proj"])
    theirs = peft.get_peft_model(model_of("llama"), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    model, expected = stored("llama")[1], their_logits("llama", theirs)
    (adapter,) = read_peft(tmp_path / "theirs", model.base, model.names)
    assert error(logits("llama", model.graphdef, model.base, adapter), expected) < 1e-5 * np.abs(expected).max()
    assert error(logits("llama", model.graphdef, model.base, None), expected) > 1e-2
    write_peft(tmp_path / "ours", adapter, model.base, model.names)
    again = peft.PeftModel.from_pretrained(model_of("llama"), tmp_path / "ours").eval()
    assert error(their_logits("llama", again), expected) < 1e-5 * np.abs(expected).max()
