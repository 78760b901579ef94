"""Files that are whole or absent, stamps of what they were made from, and typed YAML."""
