"""The published recipe of early 2025, in our own words, to measure against; nothing uses it."""
