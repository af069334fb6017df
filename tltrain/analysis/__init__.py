"""What features of frozen networks say about a data set before anything is trained."""
