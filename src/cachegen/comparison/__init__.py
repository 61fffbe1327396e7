"""Measure what compression costs: bytes against quality, of this project's methods and of others'."""
