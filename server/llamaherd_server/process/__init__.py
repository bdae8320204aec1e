"""The server's own process and its host: logging, priority, systemd, and turns for expensive work."""
