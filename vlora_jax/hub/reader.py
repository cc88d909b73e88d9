"""A `config.json` read key by key: what nobody reads, and nothing says is without effect, is refused."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from vlora_jax.errors import ConfigError, nearest

# Keys that change no score of a model in evaluation: training, generation, provenance, other heads.
WITHOUT_EFFECT = frozenset(
    """
    architectures model_type transformers_version _name_or_path name_or_path _commit_hash dtype torch_dtype
    id2label label2id num_labels _num_labels problem_type finetuning_task task_specific_params
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id
    initializer_range initializer_factor pretraining_tp use_cache gradient_checkpointing use_bfloat16 torchscript
    attention_dropout hidden_dropout_prob attention_probs_dropout_prob classifier_dropout dropout_rate
    resid_pdrop embd_pdrop attn_pdrop summary_type summary_use_proj summary_activation summary_proj_to_labels
    summary_first_dropout reorder_and_upcast_attn layerdrop
    return_dict output_hidden_states output_attentions output_past attn_implementation _attn_implementation
    _attn_implementation_autoset chunk_size_feed_forward prefix tokenizer_class keys_to_ignore_at_inference
    pooler_act pooler_output_size encoder_stride
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens cache_implementation
    max_sequence_length
    """.split()  # noqa: SIM905  a list literal would take a line a word
)
# Keys that any config may carry, with the only values that our models have.
FIXED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "auto_map": (None,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "per_layer_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False,),
}


KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "a table",
}


def of_kind(value: Any, kind: type) -> bool:
    """Whether a JSON value is what a key asks for; a whole number may stand where a number is asked for."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def validated(kind: type, values: Mapping[str, Any], place: str = "") -> Any:
    """A pydantic model, its faults in one line.

    Args:
      place: where in `config.json` the values are from, if from one place.

    Raises:
      ConfigError: a value is impossible.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(filter(None, [place, *map(str, first["loc"])])) or "the model"
        raise ConfigError(f"config.json: {where}: {first['msg']}, got {first['input']!r}"[:400]) from None


class Reader:
    """A `config.json` of which each key must be read, be without effect, or have the only value that we have.

    Args:
      given: the config.
      defaults: what transformers takes where a key is absent.
      ignore: keys to be read as if they were absent.

    Raises:
      ConfigError: `ignore` names a key that is not there.
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any], ignore: Sequence[str] = ()):
        absent = [key for key in ignore if key not in given]
        if absent:
            hints = ", ".join(nearest(absent[0], given))
            raise ConfigError(f"ignore names {absent[0]!r}, which config.json does not have; nearest: {hints}")
        self.given = {key: value for key, value in given.items() if key not in ignore}
        self._defaults, self._read = defaults, set()

    def __call__(self, key: str, default: Any = None, of: type | None = None) -> Any:
        """The value of a key; where absent, transformers' default for the family, else `default`.

        Args:
          of: what it must be if it is not null; what the default is, if not given.

        Raises:
          ConfigError: it is something else.
        """
        self._read.add(key)
        default = self._defaults.get(key, default)
        value = self.given.get(key, default)
        of = of or (None if default is None else type(default))
        if value is not None and of is not None and of in KINDS and not of_kind(value, of):
            raise ConfigError(f"config.json: {key} must be {KINDS[of]}, not {value!r}")
        return value

    def need(self, key: str, default: Any = None, of: type = int) -> Any:
        """The value of a key that must not be null."""
        value = self(key, default, of)
        if value is None:
            raise ConfigError(f"config.json: {key} must be {KINDS[of]}, not null")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Raises ConfigError unless a key is absent or has one of these values."""
        if self(key, allowed[0]) not in allowed:
            self.refuse(key, self(key), " or ".join(map(repr, allowed)))

    def choice(self, key: str, table: Mapping[Any, Any]) -> Any:
        """What a table says for the value of a key.

        Raises:
          ConfigError: it does not know the value.
        """
        value = self(key, of=str)
        if value not in table:
            self.refuse(key, value, ", ".join(map(repr, table)))
        return table[value]

    def refuse(self, key: str, value: Any, supported: str) -> None:
        """Raises ConfigError that names a key, its value, and what is supported."""
        raise ConfigError(
            f"config.json: {key} = {value!r} is not supported, only {supported}; ignore=({key!r},) loads the model "
            f"as if it were not there"
        )

    def finish(self) -> None:
        """Raises ConfigError if a key is left that may change the model's function."""
        for key, allowed in FIXED.items():
            if key not in self._read:
                self.only(key, *allowed)
        unknown = [key for key in self.given if key not in self._read | WITHOUT_EFFECT]
        if unknown:
            raise ConfigError(
                f"config.json: {unknown[0]} = {self.given[unknown[0]]!r} is not known here and may change the model"
                f"{f' (and {len(unknown) - 1} more: {unknown[1:4]})' if unknown[1:] else ''}; "
                f"ignore={tuple(unknown)!r} reads it as if it were absent (model.ignore in a run's config)"
            )
