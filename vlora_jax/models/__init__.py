"""Flax NNX models whose layers are stacked and scanned."""
