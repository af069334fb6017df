"""Shared by all packages, without torch: recipe schema, start-up flags, stage plan, registry, file helpers, console."""
