"""AdaLoRA against PEFT: outputs, penalty, and the allocator's budget and masks for a whole run, on the same numbers."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from peft_models import error, load_peft_weights, logits, model_of, peft, stored, their_logits, torch

import vlora_jax as vj
from vlora_jax.errors import AdapterFileError, ConversionError
from vlora_jax.hub.peft import read_peft, write_peft
from vlora_jax.hub.peft_file import TENSORS, read_tensors

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own

LAYERS, WIDTH, INNER, RANK = 3, 6, 9, 5
OPTIONS = {"rank": RANK, "target_rank": 2, "alpha": 7.0, "steps": 14, "warmup": 2, "final": 3}
X = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)


class TorchModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.ModuleList([torch.nn.Linear(WIDTH, INNER, bias=False) for _ in range(LAYERS)])
        self.down = torch.nn.ModuleList([torch.nn.Linear(INNER, WIDTH, bias=False) for _ in range(LAYERS)])

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return x


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, INNER, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(INNER, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class Model(nnx.Module):
    """The same with its layers stacked."""

    def __init__(self, rngs):
        self.layers = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Block))(rngs)

    def __call__(self, x):
        graphdef, layers = nnx.split(self.layers)
        return jax.lax.scan(lambda h, layer: (nnx.merge(graphdef, layer)(h), None), x, layers)[0]


def stacked(model, read):
    """`{"layers/up": read of its layers, …}`, the layers first."""
    return {f"layers/{name}": np.stack([read(m) for m in getattr(model, name)]) for name in ("up", "down")}


def tensors(model, read=lambda parameter: parameter):
    """Our tensors of every site from PEFT's parameters, or from what `read` makes of them."""
    take = {
        "a": lambda m: read(m.lora_A["default"]).detach().numpy().T.copy(),
        "e": lambda m: read(m.lora_E["default"]).detach().numpy()[:, 0].copy(),
        "b": lambda m: read(m.lora_B["default"]).detach().numpy().T.copy(),
    }
    by_name = {name: stacked(model, function) for name, function in take.items()}
    return {path: {name: by_name[name][path] for name in take} for path in ("layers/up", "layers/down")}


def randomise(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
                parameter.grad = torch.randn_like(parameter)


@pytest.fixture(params=[{"interval": 1}, {"interval": 2, "mean_decay": 0.6, "spread_decay": 0.7}], ids=["1", "2"])
def pair(request):
    """PEFT's model and our adapter with the same numbers."""
    extra = request.param
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        init_r=RANK, target_r=2, lora_alpha=7, total_step=14, tinit=2, tfinal=3, deltaT=extra["interval"],
        beta1=extra.get("mean_decay", 0.85), beta2=extra.get("spread_decay", 0.85),
        target_modules=r"(up|down)\.\d",
    )  # fmt: skip
    theirs = peft.get_peft_model(TorchModel(), config)
    randomise(theirs, 1)
    torch_layers = theirs.base_model.model
    graphdef, shapes = vj.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
    kernels = stacked(torch_layers, lambda m: m.base_layer.weight.detach().numpy().T.copy())
    base = jax.tree.map(lambda leaf: leaf, shapes)
    for name in ("up", "down"):
        base["layers"][name]["kernel"].set_value(jnp.asarray(kernels[f"layers/{name}"]))
    adapter = vj.init(vj.AdaLoRA(**OPTIONS, **extra), jax.random.key(0), base)
    trainable = adapter.trainable | {"sites": jax.tree.map(jnp.asarray, tensors(torch_layers))}
    return theirs, graphdef, base, adapter.with_trainable(trainable)


def test_outputs_and_the_penalty_are_peft_s(pair):
    theirs, graphdef, base, adapter = pair
    expected = theirs(torch.tensor(X)).detach().numpy()
    np.testing.assert_allclose(vj.apply(graphdef, base, adapter, X), expected, atol=1e-5)

    class Output:
        loss = torch.zeros(())

    theirs.base_model.model.forward = lambda *args, **kwargs: Output()
    loss = theirs.base_model.forward().loss
    np.testing.assert_allclose(adapter.method.penalty(adapter), float(loss.detach()), rtol=1e-5)


def test_budget_and_masks_are_peft_s_at_every_step(pair):
    theirs, _, _, adapter = pair
    layers, allocator, method = theirs.base_model.model, theirs.base_model.rankallocator, adapter.method
    advance = jax.jit(lambda step, adapter, grads: method.advance(step, adapter, grads, ())[0])
    sites = lambda adapter, tree: adapter.trainable | {"sites": jax.tree.map(jnp.asarray, tree)}
    survivors = []
    for t in range(1, 15):
        randomise(theirs, 100 + t)
        adapter = adapter.with_trainable(sites(adapter, tensors(layers)))
        grads = sites(adapter, tensors(layers, lambda parameter: parameter.grad))
        theirs.base_model.update_and_allocate(t)
        adapter = advance(jnp.int32(t - 1), adapter, grads)
        for path, factors in tensors(layers).items():
            np.testing.assert_array_equal(adapter.trainable["sites"][path]["e"], factors["e"], err_msg=f"{path} {t}")
        assert method.budget(t, 2 * LAYERS) == allocator.budget_schedule(t)[0]
        survivors.append(sum(int((np.asarray(f["e"]) != 0).sum()) for f in adapter.trainable["sites"].values()))
    assert survivors[0] == 2 * LAYERS * RANK
    assert survivors[-4:] == [2 * LAYERS * 2] * 4
    pattern = theirs.base_model.peft_config["default"].rank_pattern
    for path in ("layers/up", "layers/down"):
        alive = np.asarray(adapter.frozen["sites"][path]["alive"])
        name = path.removeprefix("layers/")
        theirs_alive = [[v for k, v in pattern.items() if f"{name}.{layer}." in k] for layer in range(LAYERS)]
        np.testing.assert_array_equal(alive, np.array(theirs_alive)[:, 0])


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A tiny Llama of PEFT with triplets cut, in one module all of them, and its directory."""
    folder = tmp_path_factory.mktemp("cut") / "theirs"
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, tfinal=2, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(model_of("llama"), config)
    pattern, rng = {}, np.random.default_rng(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.4)
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "lora_E"):
                kept = rng.random(4) < 0.5 if pattern else np.zeros(4, bool)
                module.lora_E["default"].mul_(torch.tensor(kept)[:, None])
                pattern[f"{name}.lora_E.default"] = kept.tolist()
    expected = their_logits("llama", model.eval())
    model.peft_config["default"].rank_pattern = pattern
    model.save_pretrained(folder)
    return folder, expected, pattern


def test_a_file_with_triplets_cut_means_what_peft_makes_of_it(cut, tmp_path):
    folder, expected, pattern = cut
    model = stored("llama")[1]
    (adapter,) = read_peft(folder, model.base, model.names)
    ours = logits("llama", model.graphdef, model.base, adapter)
    assert error(ours, expected) < 1e-5 * max(1, np.abs(expected).max())
    assert error(logits("llama", model.graphdef, model.base, None), expected) > 1e-2
    alive = sum(int(np.asarray(own["alive"]).sum()) for own in adapter.frozen["sites"].values())
    assert alive == sum(map(sum, pattern.values()))

    write_peft(tmp_path / "ours", adapter, model.base, model.names)
    before, after = (read_tensors(path / TENSORS)[0] for path in (folder, tmp_path / "ours"))
    assert {len(value) for key, value in after.items() if key.endswith("lora_E")} >= {0}
    assert set(before) == set(after)
    assert all(
        value.tobytes() == before[key].tobytes() and value.shape == before[key].shape for key, value in after.items()
    )
    again = peft.get_peft_model(model_of("llama"), peft.PeftConfig.from_pretrained(tmp_path / "ours"))
    result = peft.set_peft_model_state_dict(again, load_peft_weights(str(tmp_path / "ours")))
    assert not result.unexpected_keys
    assert error(their_logits("llama", again.eval()), expected) < 1e-5 * max(1, np.abs(expected).max())


def test_a_trained_adapter_is_written_without_what_was_cut(cut, tmp_path):
    """A and B of dead triplets and the rule's own state stay out of the file; the change is the same."""
    model = stored("llama")[1]
    (adapter,) = read_peft(cut[0], model.base, model.names)
    fill = lambda leaf: jnp.where(leaf == 0, 0.5, leaf)
    sites = {path: own | {"a": fill(own["a"]), "b": fill(own["b"])} for path, own in adapter.trainable["sites"].items()}
    state = {path: own | {"a_mean": own["a_mean"] + 1.0} for path, own in adapter.frozen["sites"].items()}
    trained = vj.Adapter(
        adapter.trainable | {"sites": sites}, {"sites": state, "shared": {}}, adapter.method, adapter.sites
    )
    for name, each in (("read", adapter), ("trained", trained)):
        write_peft(tmp_path / name, each, model.base, model.names)
    assert (tmp_path / "read" / TENSORS).read_bytes() == (tmp_path / "trained" / TENSORS).read_bytes()


def test_a_pattern_that_does_not_fit_is_refused(cut, tmp_path):
    model, config = stored("llama")[1], json.loads((cut[0] / "adapter_config.json").read_text())
    wrong = dict(config["rank_pattern"])
    wrong.pop(next(iter(wrong)))
    shorter = {key: mask[:3] for key, mask in config["rank_pattern"].items()}
    for pattern, message in ((wrong, "rank_pattern and the adapted modules differ, as in"), (shorter, "has 3 entries")):
        shutil.copytree(cut[0], tmp_path, dirs_exist_ok=True)
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": pattern}))
        with pytest.raises(AdapterFileError, match=message):
            read_peft(tmp_path, model.base, model.names)


def test_without_the_length_of_its_training_it_is_not_written(tmp_path):
    model = stored("llama")[1]
    adapter = vj.init(vj.AdaLoRA(rank=3, target_rank=2, targets="q"), jax.random.key(0), model.base)
    with pytest.raises(ConversionError, match="adalora: steps is 0"):
        write_peft(tmp_path / "out", adapter, model.base, model.names)
