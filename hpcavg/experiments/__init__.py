"""The experiments of the five papers, at sizes for two cores: what each paper claims, and what runs here say to it."""
