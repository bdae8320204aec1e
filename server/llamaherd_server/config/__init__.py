"""The settings and the keys of the server."""
