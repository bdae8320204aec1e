"""For those who run the server: probes, metrics, settings, the status page."""
