"""The tuner: finds the settings with the highest throughput within the limits, and whether the gain is real.

Pure: settings, space, objective, evidence, physics, estimates, pace, judge, decide, capacity. The others do I/O, except
`search`, which measures through a small protocol, so that a simulated server can replace a real one.
"""
