"""Features, metrics, and reports that state their protocol."""
