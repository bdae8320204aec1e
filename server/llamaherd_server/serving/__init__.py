"""From an admitted request to its answer: fair queueing, limits, the engine and accounting."""
