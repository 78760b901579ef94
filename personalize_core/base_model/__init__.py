"""The frozen text-to-image model: loaded by name, text, attention. It knows no method."""
