"""Tables in files: how they are read, and the images that they leave out or give another label."""
