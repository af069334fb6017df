"""The built-in families: how to build ResNets and ViTs, and split them into blocks."""
