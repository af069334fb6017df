"""Remote files: copied once through fsspec, and checked for changes at each start."""
