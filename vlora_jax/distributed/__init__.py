"""Devices: meshes, and how parameters and batches lie on them."""
