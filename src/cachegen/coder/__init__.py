"""Entropy coding: integers to bytes and back.

`reference` is plain Python that reads like docs/format.md and is the tests' oracle; `cpu` calls the native kernels.
Both offer the same three functions, so that the codec takes either: `measure`, `encode` and `decode`.
"""
