"""Text from a model: prefill, a decode loop with a cache, sampling."""
