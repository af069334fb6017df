"""Scan results of image files before training: sizes and times, the result of reading them, and the file that keeps them."""
