"""Bipolar activations and max pooling."""
