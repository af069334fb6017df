"""What the files of pictures say before and while Pillow decodes them."""
