"""Generates: the only room that imports vLLM."""
