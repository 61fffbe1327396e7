"""What the CUDA kernels of the inverse transform must do, for any `CudaKernels`: on a GPU, and emulated on the CPU.

The reference is torch's code, on the CPU. Digits are equal to it. Values are, too, where torch sums by fused
multiply-adds, as x86 processors with AVX2 do; elsewhere torch rounds products first, and nothing says that it will
always do the one or the other. So values in fp32 may be off by the roundings of a few sums, and values of 16 bits by
one unit in their last place, since a value between two of them may fall to either side. A mistake in which channel,
token or pair goes where is thousands of times larger.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cachegen.coder.cpu_kernels import CPU as CPU_KERNELS
from cachegen.coder.kernels import Angles, SynthesisKernels
from cachegen.methods.rotary import angles_of
from cachegen.methods.transform.batched import TorchSynthesis
from cachegen.methods.transform.transform import MAX_EXACT_BF16
from cachegen.rotation import Rotation
from tests.cuda_component_checks import CHUNK_TOKENS, decode_transform_document, make_transform_document
from tests.fixtures.caches import DTYPES

CPU = torch.device("cpu")
REFERENCE = TorchSynthesis()
MARGIN = 8  # elements beside what is written, so that it is as aligned as its buffer

Move = Callable[[torch.Tensor], torch.Tensor]
"""Brings a tensor, which may be a view into a larger one, to where the kernels read or write it."""


def move_to(device: torch.device) -> Move:
    """Return what copies to a device, with whatever a view lies in."""

    def move(values: torch.Tensor) -> torch.Tensor:
        whole = torch.empty(0, dtype=values.dtype).set_(values.untyped_storage())
        return whole.to(device, copy=True).as_strided(values.shape, values.stride(), values.storage_offset())

    return move


# --- digits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DigitShape:
    """Components of some groups.

    Attributes:
        room: components behind each token's that are not read.
        shifts: elements by which components and digits begin off what their buffers are aligned to.
    """

    num_groups: int
    num_tokens: int
    num_components: int
    num_large: int
    room: int = 0
    shifts: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        numbers = (self.num_groups, self.num_tokens, self.num_components, self.num_large, self.room, *self.shifts)
        return "-".join(map(str, numbers))


DIGIT_SHAPES = [
    DigitShape(1, 1, 1, 0),
    DigitShape(2, 17, 40, 8),  # a run of tokens and one
    DigitShape(3, 5, 40, 40, room=8),  # all large
    DigitShape(2, 33, 37, 5),  # neither aligned
    DigitShape(2, 18, 48, 4),  # large components end within a piece
    DigitShape(2, 3, 16, 0, room=3),
    DigitShape(2, 7, 32, 16, shifts=(1, 0)),
    DigitShape(2, 7, 32, 16, shifts=(0, 1)),
    DigitShape(1, 4, 2072, 16),  # more pieces than a block has threads
    DigitShape(1, 2, 300, 0, room=1),
]


def make_components(shape: DigitShape) -> torch.Tensor:
    """As large as digits are exact, the limits among them, in a larger buffer whose rest is larger."""
    generator = torch.Generator().manual_seed(4)
    size = (shape.num_groups, shape.num_tokens, shape.num_components)
    limits = torch.full(size, MAX_EXACT_BF16)
    limits[..., : shape.num_large] = (MAX_EXACT_BF16 << 8) - 1
    drawn = ((torch.rand(size, generator=generator) * 2 - 1) * limits).round().to(torch.int32)
    drawn[:, ::3, ::2] = limits[:, ::3, ::2].to(torch.int32)
    drawn[:, 1::3, ::5] = -limits[:, 1::3, ::5].to(torch.int32)
    width = shape.num_components + shape.room
    buffer = torch.full(
        (shape.num_groups * (shape.num_tokens + 2) * width + shape.shifts[0],), 1 << 20, dtype=torch.int32
    )
    within = buffer[shape.shifts[0] :].view(shape.num_groups, shape.num_tokens + 2, width)[
        :, 1:-1, : shape.num_components
    ]
    within.copy_(drawn)
    return within


def split(
    kernels, components: torch.Tensor, num_large: int, move: Move, *, shift: int = 0, was_beyond: bool = False
) -> tuple[torch.Tensor, bool]:
    """Return digits and flag, after a look at what lies beside the digits."""
    shape = (*components.shape[:2], components.shape[2] + num_large)
    count = shape[0] * shape[1] * shape[2]
    whole = torch.full((count + 2 * MARGIN + shift,), 7.0, dtype=torch.bfloat16)
    inside = slice(MARGIN + shift, MARGIN + shift + count)
    digits = move(whole[inside].view(shape))
    beyond = move(torch.tensor([int(was_beyond)], dtype=torch.int32))
    kernels.synthesis.split_digits(move(components), num_large, digits, beyond)
    found = torch.empty(0, dtype=digits.dtype, device=digits.device).set_(digits.untyped_storage()).cpu()
    if len(found) == len(whole):  # not where a guard page is the margin
        assert (found[: inside.start] == 7).all() and (found[inside.stop :] == 7).all()
    return digits.cpu().clone(), kernels.synthesis.start_reading(beyond)()


def check_digits(kernels, shape: DigitShape, move: Move | None = None) -> None:
    """Digits and flag are torch's, up to the limits and one beyond them, wherever that is."""
    move = move or move_to(kernels.device)
    components = make_components(shape)
    last = (shape.num_groups - 1, shape.num_tokens - 1, shape.num_components - 1)
    places = {(0, 0, 0), last, (0, shape.num_tokens // 2, max(shape.num_large - 1, 0))}
    places.add((last[0], 0, min(shape.num_large, last[2])))
    for place in [None, *sorted(places)]:
        for sign in (1, -1):
            changed = move_to(CPU)(components)
            if place is not None:
                changed[place] = sign * ((MAX_EXACT_BF16 << 8) if place[2] < shape.num_large else MAX_EXACT_BF16 + 1)
            expected = torch.empty(*changed.shape[:2], shape.num_components + shape.num_large, dtype=torch.bfloat16)
            beyond = torch.zeros(1, dtype=torch.int32)
            REFERENCE.split_digits(changed, shape.num_large, expected, beyond)
            assert bool(beyond) == (place is not None)
            digits, is_beyond = split(kernels, changed, shape.num_large, move, shift=shape.shifts[1])
            assert torch.equal(digits, expected) and is_beyond == bool(beyond)
    assert split(kernels, components, shape.num_large, move, was_beyond=True)[1]  # of a block before


# --- values -----------------------------------------------------------------------------------------------------------


def turns(num_pairs: int, **options) -> Rotation:
    return Rotation(tuple(1.5 * 0.8**i for i in range(num_pairs)), **options)


@dataclass(frozen=True)
class PlaceShape:
    """The planes of some groups.

    Attributes:
        keys, values: heads and dims.
        rotations: of keys and values.
        layout: of the planes in memory.
    """

    num_groups: int
    num_layers: int
    num_tokens: int
    keys: tuple[int, int]
    values: tuple[int, int]
    rotations: tuple[Rotation | None, Rotation | None]
    layout: str = "dense"

    def __str__(self) -> str:
        numbers = (self.num_groups, self.num_layers, self.num_tokens, *self.keys, *self.values)
        parts = [
            "none" if r is None else f"{r.pairing}{r.offset}+{r.num_dims}x{r.attention_scaling}" for r in self.rotations
        ]
        return "-".join([*map(str, numbers), *parts, self.layout])


PLACE_SHAPES = [
    PlaceShape(1, 1, 1, (1, 16), (1, 16), (turns(8), None)),
    PlaceShape(2, 2, 17, (2, 64), (2, 64), (turns(32), None)),
    PlaceShape(1, 1, 5, (3, 80), (3, 80), (turns(16, offset=8), turns(40)), "head_major"),
    PlaceShape(2, 1, 3, (1, 96), (2, 80), (turns(16, pairing="interleaved", offset=64), None), "tokens"),
    PlaceShape(1, 2, 18, (8, 128), (4, 128), (turns(64, attention_scaling=1.25), None), "head_major"),
    PlaceShape(1, 1, 2, (9, 256), (3, 256), (turns(128), turns(32, pairing="interleaved"))),  # more than the threads
    PlaceShape(1, 1, 6, (2, 64), (2, 64), (None, None), "odd"),
    PlaceShape(2, 1, 7, (2, 16), (1, 64), (turns(7, offset=1), turns(5, pairing="interleaved", offset=3))),
    PlaceShape(1, 3, 4, (1, 10), (3, 5), (turns(3, offset=2, attention_scaling=0.5), None), "tokens"),
    PlaceShape(1, 1, 4, (2, 80), (2, 80), (turns(20, offset=4), None), "odd"),
    PlaceShape(1, 1, 4, (2, 64), (2, 96), (turns(32), None), "shifted"),
    PlaceShape(3, 22, 1, (1, 4), (1, 4), (turns(2), None)),  # more planes than an argument has
]
LONG = PlaceShape(4, 8, 300, (8, 128), (8, 128), (turns(64), None), "head_major")


def allocate_planes(shape: PlaceShape, dtype: torch.dtype) -> list[torch.Tensor]:
    """NaN, each plane in a buffer of its own, with room before and behind it unless dense."""
    planes = []
    for index in range(2 * shape.num_groups * shape.num_layers):
        heads, dim = (shape.keys, shape.values)[index % 2]
        tokens = shape.num_tokens
        if shape.layout == "head_major":
            plane = torch.full((heads, tokens + 5, dim), torch.nan, dtype=dtype)[:, 3 : 3 + tokens].permute(1, 0, 2)
        elif shape.layout == "tokens":  # of a cache of more of them
            plane = torch.full((tokens + 5, heads, dim), torch.nan, dtype=dtype)[2 : 2 + tokens]
        elif shape.layout in ("odd", "shifted"):
            room = 3 if shape.layout == "odd" else 4
            plane = torch.full((tokens + 1, heads + 1, dim + room), torch.nan, dtype=dtype)[1:, 1:, 1 : 1 + dim]
        else:
            plane = torch.full((tokens, heads, dim), torch.nan, dtype=dtype)
        planes.append(plane)
    return planes


def check_place(kernels, shape: PlaceShape, dtype: torch.dtype, move: Move | None = None) -> None:
    """All values are torch's, but for what the module's docstring says, and nothing beside them is written."""
    move = move or move_to(kernels.device)
    generator = torch.Generator().manual_seed(5)
    num_channels = shape.num_layers * (shape.keys[0] * shape.keys[1] + shape.values[0] * shape.values[1])
    product = 20 * torch.randn(shape.num_groups, shape.num_tokens, num_channels, generator=generator)
    means = 3 * torch.randn(shape.num_groups, num_channels, generator=generator)
    angles = [None if r is None else angles_of(r, shape.num_tokens, 11, CPU) for r in shape.rotations]
    expected, planes = allocate_planes(shape, dtype), [move(plane) for plane in allocate_planes(shape, dtype)]
    moved: list[Angles | None] = [None if pair is None else (move(pair[0]), move(pair[1])) for pair in angles]
    step = 0.37
    kernels.synthesis.place_vectors(move(product), move(means), step, planes, shape.rotations, moved)
    REFERENCE.place_vectors(product, means, step, expected, shape.rotations, angles)
    for plane, right in zip(planes, expected, strict=True):
        assert_near(plane.cpu(), right)
        whole = torch.empty(0, dtype=dtype, device=plane.device).set_(plane.untyped_storage())
        assert torch.isnan(whole).sum() == len(whole) - plane.numel() or not plane.numel()


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """As near as the module's docstring says."""
    a, b = found.double(), expected.double()
    allowed = b.abs().max() * 2.0**-21
    if found.dtype != torch.float32:
        allowed = allowed + b.abs() * torch.finfo(found.dtype).eps
    assert ((a - b).abs() <= allowed).all()


# --- whole documents --------------------------------------------------------------------------------------------------


class _Watched(TorchSynthesis):
    """Torch's code, or a device's kernels, and every flag that was read.

    Attributes:
        flags: in the order of the chunks.
    """

    def __init__(self, kernels: SynthesisKernels) -> None:
        self.split_digits, self.place_vectors = kernels.split_digits, kernels.place_vectors
        self._kernels = kernels
        self.flags: list[bool] = []

    def start_reading(self, beyond: torch.Tensor) -> Callable[[], bool]:
        read = self._kernels.start_reading(beyond)

        def read_once() -> bool:
            self.flags.append(read())
            return self.flags[-1]

        return read_once


def with_synthesis(kernels, synthesis: SynthesisKernels | None):
    """Return the same kernels with another inverse transform."""
    changed = copy.copy(kernels)
    changed.synthesis = synthesis
    return changed


def check_documents(kernels) -> None:
    """Documents of several levels, and of layers that lack tokens, decode to what torch's code makes of them."""
    for first_stored in ((), (20,) * 4, (60, 60, 7, 7)):
        _, encoder, files = make_transform_document(CPU_KERNELS, first_stored=first_stored)
        for level in encoder.levels:
            found = decode_transform_document(kernels, encoder, files, level)
            expected = decode_transform_document(with_synthesis(kernels, TorchSynthesis()), encoder, files, level)
            for index, (a, b) in enumerate(zip(found.planes, expected.planes, strict=True)):
                first = first_stored[index // 2] if first_stored else 0
                assert_near(a[first:], b[first:])
                assert torch.equal(a[:first].isnan(), b[:first].isnan())


def check_components_beyond(kernels) -> None:
    """A chunk with a component that bf16 does not have is multiplied once more, and the chunk without one is not."""
    stop, level = CHUNK_TOKENS[0], 2
    _, encoder, files = make_transform_document(CPU_KERNELS, has_large=True)
    watched = _Watched(kernels.synthesis)
    found = decode_transform_document(with_synthesis(kernels, watched), encoder, files, level)
    assert watched.flags == [True, False]
    apart = decode_transform_document(with_synthesis(kernels, None), encoder, files, level)
    for a, b in zip(found.planes, apart.planes, strict=True):
        assert torch.equal(a[:stop], b[:stop])
    assert not all(torch.equal(a[stop:], b[stop:]) for a, b in zip(found.planes, apart.planes, strict=True))


# --- all of them ------------------------------------------------------------------------------------------------------


def list_synthesis_checks(*, is_short: bool) -> Iterator[tuple[str, Callable[[Any], None]]]:
    """Yield names and checks; `is_short` is for a sanitizer."""
    for digits in DIGIT_SHAPES[:4] if is_short else DIGIT_SHAPES:
        yield f"digits {digits}", lambda kernels, shape=digits: check_digits(kernels, shape)
    for placed in PLACE_SHAPES[1:4] if is_short else [*PLACE_SHAPES, LONG]:
        for dtype in DTYPES[:1] if is_short else DTYPES:
            yield f"places {placed} {dtype}", lambda kernels, s=placed, d=dtype: check_place(kernels, s, d)
    yield "documents by kernels and by torch", check_documents
    yield "components beyond bf16", check_components_beyond
