"""The engine: token ids in, token ids out. Knows no text; one thread owns the model."""
