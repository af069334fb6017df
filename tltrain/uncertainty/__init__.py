"""Uncertainty: conformal sets of classes, abstention, detection of strangers. No network runs here."""
