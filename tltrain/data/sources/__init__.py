"""Data sources: image folder, CSV file, arrays. Each is a `SourceKind`, registered by name."""
