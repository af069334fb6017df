"""tltrain from Python."""
