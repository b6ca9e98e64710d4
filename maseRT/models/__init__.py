"""Models: the zoo, users' own factories, other packages' models, and checkpoints."""
