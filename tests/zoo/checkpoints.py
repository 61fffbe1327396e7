"""Random checkpoints of the zoo's families, and what transformers by itself computes with them."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from cachegen.errors import CacheGenError
from cachegen.pipeline.model import LoadedModel, load_model, quiet_transformers
from tests.fixtures import BUNDLED_MODEL
from tests.zoo.sizes import VOCABULARY_SIZE, Family

_LOUDNESS = 4
"""Factor on the weights of matrices, so that greedy tokens differ from each other, and by far."""


@dataclass(frozen=True)
class Specimen:
    """A random checkpoint of a family, and what `load_model` makes of it.

    Attributes:
        family: it belongs to.
        folder: with its config, weights and a tokenizer, which is never asked.
        error: with which `load_model` refuses it; None where it loads.
    """

    family: Family
    folder: Path
    error: CacheGenError | None

    def load(self, dtype: torch.dtype) -> LoadedModel:
        """Load it as the scripts do."""
        return load_model(str(self.folder), device=torch.device("cpu"), dtype=dtype)

    @functools.cached_property
    def exact(self) -> LoadedModel:
        """The model in fp32, where blocks and one pass differ by next to nothing."""
        return self.load(torch.float32)

    @functools.cached_property
    def half(self) -> LoadedModel:
        """The model in fp16, the finest dtype that method `lossless` takes."""
        return self.load(torch.float16)

    @functools.cached_property
    def plain(self) -> Any:
        """The model in fp16 as transformers loads it, without this project."""
        config = self.family.make_config()
        is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        auto_class: Any = transformers.AutoModelForCausalLM if is_causal else _published_class(config)
        with quiet_transformers():
            model = auto_class.from_pretrained(self.folder, dtype=torch.float16)
            if model.dtype != torch.float16:  # transformers 5.10 takes that of a text part from its config
                model = _published_class(config).from_pretrained(self.folder, dtype=torch.float16)
        return model.eval()


def save_specimen(family: Family, folder: Path) -> Specimen:
    """Make a checkpoint of a family in `folder`, the same weights whenever it is called, and try to load it."""
    config = family.make_config()
    torch.manual_seed(0)
    with quiet_transformers():
        model: Any = _published_class(config).from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2 and "embed" not in name and "wte" not in name:
                    parameter.mul_(_LOUDNESS)
        model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(BUNDLED_MODEL) / name, folder / name)
    try:
        load_model(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    except CacheGenError as error:
        return Specimen(family, folder, error)
    return Specimen(family, folder, None)


def make_ids(num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Return random ids, int64 `[num_tokens]`, without special tokens: those for images are the last dozen."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY_SIZE - 12, (num_tokens,), generator=generator)


def _published_class(config: transformers.PreTrainedConfig) -> Any:
    """Return the class that checkpoints of such a config are of: with all parts, where it has parts for images."""
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
