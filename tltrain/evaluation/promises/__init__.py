"""Rules fitted on val (sets, abstention, strangers): read from the run folder, or fitted and written there at the first request."""
