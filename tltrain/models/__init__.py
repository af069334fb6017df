"""Builds networks as chains of blocks, loads their weights, and reads and writes the weights' metadata."""
