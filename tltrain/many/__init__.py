"""Many runs of one command: one after the other in this process, or side by side, each on a GPU of its own."""
