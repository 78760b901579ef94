"""Judge the exported weights, gate by gate."""
