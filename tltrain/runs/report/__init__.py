"""What pages are made of: charts, tables, numbers as text, intervals."""
