"""`tltrain evaluate --corruptions`: a run's accuracy on corrupted images, its figures, tables and pages."""
