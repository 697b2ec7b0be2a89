"""The counters for Prometheus: as text (`exposition`), over a socket (`server`)."""
