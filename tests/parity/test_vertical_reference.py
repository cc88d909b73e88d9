"""Vertical LoRA against the authors' released code, of package `vlora` 0.1.2, on the same weights."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.models.stack import Stack
from vlora_jax.vertical.config import Vertical
from vlora_jax.vertical.expand import expand

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own

WIDTH, INNER, SIZE, COMPOUNDS, RANK, ALPHA, TOKENS = 6, 9, 4, 2, 2, 3, 5
TARGETS = ("up", "down")


@pytest.fixture(scope="module")
def vlorafy():
    """The class transform of the released code; the package itself imports timm, which this needs not."""
    package = importlib.util.find_spec("vlora")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package vlora is not installed")
    path = Path(package.submodule_search_locations[0]) / "utils" / "vlorafy.py"
    spec = importlib.util.spec_from_file_location("vlorafy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.vlorafy


class TorchLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(WIDTH, INNER), torch.nn.Linear(INNER, WIDTH)

    def forward(self, h):
        return h + self.down(torch.tanh(self.up(h)))


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(WIDTH, INNER, rngs=rngs), nnx.Linear(INNER, WIDTH, rngs=rngs)

    def __call__(self, h):
        return h + self.down(jnp.tanh(self.up(h)))


def released_stack(vlorafy, enabled):
    """Two compounds built as the released models build them: a layer, and vlorafied copies that hang on it."""
    torch.manual_seed(0)
    layers = []
    for _ in range(COMPOUNDS):
        base = TorchLayer()
        later = [
            vlorafy(TorchLayer)(
                vl_base_module=base,
                vl_param_name=[f"{target}.weight" for target in TARGETS],
                vl_rank=RANK,
                vl_alpha=ALPHA,
                vl_enabled=enabled,
            )
            for _ in range(SIZE - 1)
        ]
        layers += [base, *later]
    return layers


def leaves_of(layers, increments, read=lambda parameter: parameter):
    """Parameters of the released stack (or what `read` makes of them) by the paths of ours."""
    array = lambda parameter: read(parameter).detach().numpy().copy()
    compounds = [layers[start : start + SIZE] for start in range(0, len(layers), SIZE)]
    leaves = {}
    for target in TARGETS:
        of = lambda layer, target=target: getattr(layer, target)
        leaves[f"block/{target}/bias"] = np.stack([array(of(layer).bias) for layer in layers])
        leaves[f"block/{target}/kernel"] = np.stack([array(of(base).weight).T for base, *_ in compounds])
        if increments:
            factors = lambda layer, of=of: of(layer).parametrizations.weight[0]
            grid = lambda one: np.stack([np.stack([one(layer) for layer in later]) for _, *later in compounds])
            leaves[f"increments/lora/{target}/a"] = grid(lambda layer: array(factors(layer).A).T)  # theirs (r, in)
            leaves[f"increments/lora/{target}/b"] = grid(lambda layer: array(factors(layer).B))  # theirs (r, out)
    return leaves


@pytest.mark.parametrize("enabled", [True, False], ids=["star", "hard tying"])
@pytest.mark.parametrize("path", ["factored", "materialised"])
def test_kernels_outputs_and_gradients_are_those_of_the_released_code(vlorafy, enabled, path):
    layers = released_stack(vlorafy, enabled)
    h, cotangent = np.random.default_rng(0).normal(size=(2, TOKENS, WIDTH)).astype(np.float32)
    out = torch.from_numpy(h)
    for layer in layers:
        out = layer(out)
    (out * torch.from_numpy(cotangent)).sum().backward()

    increment = vj.LoRA(rank=RANK, alpha=float(ALPHA), start="kaiming_both")
    vertical = Vertical(size=SIZE, increment=increment, enabled=enabled, path=path)
    model = lambda: Stack(Layer, SIZE * COMPOUNDS, vertical=vertical, rngs=nnx.Rngs(0))
    graphdef, shapes = vj.split(nnx.eval_shape(model))
    values = leaves_of(layers, enabled)
    params = jax.tree.unflatten(jax.tree.structure(shapes), [jnp.asarray(values[each]) for each in flatten(shapes)])

    @jax.jit
    def run(params):
        def loss(params):
            out = vj.apply(graphdef, params, None, jnp.asarray(h))
            return (out * cotangent).sum(), out

        gradients, out = jax.grad(loss, has_aux=True)(params)
        return out, gradients, expand(graphdef, params)[1]

    our_out, our_gradients, dense = run(params)
    np.testing.assert_allclose(our_out, out.detach().numpy(), atol=1e-5)
    for target in TARGETS:
        effective = np.stack([getattr(layer, target).weight.detach().numpy().T for layer in layers])
        np.testing.assert_allclose(flatten(dense)[f"block/{target}/kernel"], effective, atol=1e-6)
    released = leaves_of(layers, enabled, read=lambda parameter: parameter.grad)
    for name, gradient in flatten(our_gradients).items():
        np.testing.assert_allclose(gradient, released[name], atol=2e-5, err_msg=name)


def test_both_start_alike(vlorafy):
    """A in ±1/√in, B in ±1/√out, neither zero; increments of a shape-independent norm."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(512, 256))
    names = {"vl_base_module": base, "vl_param_name": "0.weight", "vl_rank": 8}
    parametrized = vlorafy(torch.nn.Sequential)(torch.nn.Linear(512, 256), **names)[0].parametrizations.weight[0]
    theirs = {"a": parametrized.A.detach().numpy().T, "b": parametrized.B.detach().numpy()}
    site = vj.Site("up", "kernel", "dense", (), (512, 256), (0,), (1,))
    ours = Vertical().increment.init_stack(jax.random.key(0), site).trainable
    for name, bound in (("a", 512**-0.5), ("b", 256**-0.5)):
        for factor in (np.asarray(ours[name]), theirs[name]):
            assert 0.98 * bound < np.abs(factor).max() <= bound
            assert abs(factor.std() / (bound / 3**0.5) - 1) < 0.03
