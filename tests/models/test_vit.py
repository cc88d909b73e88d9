"""The Vision Transformer around its blocks: patches, tokens, pooling, head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.models.vit import ViT, ViTConfig
from vlora_jax.vertical.config import Vertical

SMALL = {"width": 8, "heads": 2, "mlp_width": 12, "layers": 2, "image": 4, "channels": 3, "classes": 5}


def build(**options):
    graphdef, shapes = vj.split(nnx.eval_shape(lambda: ViT(ViTConfig(**SMALL, **options), nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype), shapes)


@pytest.mark.parametrize("class_token", [False, True])
def test_logits_are_a_head_on_the_mean_patch_or_the_class_token(class_token):
    """With blocks that change nothing, what is left is written out in NumPy."""
    graphdef, params = build(class_token=class_token)
    leaves = flatten(params)
    for path in ("layers/block/attn/o/kernel", "layers/block/attn/o/bias"):
        leaves[path][:] = 0
    for path in ("layers/block/mlp/down/kernel", "layers/block/mlp/down/bias"):
        leaves[path][:] = 0
    images = np.random.default_rng(1).normal(size=(2, 4, 4, 3)).astype(np.float32)
    patches = [images[:, y : y + 2, x : x + 2].reshape(2, -1) for y in (0, 2) for x in (0, 2)]
    x = np.stack(patches, axis=1) @ leaves["patch/kernel"] + leaves["patch/bias"]
    if class_token:
        x = np.concatenate([np.tile(leaves["token"], (2, 1, 1)), x], axis=1)
    x = x + leaves["positions"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * leaves["norm/scale"] + leaves["norm/bias"]
    expected = (x[:, 0] if class_token else x.mean(axis=1)) @ leaves["head/kernel"] + leaves["head/bias"]
    logits = jax.jit(lambda params, images: vj.apply(graphdef, params, None, images))(params, jnp.asarray(images))
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_every_patch_sees_every_other():
    """No mask: the class token's logits depend on all pixels."""
    graphdef, params = build(class_token=True)
    logits = lambda images, params: vj.apply(graphdef, params, None, images)[0].sum()
    gradient = jax.jit(jax.grad(logits))(jnp.ones((1, 4, 4, 3)), params)
    assert np.all(np.abs(np.asarray(gradient)) > 0)


def test_training_and_serving_forms_of_a_vertical_model_agree():
    """Sixteen rows: factored in training, where a detached base saves its weight gradient; built for serving."""
    vertical = Vertical(size=2, increment=vj.LoRA(rank=1, alpha=4.0, start="kaiming_both"))
    graphdef, params = build(vertical=vertical)
    images = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4, 4, 3)), jnp.float32)
    stack = nnx.merge(graphdef, params).layers
    forms = {train: {choice.path: choice.factored for choice in stack.choices(16, train)} for train in (False, True)}
    assert all(forms[True].values())
    assert not any(forms[False].values())
    both = jax.jit(lambda params: [vj.apply(graphdef, params, None, images, train=train) for train in (False, True)])
    np.testing.assert_allclose(*both(params), atol=1e-5)


def test_the_digits_model_counts_by_the_closed_formula():
    """The default: 8 × 8 pixels in patches of 2, width 64, 12 layers of 12 d² + 13 d."""
    count = vj.count(vj.split(nnx.eval_shape(lambda: ViT(ViTConfig(), nnx.Rngs(0))))[1])
    outside = (4 * 64 + 64) + 16 * 64 + 2 * 64 + (64 * 10 + 10)
    assert count == 12 * (12 * 64**2 + 13 * 64) + outside


def test_images_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(ValueError, match="image 10 must be a multiple of patch 4"):
        ViTConfig(image=10, patch=4)
