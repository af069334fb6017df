"""What a person reads on a terminal: the console, streams that may go away, and names of others made harmless."""
