"""Where ranks run, what they have there, and what will hurt a run."""
