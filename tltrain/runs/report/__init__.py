"""Building blocks of pages: charts, tables, formatted numbers, intervals."""
