"""The commands of ``python -m hpcavg``."""
