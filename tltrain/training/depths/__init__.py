"""`unfreeze: auto`: races depths on folds, and takes the shallowest that is not clearly worse than the best."""
