"""Figures for people. Equal input gives equal bytes (no date, no version is written); a file is whole or absent."""
