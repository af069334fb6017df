"""A real Slurm with several nodes on this machine, for the tests."""
