"""Engines: what turns prompts into tokens, each a supervised child process behind the protocol in base.py."""
