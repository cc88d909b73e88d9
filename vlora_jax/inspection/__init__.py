"""Look into adapters, checkpoints and compiled programs."""
