"""Reports: logs, metrics and traces. It never influences a request."""
