"""How models write answers with thoughts and tool calls, and how those are read and enforced."""
