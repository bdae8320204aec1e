"""Converts JSON schemas and regular expressions to GBNF, llama.cpp's grammar format."""
