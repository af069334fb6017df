"""Access to transformers' image networks: configurations, networks, heads, weights and processors."""
