"""From an admitted request to its answer: fairness, limits, the engine, and what is counted."""
