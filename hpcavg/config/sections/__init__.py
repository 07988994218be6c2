"""The sections of a run's options, each a frozen dataclass that its owner takes. Light to import."""
