"""Dynamic ReLU: ``functional`` has its functions, the other modules their implementations."""
