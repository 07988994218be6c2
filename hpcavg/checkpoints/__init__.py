"""The state of a run in files: written, found, read."""
