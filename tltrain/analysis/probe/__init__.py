"""Backbones compared by heads that are solved on their features: judged by folds, with what an image costs."""
