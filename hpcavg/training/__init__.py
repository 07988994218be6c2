"""The built-in training loop."""
