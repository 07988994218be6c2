"""Samples, their partitions, formats and augmentations."""
