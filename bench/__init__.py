"""Side-by-side benchmarks against peers: each group prints ratios from one run and writes build/bench/<group>.json."""
