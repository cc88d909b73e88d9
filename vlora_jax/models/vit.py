"""Vision Transformer (arXiv 2010.11929) for image classification."""

from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field, PositiveInt, model_validator

from vlora_jax.models.layers import Block, Norm, StackConfig, dtypes_of, linear, patches_of
from vlora_jax.models.stack import Stack


class ViTConfig(StackConfig):
    """A Vision Transformer. The defaults are the embedded digits model."""

    family: Literal["vit"] = "vit"
    image: PositiveInt = Field(default=8, description="height and width in pixels")
    channels: PositiveInt = 1
    patch: PositiveInt = Field(default=2, description="side of a patch in pixels")
    classes: PositiveInt = 10
    layers: PositiveInt = 12
    class_token: bool = Field(
        default=False, description="classify from an extra token instead of the mean over patches"
    )

    @model_validator(mode="after")
    def _check_image(self) -> "ViTConfig":
        if self.image % self.patch:
            raise ValueError(f"image {self.image} must be a multiple of patch {self.patch}")
        return self


class ViT(nnx.Module):
    """Patches, a learned position each, a stack of blocks, and a linear head."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        self.config = config
        dtypes = dtypes_of(config)
        patches = (config.image // config.patch) ** 2
        self.patch = linear(config, config.patch**2 * config.channels, config.width, True, rngs, **dtypes)
        init = nnx.initializers.truncated_normal(config.kernel_std or 1.0)
        param_dtype = dtypes["param_dtype"]
        self.positions = nnx.Param(init(rngs.params(), (patches + config.class_token, config.width), param_dtype))
        if config.class_token:
            self.token = nnx.Param(init(rngs.params(), (config.width,), param_dtype))
        make_block = lambda rngs: Block(config, rngs, **dtypes)
        self.layers = Stack(make_block, config.layers, vertical=config.vertical, remat=config.remat, rngs=rngs)
        self.norm = Norm(config, rngs, **dtypes)
        self.head = linear(config, config.width, config.classes, True, rngs, **dtypes)

    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool = False, **_: Any
    ) -> Float[Array, "batch classes"]:
        """Logits in float32 of images with values around 0."""
        x = self.patch(patches_of(images, self.config.patch))
        if self.config.class_token:
            token = jnp.broadcast_to(self.token.get_value().astype(x.dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([token, x], axis=1)
        x = x + self.positions.get_value().astype(x.dtype)[None]
        x = self.norm(self.layers(x, train=train))
        pooled = x[:, 0] if self.config.class_token else x.mean(axis=1)
        return self.head(pooled).astype(jnp.float32)
