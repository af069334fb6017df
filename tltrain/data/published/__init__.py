"""Published data sets by their names: fetched once, and read with their own splits."""
