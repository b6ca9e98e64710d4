"""Data sets: one table of names, the same split on every run, loaders, and checks of what was read."""
