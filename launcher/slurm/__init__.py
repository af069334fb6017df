"""Slurm as a place to run: the job script, submitting it, and what runs inside the allocation."""
