"""A concept: what it is called, its images as they come in, and its images as latents."""
