"""From prompts to images: the sampler, test-time optimization, several concepts in one image, image grids."""
