"""How alike images and texts are: encoders (features), scores (similarity) and where they are kept (tables)."""
