"""A project folder: params.yaml, protocols, where results lie, what each depends on, and where it came from."""
