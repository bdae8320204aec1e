"""The embedded engine's process: owns the model, and computes tokens for all requests at once."""
