"""What a run leaves in its folder, and reports of it."""
