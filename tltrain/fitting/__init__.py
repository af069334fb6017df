"""`tltrain fit`: chooses a recipe for a folder of pictures, says why, and trains it."""
