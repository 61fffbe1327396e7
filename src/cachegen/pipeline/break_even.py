"""Over which links it pays to send an encoded cache: slower ones than for fp16, faster ones than for text.

Nothing overlaps here: a file is read whole, then decoded, so that what is said holds for the simplest reader.
"""

from __future__ import annotations


def beats_fp16_below(fp16_bytes: int, encoded_bytes: int, decode_seconds: float) -> float:
    """Return the link speed in bits per second below which encoded files arrive and decode before fp16 arrives.

    Zero where they are never first: they are larger.
    """
    saved_bits = 8 * max(fp16_bytes - encoded_bytes, 0)
    return saved_bits / max(decode_seconds, 1e-9)


def beats_text_above(encoded_bytes: int, seconds_from_files: float, seconds_from_text: float) -> float | None:
    """Return the link speed in bits per second above which encoded files answer before the text does.

    Args:
        seconds_from_files: to the first token, once the files are there.
        seconds_from_text: to the first token.

    Returns:
        None where the text is first over any link.
    """
    left = seconds_from_text - seconds_from_files
    return 8 * encoded_bytes / left if left > 0 else None
