"""Checks of a data set: problems of single images, near-duplicates, and labels that are likely wrong."""
