"""Sweeps: every combination of flags of the scripts, each run once, resumable to the byte."""
