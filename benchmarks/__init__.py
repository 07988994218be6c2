"""Benchmarks: each runs as ``python -m benchmarks.NAME``, alone or under mpirun, and prints its table on rank 0."""
