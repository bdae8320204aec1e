"""From messages to a prompt, and from a response format to a grammar."""
