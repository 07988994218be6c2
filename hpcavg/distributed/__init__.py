"""The ranks of a job: communicators, survivors, shared memory, watching threads, launchers."""
