"""Every claim about accuracy or speed as a command: ``python -m benchmarks`` lists them."""
