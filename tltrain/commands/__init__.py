"""What each verb of the command does, and what it prints."""
