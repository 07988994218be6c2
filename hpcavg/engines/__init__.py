"""Engines: how a mean is taken."""
