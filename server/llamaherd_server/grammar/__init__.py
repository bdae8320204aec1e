"""JSON schemas and patterns as GBNF, the grammars of llama.cpp."""
