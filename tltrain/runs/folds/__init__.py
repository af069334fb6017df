"""Cross-validation: a folder of runs, one for each fold of each repeat, their pooled predictions, and the page."""
