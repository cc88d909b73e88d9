"""PiSSA and OLoRA against PEFT: starts, what layers with other A and B then compute, a step and merged weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import moved
from peft_models import error, load_peft_weights, logits, model_of, peft, stored, their_logits, torch

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten

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


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(12, 9, rngs=rngs), nnx.Linear(9, 7, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_gradients_a_step_of_adamw_and_merged_weights_are_peft_s(start):
    """Of two layers, from PEFT's own A₀ and B₀, with other A and B."""
    cotangent = np.random.default_rng(1).normal(size=(4, 7)).astype(np.float32)
    torch.manual_seed(0)
    bare = torch.nn.Sequential(torch.nn.Linear(12, 9), torch.nn.Tanh(), torch.nn.Linear(9, 7))
    places = {"first": "0", "second": "2"}
    weights = lambda model: {
        path: {"bias": transposed(model[int(place)].bias), "kernel": transposed(model[int(place)].weight)}
        for path, place in places.items()
    }
    base = weights(bare)
    model = peft.get_peft_model(
        bare, peft.LoraConfig(target_modules=["0", "2"], r=3, lora_alpha=5, init_lora_weights=start)
    )
    layers = {path: model.base_model.model[int(place)] for path, place in places.items()}
    tensors = {
        path: {"a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}
        for path, layer in layers.items()
    }
    trained = [weight for own in tensors.values() for weight in own.values()]
    begun = jax.tree.map(transposed, tensors)
    with torch.no_grad():
        for weight in trained:
            weight.add_(0.3 * torch.randn(weight.shape))
    before = jax.tree.map(transposed, tensors)
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    (model(torch.tensor(np.asarray(X))) * torch.from_numpy(cotangent)).sum().backward()
    slopes = jax.tree.map(lambda weight: transposed(weight.grad), tensors)
    optimizer.step()
    stepped = jax.tree.map(transposed, tensors)
    merged = weights(model.merge_and_unload())

    graphdef, _ = vj.split(nnx.eval_shape(lambda: Pair(nnx.Rngs(0))))
    method = {"pissa": vj.PiSSA, "olora": vj.OLoRA}[start](rank=3, alpha=5.0)
    adapter = jax.eval_shape(lambda base: vj.init(method, jax.random.key(0), base), base)
    frozen = {path: {"a0": own["a"], "b0": own["b"]} for path, own in begun.items()}
    adapter = dataclasses.replace(adapter, frozen=adapter.frozen | {"sites": frozen})

    @jax.jit
    def run(trainable):
        out = lambda trainable: vj.apply(graphdef, base, adapter.with_trainable(trainable), X)
        slopes = jax.grad(lambda trainable: (out(trainable) * cotangent).sum())(trainable)
        adamw = optax.adamw(0.01, weight_decay=0.1)
        stepped = optax.apply_updates(trainable, adamw.update(slopes, adamw.init(trainable), trainable)[0])
        return slopes["sites"], stepped["sites"], vj.merge(base, adapter.with_trainable(stepped))

    found = run(adapter.trainable | {"sites": before})
    for ours, theirs, tolerance in zip(found, (slopes, stepped, merged), (1e-5, 1e-6, 1e-6), strict=True):
        theirs = flatten(theirs)
        assert set(flatten(ours)) == set(theirs)
        for path, leaf in flatten(ours).items():
            assert error(leaf, theirs[path]) < tolerance * np.abs(theirs[path]).max(), path
    assert error(merged["first"]["kernel"], base["first"]["kernel"]) > 0.1


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
