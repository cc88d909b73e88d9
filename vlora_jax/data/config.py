"""The `data` section of a run on the user's own data."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from vlora_jax.errors import nearest

Format = Literal["text", "completion", "chat", "classification", "images"]
ROLES: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "classification": ("text", "pair", "label"),
    "images": ("image", "label"),
}


class DatasetConfig(BaseModel):
    """A set of Hugging Face `datasets`, or local files, in one of five formats."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: Literal["dataset"] = "dataset"
    batch: PositiveInt = Field(default=8, description="rows a micro-batch, over all devices")
    path: str | list[str] = Field(
        description="a parquet, json, jsonl, csv or tsv file, several, a directory with a file a split, or a hub name"
    )
    subset: str | None = Field(default=None, description="of a hub name")
    split: str = Field(default="train", description="to train on, of a hub name or a directory")
    held_out: str | list[str] | float = Field(
        default=0.1, description="a split, files, or a share of the training rows, chosen by what is in a row"
    )
    format: Format = Field(description="what a row is")
    columns: dict[str, str] = Field(default={}, description="column by role, where the usual names do not fit")
    header: list[str] | None = Field(default=None, description="column names of csv and tsv files without any")
    prompt_template: str | None = Field(default=None, description='"Question: {question}\\nAnswer: ", over columns')
    completion_template: str | None = Field(default=None, description='"{answer}", over columns')
    chat_template: str | None = Field(default=None, description="a Jinja file; null: the tokenizer's own")
    tokenizer: str | None = Field(default=None, description="directory or hub name; null: the model's")
    eos: str | None = Field(default=None, description="the token that ends a text; null: the tokenizer's")
    length: PositiveInt | None = Field(
        default=None, description="tokens a row; null: the longest row, rounded up to a multiple of 64"
    )
    target_length: PositiveInt | None = Field(default=None, description="the same of a sequence-to-sequence target")
    overlong: Literal["truncate", "drop", "error", "split"] = Field(
        default="truncate", description="rows of more tokens; split: into several rows, for text"
    )
    loss: Literal["completion", "all"] = Field(
        default="completion", description="learn completions and assistant turns only, or all tokens"
    )
    packing: bool = Field(default=False, description="several documents a row, each seeing only itself")
    limit: PositiveInt | None = Field(default=None, description="so many training rows, evenly spread")
    held_out_limit: PositiveInt | None = Field(default=None, description="so many held-out rows, evenly spread")
    shots: PositiveInt | None = Field(default=None, description="so many training rows of each class")
    shots_seed: NonNegativeInt = Field(default=0, description="which ones")

    @model_validator(mode="after")
    def _check(self) -> "DatasetConfig":
        sequence = self.format in ("text", "completion", "chat")
        only_for: dict[str, tuple[bool, str]] = {
            "packing": (sequence, "text, completion and chat"),
            "shots": (not sequence, "classification and images"),
            "prompt_template": (self.format == "completion", "completion"),
            "completion_template": (self.format == "completion", "completion"),
            "chat_template": (self.format == "chat", "chat"),
            "target_length": (self.format == "completion", "completion"),
        }
        for key, (fits, formats) in only_for.items():
            if getattr(self, key) and not fits:
                raise ValueError(f"{key} is for format {formats}, not {self.format}")
        if self.overlong == "split" and self.format != "text":
            raise ValueError(f"overlong split is for format text, not {self.format}: use truncate, drop or error")
        if isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            raise ValueError(f"held_out {self.held_out} must be a share between 0 and 1, a split or a file")
        if (self.prompt_template is None) != (self.completion_template is None):
            raise ValueError("prompt_template and completion_template go together")
        roles = ROLES[self.format]
        for role in self.columns:
            if role not in roles:
                raise ValueError(
                    f"columns has no role {role!r} in format {self.format}; nearest: {nearest(role, roles, 1)[0]}"
                )
        return self
