"""References in float64 NumPy, written from the papers; they share no code with the package."""
