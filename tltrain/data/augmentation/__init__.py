"""What augmented views are made of: turns, shears and shifts without black corners, TrivialAugment, RandAugment, random erasing."""
