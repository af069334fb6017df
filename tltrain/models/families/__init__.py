"""Families of networks: how each is built and cut into blocks."""
