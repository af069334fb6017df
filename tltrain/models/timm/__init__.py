"""What timm says of its networks: names, sizes, heads, layers, and weights from its hub."""
