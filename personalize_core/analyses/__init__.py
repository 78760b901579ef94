"""Analyses of what was learned: metrics, images and tables to look at. None of them changes an artifact."""
