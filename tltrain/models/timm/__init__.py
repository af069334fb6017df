"""Access to timm's networks: names, sizes, heads, layers, and weights from its hub."""
