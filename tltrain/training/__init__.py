"""Running a recipe: set-up, the stages in order, the loop of a stage."""
