"""Which weights of a stage train (`trains`), and which of them it hands on (`carry`)."""
