"""What a network says of images with several labels: predictions, metrics, thresholds, rows of a test."""
