"""The command `tltrain`. Each larger verb has its own module."""
