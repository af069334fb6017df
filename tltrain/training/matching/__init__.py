"""A teacher's features: the linear map by which a student learns them, the losses, and what is refused."""
