"""Data: samples, their partitions among learners, file formats and augmentations."""
