"""LN tuning: it finds all norms by itself, in models of any kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import moved, parameters
from third_party import Attention, Containers

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError, TargetError
from vlora_jax.models.build import abstract_model
from vlora_jax.models.decoder import DecoderConfig
from vlora_jax.models.encoder import EncoderConfig

SMALL = {"width": 8, "heads": 2, "mlp_width": 16, "layers": 2}


def trained(base, method=None):
    return jax.eval_shape(lambda base: vj.init(method or vj.LNTuning(), jax.random.key(0), base), base)


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (DecoderConfig(layers=32, width=4096, heads=32, mlp_width=11008, vocabulary=32000), (2 * 32 + 1) * 4096),
        (EncoderConfig(layers=12, width=768, heads=12, mlp_width=3072), (2 * 12 + 1) * 2 * 768),
        (DecoderConfig(**SMALL, qk_norm=True, norm_place="both"), 2 * (4 * 8 + 2 * 4) + 8),
    ],
)
def test_every_norm_is_found_stacked_or_not(config, numbers):
    """Llama-2-7B: 266 240 scales; BERT-base: 38 400 scales and biases; norms around branches and of heads too."""
    adapter = trained(abstract_model(config)[1])
    assert vj.count(adapter) == numbers
    assert all("norm" in path for path in adapter.trainable["full"])


class Scaled(nnx.Linear):
    """A dense layer with a scale of its own."""

    def __init__(self, *sides, rngs):
        super().__init__(*sides, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(sides[1]))

    def __call__(self, x):
        return super().__call__(x) * self.scale.get_value()


class Norms(nnx.Module):
    """Flax's norms, called anything, and a dense layer that is none."""

    def __init__(self, rngs):
        self.first, self.second = nnx.LayerNorm(4, rngs=rngs), nnx.RMSNorm(4, rngs=rngs)
        self.third, self.bare = nnx.GroupNorm(4, 2, rngs=rngs), nnx.LayerNorm(4, use_scale=False, rngs=rngs)
        self.fourth = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.dense = Scaled(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.bare(self.fourth(self.third(self.second(self.first(x))))))


def test_norms_are_known_by_their_parameters_and_not_by_their_names():
    found = set(trained(parameters(Norms)[1]).trainable["full"])
    both = {f"{name}/{leaf}" for name in ("first", "third", "fourth") for leaf in ("scale", "bias")}
    assert found == both | {"second/scale"}


def test_a_norm_may_be_the_whole_model_and_parameters_a_plain_tree():
    assert set(trained({"scale": jnp.ones(4), "bias": jnp.ones(4)}).trainable["full"]) == {"scale", "bias"}
    tree = {"params": {"LayerNorm_0": {"scale": jnp.ones(4)}, "Dense_0": {"kernel": jnp.ones((4, 4))}}}
    assert set(trained(tree).trainable["full"]) == {"params/LayerNorm_0/scale"}


def test_its_gradient_is_the_norm_s():
    """Of Σ out·C for out = h·γ + β with the normalised h: Σ h·C to γ, Σ C to β."""
    graphdef, base = parameters(lambda rngs: nnx.LayerNorm(4, rngs=rngs))
    x, cotangent = (np.random.default_rng(seed).normal(size=(5, 4)).astype(np.float32) for seed in (0, 1))
    adapter = moved(vj.init(vj.LNTuning(), jax.random.key(0), base))
    loss = lambda trainable: (vj.apply(graphdef, base, adapter.with_trainable(trainable), x) * cotangent).sum()
    gradient = jax.jit(jax.grad(loss))(adapter.trainable)["full"]
    h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(gradient["scale"], (h * cotangent).sum(0), atol=1e-5)
    np.testing.assert_allclose(gradient["bias"], cotangent.sum(0), atol=1e-5)


def test_a_head_trains_beside_them_and_adapters_stay_apart():
    graphdef, base = parameters(Attention)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    norms = moved(vj.init(vj.LNTuning(full="head/bias"), jax.random.key(0), base))
    lora = moved(vj.init(vj.LoRA(rank=2, targets="attn"), jax.random.key(1), base))
    assert set(norms.trainable["full"]) == {"norm/scale", "norm/bias", "head/bias"}
    both = jax.jit(
        lambda: (vj.apply(graphdef, base, [norms, lora], x), vj.apply(graphdef, vj.merge(base, norms, lora), None, x))
    )
    np.testing.assert_allclose(*both(), atol=1e-5)
    assert set(flatten(base)) > set(norms.trainable["full"])


def test_targets_choose_among_them():
    base = abstract_model(DecoderConfig(**SMALL))[1]
    found = lambda **options: set(trained(base, vj.LNTuning(**options)).trainable["full"])
    assert found(targets="layers") == {"layers/block/attn_norm/scale", "layers/block/mlp_norm/scale"}
    assert found(exclude=["norm", "^layers/block/mlp_norm$"]) == {"layers/block/attn_norm/scale"}
    with pytest.raises(TargetError, match="ln_tuning: target 'q' matches nothing; nearest: "):
        found(targets="q")


def test_a_model_without_norms_is_refused():
    with pytest.raises(ConfigError, match=r"ln_tuning: this model has no norms \(it has .*, …\); train others by name"):
        trained(parameters(Containers)[1])
