"""What a train step takes on chips that are not here: memory, traffic, bounds of its time."""
