"""Engines for arrays in the memory of GPUs."""
