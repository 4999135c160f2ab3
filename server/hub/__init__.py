"""Joins the front-ends of one server: what they tell one another, and the Unix socket they do it on."""
