"""Files on other machines: copied here once through fsspec, and asked for whether they have changed."""
