"""Networks as chains of blocks: built, given weights, described."""
