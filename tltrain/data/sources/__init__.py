"""Where images come from: a folder, a CSV file, arrays. Each is a `SourceKind`, registered by name."""
