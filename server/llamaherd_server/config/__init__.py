"""What the server is told: its settings and keys."""
