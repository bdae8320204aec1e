"""How much a model's answers change: with other KV types, another quantisation, template or build."""
