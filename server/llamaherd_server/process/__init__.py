"""What the server has of its process and host."""
