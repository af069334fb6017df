"""What a network does not know: sets of classes, answers that are withheld, images unlike those of the training. No network is run here."""
