"""PiSSA and OLoRA against PEFT: starts, and what a layer with other A and B then computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import moved
from peft_models import error, load_peft_weights, logits, model_of, peft, stored, their_logits, torch

import vlora_jax as vj

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 12)), jnp.float32)
GRAPH = vj.split(nnx.eval_shape(lambda: nnx.Linear(12, 9, rngs=nnx.Rngs(0))))[0]
STARTS = {
    "pissa": (vj.PiSSA, {}, 1e-6),
    "pissa_niter_16": (vj.PiSSA, {"niter": 16}, 1e-4),
    "olora": (vj.OLoRA, {}, 1e-6),
}


def transposed(parameter):
    return jnp.asarray(parameter.detach().numpy().T.copy())


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("start", STARTS)
def test_starts_and_trained_layers_are_peft_s(start, stabilised):
    kind, options, tolerance = STARTS[start]
    method = kind(rank=3, alpha=5.0, rank_stabilised=stabilised, **options)
    torch.manual_seed(0)
    bare = torch.nn.Sequential(torch.nn.Linear(12, 9))
    base = {"kernel": transposed(bare[0].weight), "bias": transposed(bare[0].bias)}
    before = bare(torch.tensor(np.asarray(X))).detach().numpy()
    config = peft.LoraConfig(
        target_modules=["0"], r=3, lora_alpha=5, use_rslora=stabilised, init_lora_weights=start, bias="none"
    )
    model = peft.get_peft_model(bare, config)
    layer = model.base_model.model[0]
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    a0, b0 = map(transposed, weights)
    adapter = jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base)
    ours = adapter.factors("")
    np.testing.assert_allclose(ours["a0"] @ ours["b0"], a0 @ b0, atol=tolerance)
    if start == "pissa":
        np.testing.assert_allclose(np.linalg.norm(ours["a0"], axis=0), np.linalg.norm(a0, axis=0), atol=1e-6)
    apply = jax.jit(lambda adapter: vj.apply(GRAPH, base, adapter, X))
    np.testing.assert_allclose(apply(adapter), before, atol=1e-6)
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.3 * torch.randn(weight.shape))
    trained = dict(zip("ab", map(transposed, weights), strict=True))
    adapter = adapter.with_trainable(adapter.trainable | {"sites": {"": trained}})
    after = model(torch.tensor(np.asarray(X))).detach().numpy()
    np.testing.assert_allclose(apply(adapter), after, atol=10 * tolerance)
    assert np.abs(after - before).max() > 0.1


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("kind", [vj.PiSSA, vj.OLoRA])
def test_what_we_write_peft_reads_as_a_lora_of_twice_the_rank(tmp_path, kind, stabilised):
    """Of a model with stacked layers of different ranks, one not adapted at all."""
    _, model = stored("llama")
    method = kind(
        rank=3, alpha=5.0, rank_stabilised=stabilised, targets="q|v|down", rank_pattern={"q": [2, 0, 4], "v": 1}
    )
    adapter = moved(jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(model.base))
    vj.write_peft(tmp_path / "adapter", adapter, model.base, model.names)
    (again,) = vj.read_peft(tmp_path / "adapter", model.base, model.names)
    assert type(again.method) is vj.LoRA
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    theirs = peft.get_peft_model(model_of("llama"), config)
    result = peft.set_peft_model_state_dict(theirs, load_peft_weights(str(tmp_path / "adapter")))
    assert not result.unexpected_keys
    expected = their_logits("llama", theirs.eval())
    for each in (adapter, again):
        assert error(logits("llama", model.graphdef, model.base, each), expected) < 1e-5 * np.abs(expected).max()
    assert error(logits("llama", model.graphdef, model.base, None), expected) > 1e-2
