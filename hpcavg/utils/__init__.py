"""Text, durable files, progress bars: without torch and without MPI."""
