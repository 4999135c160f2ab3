"""Reports: logs and metrics. It never influences a request."""
