"""Polymath: one OpenAI-compatible chat endpoint over a mixture of domain experts."""

__all__ = ["__version__"]

__version__ = "0.1.0"
