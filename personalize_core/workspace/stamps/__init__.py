"""The stamp of every result: all that it depends on, by content, and the sources of our own among it."""
