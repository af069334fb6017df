"""A doctor for the data: what is wrong with single images, which are nearly the same, and which labels are likely wrong."""
