"""Heads worked out from features: a linear layer in closed form or by convex optimisation, without a network."""
