"""The tuner: which settings give this host the highest throughput within the limits, and is the gain real?

Pure: settings, space, evidence, halving, decide. With the outside world: applier, live, journal, __main__.
`search` joins them behind two small protocols, so that a simulated server can stand in for a real one.
"""
