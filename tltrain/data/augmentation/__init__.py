"""Augmentation operations: rotation, shear and translation without black corners, TrivialAugment, RandAugment, random erasing."""
