"""What analyze alone is made of: which models, their evaluation and measurement, and the parts of its report."""
