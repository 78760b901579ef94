"""What the pipeline makes, and the checks on it."""
