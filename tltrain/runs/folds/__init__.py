"""Cross-validation: a folder of runs, one for each fold of each repeat, what their predictions say together, and the page of it."""
