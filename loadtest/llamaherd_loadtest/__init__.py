"""Load tests for OpenAI-compatible LLM servers, and the tuner that uses them to choose a host's settings."""
