"""Analyses of a data set by features of frozen networks, before training."""
