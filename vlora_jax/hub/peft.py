"""PEFT's adapter directories, both ways."""

from vlora_jax.hub.peft_lora import as_lora
from vlora_jax.hub.peft_read import read_peft
from vlora_jax.hub.peft_write import Exported, write_peft

__all__ = ["Exported", "as_lora", "read_peft", "write_peft"]
