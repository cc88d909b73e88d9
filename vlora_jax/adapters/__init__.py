"""Parameter-efficient methods as pure functions over Flax parameter pytrees."""
