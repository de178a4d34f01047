"""What all forms of pooling share."""
