"""Evaluation: forward passes gathered over ranks, metrics, calibration, prediction for single files, export."""
