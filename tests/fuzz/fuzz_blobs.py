"""Any bytes as a blob of an engine's store: refused with an error of ours, or decoded into the tensors that it is for.

Coverage-guided, with atheris; `make fuzz` runs it. In three cases of four the identity and both checksums are made
right, so that inputs get past them to the sections, the tables file and the chunk file.

Usage: fuzz_blobs.py [CORPUS] [libFuzzer's flags]
"""

from __future__ import annotations

import struct

import atheris

with atheris.instrument_imports(include=["cachegen"]):
    from cachegen import _native
    from cachegen.errors import CacheGenError
    from cachegen.integrations import blobs
    from cachegen.integrations.block_codec import BlockCodec, read_settings

import torch
from harness import fuzz

SHAPE, KEY = (2, 2, 32, 8), b"key"
OPTIONS = ({"method": "lossless"}, {"method": "uniform", "bits": 4}, {"method": "cachegen"})
CODECS = [BlockCodec(read_settings({**options, "threads": 1})) for options in OPTIONS]
BODY = 124  # where the header ends


def make_block() -> torch.Tensor:
    values = torch.linspace(-1, 1, torch.Size(SHAPE).numel()).sin()
    return values.view(SHAPE).bfloat16()


def seal(codec: BlockCodec, content: bytes) -> bytes:
    """Give a blob the identity and the checksums that a codec looks for."""
    identity = codec.identify(KEY, [SHAPE], [torch.bfloat16])
    blob = bytearray(content)
    struct.pack_into("<Q", blob, 12, len(blob))
    struct.pack_into("<II", blob, 20, 0, _native.crc32c(blob[BODY:]))
    blob[28:BODY] = identity.key + identity.layout + identity.codec
    struct.pack_into("<I", blob, 20, _native.crc32c(blob[:BODY]))
    return bytes(blob)


def test_blobs(data: bytes) -> None:
    if len(data) < 1 + BODY:
        return
    codec = CODECS[data[0] % len(CODECS)]
    content = data[1:] if data[0] >= 192 else seal(codec, data[1:])
    output = torch.zeros(SHAPE, dtype=torch.bfloat16)
    try:
        codec.decode(KEY, content, [output])
    except CacheGenError as error:
        if len(str(error)) > 2000:
            raise AssertionError(f"not a message: {str(error)[:500]!r}") from error


def seeds() -> dict[str, bytes]:
    found = {
        f"coded_{number}": bytes([number]) + codec.encode(KEY, [make_block()]) for number, codec in enumerate(CODECS)
    }
    identity = CODECS[0].identify(KEY, [SHAPE], [torch.bfloat16])
    raw = blobs.pack_blob(identity, [blobs.Section(blobs.RAW, [bytes(2 * torch.Size(SHAPE).numel())])])
    return {**found, "raw": b"\0" + raw}


if __name__ == "__main__":
    fuzz(test_blobs, seeds(), max_len=1 << 14)
