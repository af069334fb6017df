"""Losses, one value a sample, and the objective of a stage that adds them up."""
