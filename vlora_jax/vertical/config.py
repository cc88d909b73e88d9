"""What a vertical stack shares across depth, and how."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, PositiveInt, model_validator

from vlora_jax.adapters.method import Method, SiteMethod
from vlora_jax.adapters.registry import from_config
from vlora_jax.errors import ConfigError

MethodField = Annotated[
    Method,
    BeforeValidator(lambda value: value if isinstance(value, Method) else from_config(value)),
    PlainSerializer(lambda method: method.config()),
]

RELEASED = {"alpha": 1.0, "start": "kaiming_both"}  # of LoRA increments, where the config is silent


def increment_of(value: Any) -> Any:
    """An increment from plain values; what is left out of LoRA's is as in the authors' released code."""
    if isinstance(value, dict) and value.get("method", "lora") == "lora":
        value = RELEASED | value
    return value if isinstance(value, Method) else from_config(value)


class Vertical(BaseModel):
    """Kernels shared over compounds of `size` layers, each layer an increment on its compound's base.

    With base kernel `K₀` and increments `Δᵢ` (of LoRA, `s·Aᵢ Bᵢ`):
    star, as in the authors' released code: `Kᵢ = K₀ + Δᵢ`; chain, as in the abstract: `Kᵢ = Kᵢ₋₁ + Δᵢ`.
    Biases and norms belong to each layer. Source: arXiv 2406.09315 and its package `vlora` 0.1.2, whose choices
    are the defaults here.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    size: PositiveInt = Field(default=4, description="layers in a compound; must divide the depth")
    structure: Literal["star", "chain"] = "star"
    detach: Literal["base", "none", "prev"] = Field(
        default="base",
        description="base: only a compound's first layer moves the base kernel; none: every layer does; prev (chain): "
        "every layer moves its own increment only",
    )
    increment: Annotated[MethodField, BeforeValidator(increment_of)] = Field(
        default_factory=lambda: increment_of({"rank": 8}), description="any mergeable method"
    )
    targets: str | tuple[str, ...] = Field(default="all-linear", description="kernels of a block that are shared")
    adapter_on_base: bool = Field(default=False, description="a compound's first layer has an increment too")
    diagonal: bool = Field(default=False, description="a trained diagonal beside each increment (arXiv 2310.02489)")
    enabled: bool = Field(
        default=True, description="false: hard tying, layers of a compound share their kernels as they are"
    )
    pattern: Literal["sequence", "cycle"] = Field(
        default="sequence",
        description="sequence: neighbours form a compound; cycle: layer l uses base l mod depth/size",
    )
    path: Literal["auto", "factored", "materialised"] = Field(
        default="auto", description="how increments are applied; auto takes what costs fewer FLOPs"
    )

    @model_validator(mode="after")
    def _check(self) -> "Vertical":
        method = self.increment
        if not (isinstance(method, SiteMethod) and method.mergeable and method.vertical):
            raise ValueError(f"{method.name} cannot be a vertical increment: it has no ΔW of its own for each kernel")
        plain = type(method)()
        if (method.targets, method.exclude, method.full) != (plain.targets, plain.exclude, plain.full):
            raise ValueError(
                "vertical.targets says which kernels are shared; the increment takes no targets of its own"
            )
        if getattr(method, "dropout", 0.0):
            raise ValueError("a vertical increment takes no dropout: it is part of the model, not an adapter")
        if getattr(method, "bias", False) or getattr(method, "varies", False):
            raise ValueError("a vertical increment takes no bias and one rank and alpha for all layers of a target")
        if self.detach == "prev" and self.structure == "star":
            raise ValueError("detach=prev is for structure=chain; in a star it is detach=base")
        return self

    @property
    def methods(self) -> tuple[SiteMethod, ...]:
        """The methods whose tensors are the increments; none for hard tying or where no layer has an increment."""
        if not self.enabled or self.increments == 0:
            return ()
        from vlora_jax.adapters.diagonal import Diagonal

        return (self.increment, Diagonal()) if self.diagonal else (self.increment,)  # type: ignore[return-value]

    @property
    def increments(self) -> int:
        """How many layers of a compound have an increment."""
        return self.size if self.adapter_on_base else self.size - 1

    @property
    def detached(self) -> bool:
        """Whether the layers after a compound's first leave the base kernel without a gradient."""
        return bool(self.methods) and self.detach != "none"

    def compounds(self, layers: int) -> int:
        """Number of base kernels in a stack.

        Raises:
          ConfigError: the size does not divide the depth.
        """
        if layers % self.size:
            sizes = [size for size in range(1, layers + 1) if layers % size == 0]
            near = min(sizes, key=lambda size: abs(size - self.size))
            raise ConfigError(
                f"vertical.size {self.size} does not divide layers {layers}; nearest size that does: {near}"
            )
        return layers // self.size

    def grid(self, array: Any, layers: int) -> Any:
        """An array with a leading layer axis as `(compounds, size, …)`."""
        count = self.compounds(layers)
        if self.pattern == "cycle":
            return array.reshape(self.size, count, *array.shape[1:]).swapaxes(0, 1)
        return array.reshape(count, self.size, *array.shape[1:])

    def ungrid(self, array: Any) -> Any:
        """The inverse of `grid`: `(compounds, size, …)` with one layer axis, in the order the layers run."""
        if self.pattern == "cycle":
            array = array.swapaxes(0, 1)
        return array.reshape(-1, *array.shape[2:])
