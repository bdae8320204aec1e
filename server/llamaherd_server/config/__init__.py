"""The server's settings and API keys."""
