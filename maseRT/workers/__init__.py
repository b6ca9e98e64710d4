"""Rows under measurement, each in a process of its own (or in this one), and the turns they take."""
