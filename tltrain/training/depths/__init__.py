"""How deep to train: depths are raced on folds, and the shallowest that the best cannot be told from is taken."""
