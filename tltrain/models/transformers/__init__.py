"""What transformers says of its networks of images: configurations, networks, heads, weights and processors."""
