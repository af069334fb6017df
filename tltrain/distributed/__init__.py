"""Processes and devices: the Accelerate set-up, collectives, signals, the watchdog, strategies (DDP, FSDP2, DeepSpeed)."""
