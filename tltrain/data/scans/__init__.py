"""What is known of image files before training: their sizes and times, what reading them showed, and where that is kept."""
