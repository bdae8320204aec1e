"""Benchmarks beside peers: each group prints ratios from one run and writes build/bench/<group>.json."""
