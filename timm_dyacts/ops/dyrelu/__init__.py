"""Dynamic ReLU."""
