"""The steps of a run: one verb each, and the pipeline that runs them."""
