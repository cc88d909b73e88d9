"""Vertical sharing: layers as low-rank increments on the layers before them (arXiv 2406.09315)."""
