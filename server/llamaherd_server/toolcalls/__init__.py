"""How models write reasoning and tool calls: formats, parsers and grammars."""
