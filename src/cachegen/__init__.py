"""CacheGen: compress, store and stream the KV caches of language models."""

__version__ = "0.1.0"
