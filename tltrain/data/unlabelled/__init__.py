"""Pictures without labels, on which a student learns its teacher's predictions."""
