"""Speaks HTTP: routes, auth, and the one table from refusal to status."""
