"""Which samples a learner sees, and in which order."""
