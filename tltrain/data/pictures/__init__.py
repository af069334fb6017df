"""Checks of image files before and while Pillow decodes them."""
