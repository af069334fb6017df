"""How a finished run bears corrupted images: what was measured, its figures, the table and the pages (`tltrain evaluate --corruptions`)."""
