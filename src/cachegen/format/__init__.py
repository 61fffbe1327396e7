"""The bytes of a file. docs/format.md is the specification.

    constants   numbers and names that files are made of
    framing     what all files begin with, and their checksums
    layout      headers whose fields are declared once: bytes, bounds, offsets and the specification's tables follow
    headers     what the headers of all methods have in common
    files       a file from its parts, and taken apart again

The headers of a method are in the method's own room, `cachegen.methods`.
"""

from cachegen.format.constants import (
    ALIGNMENT,
    CHUNK_MAGIC,
    EXPONENT_BITS,
    LANES,
    MAX_CHANNELS,
    MAX_CHUNK_TOKENS,
    MAX_CHUNKS,
    MAX_CODE_TOKENS,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_LEVELS,
    MAX_LOW_BITS,
    NO_HASH,
    TABLE_SIZE,
    TABLES_MAGIC,
    Coder,
    Dtype,
    PlaneLayout,
    StreamEntry,
    check_num_bins,
    round_up,
    streams_bytes,
)

__all__ = [
    "ALIGNMENT",
    "CHUNK_MAGIC",
    "EXPONENT_BITS",
    "LANES",
    "MAX_CHANNELS",
    "MAX_CHUNKS",
    "MAX_CHUNK_TOKENS",
    "MAX_CODE_TOKENS",
    "MAX_HEADS",
    "MAX_LAYERS",
    "MAX_LEVELS",
    "MAX_LOW_BITS",
    "NO_HASH",
    "TABLES_MAGIC",
    "TABLE_SIZE",
    "Coder",
    "Dtype",
    "PlaneLayout",
    "StreamEntry",
    "check_num_bins",
    "round_up",
    "streams_bytes",
]
