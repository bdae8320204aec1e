"""`make demo`: the main job on one throw-away host, or on a plain process where no host can be booted."""
