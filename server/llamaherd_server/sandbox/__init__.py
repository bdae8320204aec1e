"""Processes that work on untrusted input, and may die of it."""
