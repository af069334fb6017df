"""Several labels per image: predictions, metrics, thresholds, test results."""
