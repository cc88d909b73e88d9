"""LoRA against PEFT: outputs, merged weights, gradients, steps, dropout and starts, on the same weights."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import filled

import vlora_jax as vj
from vlora_jax.adapters import view
from vlora_jax.adapters.trees import flatten
from vlora_jax.models.stack import Stack
from vlora_jax.training.optimizers import OptimizerConfig, optimizer

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
create_loraplus_optimizer = pytest.importorskip("peft.optimizers").create_loraplus_optimizer
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own

VOCABULARY, WIDTH, INNER, LAYERS = 11, 6, 9, 3
IDS = np.random.default_rng(0).integers(0, VOCABULARY - 1, (4, 5))  # the last word never occurs
COTANGENT = np.random.default_rng(1).normal(size=(4, 5, WIDTH)).astype(np.float32)
TARGETS = ("embed", "up", "down")


class TorchLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(WIDTH, INNER), torch.nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, h):
        return h + self.down(torch.tanh(self.up(h)))


class TorchModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.layers = torch.nn.ModuleList([TorchLayer() for _ in range(LAYERS)])

    def forward(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        return h


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, INNER, rngs=rngs)
        self.down = nnx.Linear(INNER, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, h):
        return h + self.down(jnp.tanh(self.up(h)))


class Model(nnx.Module):
    """The same with its layers stacked."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = Stack(Layer, LAYERS, rngs=rngs)

    def __call__(self, ids):
        return self.layers(self.embed(ids))


def base_leaves(model):
    """A torch model's weights, as the stacked model keeps them: transposed, embeddings as they are."""
    stacked = lambda read: np.stack([read(layer).detach().numpy().copy() for layer in model.layers])
    return {
        "embed/embedding": model.embed.weight.detach().numpy().copy(),
        "layers/block/up/kernel": stacked(lambda layer: layer.up.weight.T),
        "layers/block/up/bias": stacked(lambda layer: layer.up.bias),
        "layers/block/down/kernel": stacked(lambda layer: layer.down.weight.T),
    }


def factors(model, read=lambda parameter: parameter):
    """What trains at every site (or what `read` makes of it, such as gradients), as an adapter keeps it."""

    def own(module):
        kind = "embedding_" if isinstance(module, peft.tuners.lora.Embedding) else ""
        held = {name: getattr(module, f"lora_{kind}{name.upper()}")["default"] for name in "ab"}
        if "default" in (module.lora_magnitude_vector or {}):
            held["m"] = module.lora_magnitude_vector["default"]
        weight = lambda holder: getattr(holder, "weight", holder)
        return {name: read(weight(holder)).detach().numpy().T.copy() for name, holder in held.items()}

    found = {"embed": own(model.embed)}
    for target in ("up", "down"):
        layers = [own(getattr(layer, target)) for layer in model.layers]
        found[f"layers/block/{target}"] = jax.tree.map(lambda *each: np.stack(each), *layers)
    return found


def error(got, expected):
    return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


CASES = {
    "plain": ({"rank": 2, "alpha": 3.0}, {"r": 2, "lora_alpha": 3}),
    "rank-stabilised": (
        {"rank": 4, "alpha": 3.0, "rank_stabilised": True},
        {"r": 4, "lora_alpha": 3, "use_rslora": True},
    ),
    "patterns": (
        {"rank": 2, "alpha": 3.0, "rank_pattern": {"down": 3, "embed": 1}, "alpha_pattern": {"up": 8.0}},
        {"r": 2, "lora_alpha": 3, "rank_pattern": {"down": 3, "embed": 1}, "alpha_pattern": {"up": 8}},
    ),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request):
    """One adapter with random factors on both sides: forward, backward, a step, then merged."""
    ours, theirs = request.param
    torch.manual_seed(0)
    bare = TorchModel()
    leaves = base_leaves(bare)
    model = peft.get_peft_model(bare, peft.LoraConfig(target_modules=list(TARGETS), **theirs)).base_model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    before = factors(model.model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    output = model(torch.from_numpy(IDS))
    (output * torch.from_numpy(COTANGENT)).sum().backward()
    gradients = factors(model.model, read=lambda parameter: parameter.grad)
    optimizer.step()
    stepped = factors(model.model)

    graphdef, shapes = vj.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
    base = jax.tree.unflatten(jax.tree.structure(shapes), [jnp.asarray(leaves[path]) for path in flatten(shapes)])
    adapter = vj.init(vj.LoRA(targets=TARGETS, **ours), jax.random.key(0), base)
    adapter = adapter.with_trainable(adapter.trainable | {"sites": jax.tree.map(jnp.asarray, before)})

    @jax.jit
    def run(trainable):
        bound = lambda trainable: vj.apply(graphdef, base, adapter.with_trainable(trainable), jnp.asarray(IDS))
        gradients = jax.grad(lambda trainable: (bound(trainable) * COTANGENT).sum())(trainable)
        optimizer = optax.adamw(0.01, weight_decay=0.1)
        updates, _ = optimizer.update(gradients, optimizer.init(trainable), trainable)
        stepped = optax.apply_updates(trainable, updates)
        return bound(trainable), gradients["sites"], stepped["sites"], vj.merge(base, adapter.with_trainable(stepped))

    our_output, our_gradients, our_step, our_merged = run(adapter.trainable)
    return SimpleNamespace(
        output=(our_output, output.detach().numpy()),
        gradients=(our_gradients, gradients),
        stepped=(our_step, stepped),
        merged=(flatten(our_merged), base_leaves(model.merge_and_unload())),
        base=leaves,
    )


def test_outputs_agree(case):
    assert error(*case.output) < 1e-6


def test_gradients_of_a_and_b_agree(case):
    ours, theirs = (flatten(tree) for tree in case.gradients)
    assert set(ours) == set(theirs)
    for path, expected in theirs.items():
        assert error(ours[path], expected) < 1e-5, path


def test_a_step_of_adamw_agrees(case):
    ours, theirs = (flatten(tree) for tree in case.stepped)
    for path, expected in theirs.items():
        assert error(ours[path], expected) < 1e-6, path


def test_merged_weights_agree(case):
    """After the step: every kernel and the embedding have changed, biases have not."""
    ours, theirs = case.merged
    for path, expected in theirs.items():
        assert error(ours[path], expected) < 1e-6, path
        assert np.array_equal(expected, case.base[path]) == path.endswith("bias")


@pytest.mark.parametrize("kind", [vj.LoRA, vj.DoRA])
def test_steps_of_lora_plus_agree(kind):
    """PEFT's rate is the one that a run takes for A where it gives none: plain LoRA's ÷ √ratio.

    Three steps from zero, on the same gradients. PEFT trains the factors of embeddings at 1e-6, ours at the run's rate
    unless its groups give another, B's times the ratio.
    """
    torch.manual_seed(0)
    method = kind(rank=2, b_rate=16.0, targets=TARGETS)
    rate = OptimizerConfig().resolved(method).rate
    config = peft.LoraConfig(r=2, target_modules=list(TARGETS), use_dora=kind is vj.DoRA)
    model = peft.get_peft_model(TorchModel(), config)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=16.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    read = lambda what: factors(model.base_model.model, what)
    with torch.no_grad():
        for parameter in trained:
            parameter.zero_()

    _, shapes = vj.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
    adapter = jax.eval_shape(lambda base: vj.init(method, jax.random.key(0), base), filled(shapes, 0))
    groups = {"embed/a": 1e-6 / rate, "embed/b": 1e-6 / rate / 16}
    ours = optimizer(
        OptimizerConfig(schedule="constant", warmup=0, clip=None, groups=groups), 10, adapter.trainable, adapter
    )
    weights = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), adapter.trainable)
    state, step = ours.init(weights), jax.jit(ours.update)
    for _ in range(3):
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape)
        slopes = jax.tree.map(jnp.asarray, weights | {"sites": read(lambda parameter: parameter.grad)})
        theirs.step()
        updates, state = step(slopes, state, weights)
        weights = optax.apply_updates(weights, updates)
    expected = flatten(read(lambda parameter: parameter))
    assert set(flatten(weights["sites"])) == set(expected)
    for path, leaf in flatten(weights["sites"]).items():
        assert error(leaf, expected[path]) < 1e-5, path


def test_dora_drops_what_peft_s_drops(monkeypatch):
    """Outputs and gradients in training with one mask on both sides; in evaluation, nothing is dropped."""
    rng = np.random.default_rng(0)
    x, cotangent = (rng.normal(size=(5, size)).astype(np.float32) for size in (WIDTH, INNER))
    mask = 2 * rng.integers(0, 2, (5, WIDTH)).astype(np.float32)
    torch.manual_seed(0)
    bare = torch.nn.Sequential(torch.nn.Linear(WIDTH, INNER))
    array = lambda tensor: jnp.asarray(tensor.detach().numpy().T.copy())
    base = {"kernel": array(bare[0].weight), "bias": array(bare[0].bias)}
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], lora_dropout=0.5, use_dora=True)
    model = peft.get_peft_model(bare, config)
    layer = model.base_model.model[0]
    monkeypatch.setattr(layer.lora_dropout["default"], "forward", lambda x: x * torch.from_numpy(mask))
    monkeypatch.setattr(view, "dropout", lambda x, rate, key: x * mask)
    tensors = {
        "a": layer.lora_A["default"].weight,
        "b": layer.lora_B["default"].weight,
        "m": layer.lora_magnitude_vector["default"].weight,
    }
    with torch.no_grad():
        for parameter in tensors.values():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    inputs = torch.from_numpy(x).requires_grad_()
    expected = model.train()(inputs)
    (expected * torch.from_numpy(cotangent)).sum().backward()
    whole = model.eval()(inputs).detach().numpy()

    graphdef, shapes = vj.split(nnx.eval_shape(lambda: nnx.Linear(WIDTH, INNER, rngs=nnx.Rngs(0))))
    method = vj.DoRA(rank=2, alpha=3.0, dropout=0.5)
    adapter = jax.eval_shape(lambda: vj.init(method, jax.random.key(0), filled(shapes, 0)))
    trainable = adapter.trainable | {"sites": {"": jax.tree.map(array, tensors)}}

    @jax.jit
    def run(trainable, x):
        call = lambda trainable, x, key: vj.apply(graphdef, base, adapter.with_trainable(trainable), x, key=key)
        trained = lambda trainable, x: (call(trainable, x, jax.random.key(0)) * cotangent).sum()
        outputs = call(trainable, x, jax.random.key(0)), call(trainable, x, None)
        return outputs, jax.grad(trained, argnums=(0, 1))(trainable, x)

    (dropped, kept), (slopes, slope) = run(trainable, x)
    assert error(dropped, expected.detach().numpy()) < 1e-6
    assert error(kept, whole) < 1e-6
    assert error(dropped, whole) > 0.1
    assert error(slope, inputs.grad.numpy()) < 1e-5
    for name, parameter in tensors.items():
        assert error(slopes["sites"][""][name], parameter.grad.numpy().T) < 1e-5, name


@pytest.mark.parametrize("start", ["default", "gaussian"])
def test_both_start_alike(start):
    """Ten thousand draws each of A in ±1/√in, or normal at 1/r; an embedding's B standard normal."""
    inputs, rank = 640, 16
    bare = torch.nn.Sequential(torch.nn.Linear(inputs, 32), torch.nn.Embedding(32, inputs))
    theirs = peft.LoraConfig(
        r=rank, target_modules=["0", "1"], init_lora_weights=True if start == "default" else "gaussian"
    )
    if start == "gaussian":  # PEFT gives an embedding the default start whatever is asked for
        theirs.target_modules = {"0"}
    torch.manual_seed(0)
    model = peft.get_peft_model(bare, theirs).base_model.model
    linear = model[0]
    ours = vj.LoRA(rank=rank, start="zero_b" if start == "default" else "gaussian")
    dense = vj.Site("up", "kernel", "dense", (), (inputs, 32), (0,), (1,))
    drawn = ours.init_stack(jax.random.key(0), dense).trainable
    pairs = [
        (drawn["a"], linear.lora_A["default"].weight.detach().numpy().T),
        (drawn["b"], linear.lora_B["default"].weight.detach().numpy().T),
    ]
    if start == "default":
        table = vj.Site("embed", "embedding", "embed", (), (32, inputs), (0,), (1,))
        drawn = ours.init_stack(jax.random.key(0), table).trainable
        embed = model[1]
        pairs.append((drawn["a"], embed.lora_embedding_A["default"].detach().numpy().T))
        pairs.append((drawn["b"], embed.lora_embedding_B["default"].detach().numpy().T))
    for got, expected in pairs:
        assert got.shape == expected.shape
        if not expected.any():
            assert not np.any(got)
            continue
        for moment in (np.std, lambda values: np.abs(values).mean(), lambda values: np.quantile(values, 0.9)):
            assert abs(moment(np.asarray(got)) / moment(expected) - 1) < 0.05
        if start == "default" and expected is pairs[0][1]:
            assert max(np.abs(got).max(), np.abs(expected).max()) <= inputs**-0.5
