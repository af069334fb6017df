"""Terminal output: the console, streams that survive a closed pipe, and escaping of untrusted text."""
