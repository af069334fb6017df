"""The implementation of each verb of the command, and its output."""
