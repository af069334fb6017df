"""Runs a recipe: set-up, the stages in order, and the training loop of each stage."""
