"""Models for images, used with text alone: tokens that are no text, and what is remembered of images seen before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from cachegen.errors import InputError

if TYPE_CHECKING:
    from cachegen.pipeline.model import LoadedModel

_TOKEN_FIELDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id")
# Where a model keeps how many positions more or fewer than tokens the last prompt took.
_OFFSET_NAME = "rope_deltas"


def refuse_images(loaded: LoadedModel, token_ids: torch.Tensor, what: object) -> None:
    """Refuse tokens that stand for images, videos or sounds: their keys depend on more than the ids.

    Args:
        token_ids: integers `[num_tokens]`.
        what: names them in the message.

    Raises:
        InputError: there is one.
    """
    config = loaded.model.config
    foreign: set[int] = {
        config_id for field in _TOKEN_FIELDS if (config_id := getattr(config, field, None)) is not None
    }
    found = sorted(foreign.intersection(token_ids.tolist())) if foreign else []
    if found:
        raise InputError(f"{what}: token {found[0]} stands for an image, a video or a sound: only text is supported")


@contextmanager
def on_text_alone(model: Any) -> Iterator[None]:
    """Let the block run a model without what it remembers of the last image it saw, and give that back afterwards.

    Models for images add to all positions behind a prompt what its images took less or more than their tokens, and keep
    that number from call to call.
    """
    holders = _find_holders(model)
    offsets = [getattr(module, _OFFSET_NAME) for module in holders]
    forget_images(model)
    try:
        yield
    finally:
        for module, offset in zip(holders, offsets, strict=True):
            setattr(module, _OFFSET_NAME, offset)


def forget_images(model: Any) -> None:
    """Let a model's next call begin behind a text, whatever images it has seen."""
    for module in _find_holders(model):
        setattr(module, _OFFSET_NAME, None)


def _find_holders(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, _OFFSET_NAME)]
