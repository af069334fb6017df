"""Processes and devices: what Accelerate is asked for, and what the ranks agree on."""
