"""Load tests for OpenAI-compatible LLM servers, and the tuner that picks a host's settings by them."""
