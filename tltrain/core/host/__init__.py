"""What this machine leaves this process: memory and processor cores."""
