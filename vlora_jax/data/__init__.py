"""Data sets as random-access sources, and their exactly resumable order."""
