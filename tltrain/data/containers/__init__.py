"""Data sources whose images are bytes inside another file: archives, tar shards, Parquet and Arrow tables."""
