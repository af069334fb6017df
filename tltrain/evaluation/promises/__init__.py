"""What val promises of a run's answers: kept in the run folder, or worked out there when it is first asked for."""
