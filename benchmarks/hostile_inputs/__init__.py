"""A corpus of hostile and harmless inputs for every place where the program reads something from outside."""
