"""What the report's pages are made of: reading a run folder, words, charts, tables. Only `tltrain.report` puts them together."""
