"""What the report's pages are made of: reading a run folder, words, charts, tables. Only `tltrain.runs.report.write` puts them together."""
