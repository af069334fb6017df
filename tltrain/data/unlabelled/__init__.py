"""Pictures without labels, that a student learns its teacher's answers of."""
