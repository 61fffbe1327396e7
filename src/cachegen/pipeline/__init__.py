"""The stages between a text and its answer: prefill, encode, decode, generate (files, threads, transformers)."""
