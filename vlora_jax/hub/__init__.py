"""Models and adapters as Hugging Face keeps them: read, written, named."""
