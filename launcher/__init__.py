"""Starts a run on this machine or on a Slurm cluster. Imports no torch and no transformers, so that it is quick on a login node."""
