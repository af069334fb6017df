"""A run on disk: run folder, checkpoints, metrics, trackers, reports."""
