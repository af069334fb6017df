"""A run on disk: its folder, its checkpoints, its metrics, and reading it back."""
