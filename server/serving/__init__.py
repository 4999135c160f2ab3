"""Sequences: the story of one request, from open to closed."""
