"""What verify_models.py runs: real models, real data, and the measurements on them."""
