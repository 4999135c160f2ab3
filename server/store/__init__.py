"""Remembers, in Redis: what each tenant has used, and what the other rooms keep there."""
