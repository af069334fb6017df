"""Decisions before the first step: the device that makes views, whether to compile, and a preview of the images."""
