"""What a method learned about a concept: saved, restored, and proved in a fresh process."""
