"""Tidegate: an OpenAI-compatible inference server around vLLM's engine."""

__version__ = "0.1.0"
