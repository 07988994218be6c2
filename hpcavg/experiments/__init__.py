"""Experiments with the algorithms, on problems whose constants are known."""
