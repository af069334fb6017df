"""Starts a run on this machine or on a Slurm cluster. Loads neither torch nor transformers: it must be quick on a login node."""
