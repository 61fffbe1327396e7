"""The door for Python: a transformers cache into small files, and back into a cache to generate from.

It does what the scripts do, with the same functions and into the same files.
"""

from __future__ import annotations

from cachegen.api.calibrating import calibrate
from cachegen.api.compressing import CompressedCache, compress, publish
from cachegen.api.loading import StoredCache, load
from cachegen.api.prefixes import PrefixCache
from cachegen.api.streaming import CacheStore
from cachegen.methods.transform.profile import Profile

__all__ = [
    "CacheStore",
    "CompressedCache",
    "PrefixCache",
    "Profile",
    "StoredCache",
    "calibrate",
    "compress",
    "load",
    "publish",
]
