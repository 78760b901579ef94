"""A miniature of Stable Diffusion 1.x that this repository trains itself, on a world that it draws itself."""
