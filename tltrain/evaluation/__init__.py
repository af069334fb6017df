"""What a network says of images: gathered predictions, metrics, calibration, predictions of single files."""
