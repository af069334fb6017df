"""Per-sample losses, and the objective of a stage that combines them."""
