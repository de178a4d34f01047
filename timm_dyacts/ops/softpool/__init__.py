"""SoftPool."""
