"""How and when the steps of personalize_core run: Dagster's view of them. No mathematics, and no torch at load."""
