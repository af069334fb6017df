"""The parts of a recipe that stand in files of their own; `tltrain.core.recipe` puts them together."""
