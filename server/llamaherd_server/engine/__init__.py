"""Inference engines: each runs in a supervised child process and implements the protocol in base.py."""
