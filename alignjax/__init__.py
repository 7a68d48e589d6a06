"""Alignment of language models in JAX: pure functions over plain pytrees."""

__version__ = "0.1.0"
