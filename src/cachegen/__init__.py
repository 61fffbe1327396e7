"""CacheGen: compress, store and stream the KV caches of language models.

    compress(cache, token_ids, model)   a transformers cache, small: `.save(folder)`, `.num_bytes`, `.bits_per_value`
    publish(store, compressed)          what was compressed, into a store that others stream from
    load(folder or url)                 either of them, opened: `.to_cache(model, prompt)` is what
                                        `model.generate(..., past_key_values=...)` takes
    PrefixCache(model)                  many, in memory: `.add(cache, token_ids)`, `.to_cache(prompt)`
    calibrate(model, contexts)          the model's profile, which method `transform` needs: `.save(folder)`

Each has an example in its docstring. Errors that a user can meet are of `cachegen.errors`: one line, with the remedy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachegen import errors

if TYPE_CHECKING:
    from cachegen.api import (
        CacheStore,
        CompressedCache,
        PrefixCache,
        Profile,
        StoredCache,
        calibrate,
        compress,
        load,
        publish,
    )

__version__ = "0.2.0"

__all__ = [
    "CacheStore",
    "CompressedCache",
    "PrefixCache",
    "Profile",
    "StoredCache",
    "__version__",
    "calibrate",
    "compress",
    "errors",
    "load",
    "publish",
]

_IN_API = frozenset(__all__) - {"__version__", "errors"}


def __getattr__(name: str) -> Any:
    """Import what needs torch and transformers when it is first asked for: they take seconds."""
    if name not in _IN_API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cachegen import api

    value = globals()[name] = getattr(api, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
