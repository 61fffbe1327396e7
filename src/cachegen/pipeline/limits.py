"""How long a sequence may become before a model fails, or before a later token changes the keys of earlier ones.

A saved cache is right only while nothing that comes after it would have changed it. What can, in the models that are
loaded here, and what becomes of it:

- Rotary frequencies that depend on the sequence's length: `dynamic` NTK computes them anew for each length beyond the
  pretraining's, `longrope` has a second set for all of them. The keys of the whole context would be others. They are
  chosen before the prefill, for a length that holds question and answer, and kept (`frequencies`); what goes on beyond
  that length is refused here, before anything is computed.
- Attention to later tokens (`use_bidirectional_attention`, encoder-decoders, a prefix that sees itself): such models
  are refused on loading. A model whose layers are no decoder's keeps no keys and values and is refused by `prefill`.
- States that are not per token (convolutions, recurrences): refused on loading, by the type of layer.
- Tokenization: text that follows could merge with a context's last token. Context and question are tokenized apart, so
  that a prompt is the one's ids and then the other's, in the reference of --verify as well.
- Windows, chunked attention, ALiBi, temperatures and query scales that grow with the position (Llama 4): these act on
  queries and masks. Keys of earlier tokens stay.
- Rounding: matrix products round otherwise in blocks of another size, and LLM.int8 (--load_in_8bit) chooses outlier
  features per block. Keys change by as much as a rounding; the block size is a gate of its own.

Positions from a table (learned, or computed once) end where it ends: beyond it the model raises, on a GPU in a way that
no process survives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cachegen.errors import InputError

if TYPE_CHECKING:
    from cachegen.pipeline.model import LoadedModel

# wpe (GPT-2), embed_positions (OPT, GPT-J, BART), position_embeddings (BERT), pos_encoding (CTRL).
_POSITION_TABLE = re.compile(r"(?:.*_)?(?:wpe|pos|positions?)(?:_.*)?")


@dataclass(frozen=True)
class LengthLimit:
    """The most tokens a sequence of a model may have, and why.

    Attributes:
        num_tokens: prompt and answer, without the answer's last token, which never passes through the model.
        reason: for messages, after the limit.
    """

    num_tokens: int
    reason: str


def decoder_of(model: Any) -> Any:
    """Return the model's decoder: what holds its layers and its positions."""
    decoder = model.get_decoder()
    # ModernBERT's `decoder` is what predicts tokens.
    return model.base_model if isinstance(decoder, torch.nn.Linear) else decoder


def read_length_limit(model: Any, total_tokens: int | None = None) -> LengthLimit | None:
    """Return the lowest limit that a model's own modules set; None where they set none.

    Args:
        total_tokens: that its frequencies were chosen for; None: those it begins with.
    """
    limits = [*_position_tables(model), *_switch_limits(find_rotary_switches(decoder_of(model)), total_tokens)]
    return min(limits, key=lambda limit: limit.num_tokens, default=None)


def check_length(loaded: LoadedModel, num_tokens: int, what: str) -> None:
    """Refuse a sequence that is too long for a model's positions or its rotary frequencies.

    Args:
        num_tokens: that would pass through the model.
        what: names them in the message.

    Raises:
        InputError: it is longer than `LoadedModel.length_limit`.
    """
    limit = loaded.length_limit
    if limit is not None and num_tokens > limit.num_tokens:
        raise InputError(f"{what}: {num_tokens} tokens, but {loaded.model_id} takes {limit.num_tokens}: {limit.reason}")


def check_context(loaded: LoadedModel, num_tokens: int, path: object) -> None:
    """Refuse a context whose cache could not be used: generation begins with its last token.

    Raises:
        InputError: it is too long.
    """
    check_length(loaded, num_tokens, f"{path}")


def check_prompts(loaded: LoadedModel, num_context: int, prompts: Sequence[torch.Tensor], max_new_tokens: int) -> None:
    """Refuse questions and answers that would go on too long.

    Args:
        num_context: tokens of the context, with which all prompts begin.
        prompts: integers `[num_tokens]` each.

    Raises:
        InputError: one is too long, with all of its answer.
    """
    longest = max(map(len, prompts))
    what = f"the context's {num_context} tokens, {longest - num_context} of a question and"
    check_length(
        loaded,
        longest + max_new_tokens - 1,
        f"{what} {max_new_tokens} of an answer (`question`, `max_new_tokens`)",
    )


def _position_tables(model: Any) -> Iterator[LengthLimit]:
    """Yield a limit for every table of positions: embeddings that are not the tokens', and buffers computed once."""
    tokens = model.get_input_embeddings()
    for module in decoder_of(model).modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Embedding) and child is not tokens and _POSITION_TABLE.fullmatch(name):
                yield _table_limit(child.num_embeddings - _rows_before_the_first(child))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.ndim == 2 and buffer.is_floating_point() and _POSITION_TABLE.fullmatch(name):
                yield _table_limit(buffer.shape[0])
    config = model.config.get_text_config(decoder=True)
    if getattr(getattr(config, "attn_config", None), "alibi", False) and hasattr(config, "max_seq_len"):
        yield _table_limit(config.max_seq_len)  # MPT makes its ALiBi biases for so many positions and no more


def _table_limit(num_positions: int) -> LengthLimit:
    return LengthLimit(num_positions, "it has no more positions; give a shorter text")


def _rows_before_the_first(table: torch.nn.Embedding) -> int:
    """Return which row is that of position 0: OPT and BART say it, RoBERTa counts from its padding token's on."""
    offset = getattr(table, "offset", None)
    if offset is not None:
        return int(offset)
    # Subclasses compute sinusoids and count from 0, whatever their padding token.
    return table.padding_idx + 1 if type(table) is torch.nn.Embedding and table.padding_idx is not None else 0


def _switch_limits(switches: Iterable[RotarySwitch], total_tokens: int | None) -> Iterator[LengthLimit]:
    """Yield how far each rotary embedding keeps its frequencies, for those that were chosen."""
    for switch in switches:
        num_tokens = switch.num_tokens
        if total_tokens is not None and total_tokens > num_tokens:
            if switch.rope_type == "longrope":
                continue  # it has no third set
            num_tokens = total_tokens
        yield LengthLimit(
            num_tokens,
            f"beyond that its rotary embedding ({switch.rope_type}) changes its frequencies, and with them all keys; "
            "give a shorter text, or prefill with a larger `max_total_tokens`",
        )


@dataclass(frozen=True)
class RotarySwitch:
    """A rotary embedding whose frequencies depend on the length of the sequence.

    Attributes:
        module: that has it.
        layer_type: of the layers it is for; None where the module has one for all.
        rope_type: "longrope", or one with "dynamic" in it.
        num_tokens: up to which the frequencies are those it begins with.
        buffer_name: the frequencies' path below the decoder.
    """

    module: Any
    layer_type: str | None
    rope_type: str
    num_tokens: int
    buffer_name: str

    @property
    def prefix(self) -> str:
        """What the names of the module's buffers and attributes begin with."""
        return "" if self.layer_type is None else f"{self.layer_type}_"


def find_rotary_switches(decoder: Any) -> Iterator[RotarySwitch]:
    """Yield every rotary embedding of a decoder whose frequencies depend on the length of the sequence."""
    for name, module in decoder.named_modules():
        rope_types = getattr(module, "rope_type", None)
        if rope_types is None:
            continue
        of_layers = rope_types if isinstance(rope_types, dict) else {None: rope_types}
        for layer_type, rope_type in of_layers.items():
            if rope_type == "longrope":
                parameters = module.config.rope_parameters
                parameters = parameters if layer_type is None else parameters[layer_type]
                num_tokens = parameters["original_max_position_embeddings"]
            elif "dynamic" in str(rope_type):
                num_tokens = module.original_max_seq_len
            else:
                continue
            prefix = "" if layer_type is None else f"{layer_type}_"
            yield RotarySwitch(module, layer_type, str(rope_type), int(num_tokens), f"{name}.{prefix}inv_freq")
