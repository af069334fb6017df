"""The command `tltrain`: its verbs in four groups."""
