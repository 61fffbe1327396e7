"""Tiny random models of the families that users bring, and what must hold of each."""
