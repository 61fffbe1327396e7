"""CacheGen: compress, store and stream the KV caches of language models.

`compress` turns the cache of a transformers model into small files, `load` opens them again. The classes that they
return, and all errors (`cachegen.errors`), have docstrings, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cachegen.api import CompressedCache, StoredCache, compress, load

__version__ = "0.2.0"

__all__ = ["CompressedCache", "StoredCache", "__version__", "compress", "load"]

_IN_API = frozenset({"CompressedCache", "StoredCache", "compress", "load"})


def __getattr__(name: str) -> Any:
    """Import what needs torch and transformers when it is first asked for: they take seconds."""
    if name not in _IN_API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cachegen import api

    value = globals()[name] = getattr(api, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
