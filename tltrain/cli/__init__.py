"""The command `tltrain`, a module for each verb that is more than a call."""
