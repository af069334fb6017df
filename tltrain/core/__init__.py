"""What every other room may use, without torch: the recipe, the flags of a start, files, the console, the registry."""
