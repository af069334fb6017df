"""The Slurm target: writes and submits the job script, starts the processes on each node, and requeues the job."""
