"""Several labels an image: label sets in tables, and splits by them."""
