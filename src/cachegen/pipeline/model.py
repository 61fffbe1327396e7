"""Load a language model, and say what it is: rotary embeddings, layers, devices."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import os
import ssl
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import huggingface_hub.constants
import huggingface_hub.utils.logging
import torch
import transformers.utils.logging
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from cachegen.errors import BackendUnavailableError, CacheGenError, ConfigError, InputError
from cachegen.kv_cache import SUPPORTED_DTYPES, RotaryEmbedding
from cachegen.pipeline.architecture import (
    LayerCache,
    choose_auto_class,
    count_head_repeats,
    find_cache_argument,
    find_layer_caches,
    refuse_unrepresentable,
)
from cachegen.pipeline.fingerprint import compute_fingerprint, compute_memory_fingerprint, find_checkpoint_fingerprint
from cachegen.pipeline.gguf import (
    GGUF_DTYPE,
    find_gguf_file,
    forget_blocks,
    hidden_bar,
    name_gguf_model,
    require_gguf,
    split_gguf_name,
    unpacking,
)
from cachegen.pipeline.limits import LengthLimit, decoder_of, read_length_limit
from cachegen.pipeline.model_cache import CacheLayout
from cachegen.pipeline.model_files import CONFIG_NAME, first_line, read_config

BUNDLED_MODEL = "models/tiny-mistral"

_HUB_TIMEOUT_SECONDS = 5
_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with what identifies it.

    Attributes:
        model: a transformers causal language model, in evaluation mode.
        tokenizer: its tokenizer; None for a model that was given without.
        model_id: the Hugging Face id, folder or GGUF file it was loaded from, or a name for messages.
        fingerprint: SHA-256 in hex of its config, tokenizer and weights; see `fingerprint.compute_fingerprint`, and for
            a model that was given in memory `fingerprint.compute_memory_fingerprint`.
        rotary_embeddings: empty for a model without.
        total_tokens: that frequencies which depend on it were chosen for; None: those that the model begins with.
    """

    model: Any
    tokenizer: Any
    model_id: str
    fingerprint: str
    rotary_embeddings: tuple[RotaryEmbedding, ...]
    total_tokens: int | None = None

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the model computes in."""
        return self.model.dtype

    @property
    def text_config(self) -> Any:
        """The transformers config of the decoder, also where the model has other parts."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def num_layers(self) -> int:
        """The number of layers that have keys and values of their own."""
        return sum(layer.has_planes for layer in self.layer_caches)

    @functools.cached_property
    def layer_caches(self) -> tuple[LayerCache, ...]:
        """What each layer keeps."""
        return find_layer_caches(self.text_config)

    @functools.cached_property
    def has_states(self) -> bool:
        """Whether some layers have recurrent states."""
        return any(layer.num_states for layer in self.layer_caches)

    @property
    def cache_layout(self) -> CacheLayout:
        """What a cache of the model holds, layer by layer."""
        return CacheLayout(self.layer_caches, tuple(self._devices), count_head_repeats(self.text_config))

    @property
    def num_head_repeats(self) -> int:
        """How often the model caches each head of keys and values; one is stored."""
        return count_head_repeats(self.text_config)

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence the config promises, None where it does not say."""
        return getattr(self.text_config, "max_position_embeddings", None)

    @property
    def layers(self) -> list[torch.nn.Module]:
        """The decoder's layers in order, all; empty for a model that does not keep them in one list."""
        for module in decoder_of(self.model).modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == self.text_config.num_hidden_layers:
                return list(module)
        return []

    @property
    def layer_devices(self) -> list[torch.device]:
        """Where the keys and values belong of each layer that has some."""
        return [device for device, layer in zip(self._devices, self.layer_caches, strict=True) if layer.has_planes]

    @property
    def _devices(self) -> list[torch.device]:
        """Where each layer is that keeps anything."""
        num_layers = len(self.layer_caches)
        devices = [next(layer.parameters()).device for layer in self.layers[:num_layers]] or [self.device] * num_layers
        # Weights that accelerate keeps elsewhere show as meta; they are computed where the ids go in.
        return [self.device if device.type == "meta" else device for device in devices]

    @functools.cached_property
    def length_limit(self) -> LengthLimit | None:
        """The most tokens that may pass through the model; None where it has no such limit of its own."""
        return read_length_limit(self.model, self.total_tokens)

    def fixed_frequencies(self) -> AbstractContextManager[None]:
        """Let the model have the frequencies that were chosen, while anything passes through it."""
        from cachegen.pipeline.frequencies import keep_frequencies  # which needs this module

        return keep_frequencies(self.model, self.total_tokens)

    def name_cache(self, cache: Any) -> dict[str, Any]:
        """Return a cache as the argument that the model's forward pass and `generate()` take."""
        return {find_cache_argument(type(self.model)) or "past_key_values": cache}

    @functools.cached_property
    def can_limit_logits(self) -> bool:
        """Whether the forward pass can compute logits for the last tokens only."""
        return self._takes("logits_to_keep")

    @functools.cached_property
    def can_be_told_positions(self) -> bool:
        """Whether the forward pass takes the tokens' positions."""
        return self._takes("position_ids")

    def _takes(self, argument: str) -> bool:
        return argument in inspect.signature(type(self.model).forward).parameters


def load_model(
    model_id: str,
    *,
    device: torch.device,
    dtype: torch.dtype | Literal["auto"] = "auto",
    gguf_file: str | None = None,
    weight_bits: int | None = None,
    num_gpus: int | None = None,
    max_gpu_memory: int | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer from a folder, the Hugging Face cache or the hub; never any code of theirs.

    Args:
        model_id: a Hugging Face id or a local folder, or the path of a GGUF file.
        device: where the model runs; with `num_gpus` or `max_gpu_memory` it must be CUDA.
        dtype: of weights and computation; "auto" is the checkpoint's own, bfloat16 for a GGUF file.
        gguf_file: name of a GGUF file in `model_id`, which is loaded instead of the checkpoint's other files.
        weight_bits: keep the weights in 8 bits (bitsandbytes, LLM.int8) or in 4 (NF4); None as they are.
        num_gpus: spread the layers over so many GPUs.
        max_gpu_memory: GiB of weights per GPU at most.

    Raises:
        InputError: there is no such model, it is damaged, or its cache holds what is not supported.
        BackendUnavailableError: a package or a GPU that was asked for is not there.
        ConfigError: the flags contradict each other.
    """
    model_id = name_gguf_model(model_id, gguf_file)
    gguf_names = split_gguf_name(model_id)
    if gguf_names is not None and weight_bits is not None:
        raise ConfigError(
            f"`load_in_{weight_bits}bit` is not for a GGUF file, whose weights are rounded already: {model_id}"
        )
    placement = _plan_placement(device, dtype, weight_bits, num_gpus, max_gpu_memory)
    with quiet_transformers(), hidden_bar():
        local_files_only = _check_reachable(model_id)
        place, source = _find_source(model_id, local_files_only)
        if gguf_names is not None and dtype == "auto":
            dtype = GGUF_DTYPE
        try:
            config = AutoConfig.from_pretrained(place, **source)
            refuse_unrepresentable(model_id, config)
            fingerprint = compute_fingerprint(model_id, local_files_only=local_files_only, weight_bits=weight_bits)
            tokenizer = AutoTokenizer.from_pretrained(place, **source)
            if gguf_names is not None:
                placement["quantization_config"] = unpacking()
            loading: Any = choose_auto_class(config).from_pretrained(
                place, config=config, dtype=dtype, output_loading_info=True, **source, **placement
            )
            model, loading_info = loading
        except (CacheGenError, MemoryError, torch.OutOfMemoryError):
            raise
        except ImportError as error:
            raise BackendUnavailableError(f"{model_id}: {first_line(error)}") from error
        except Exception as error:
            # Of a damaged GGUF file, whatever reads it first raises what it likes: tokenizers a plain Exception.
            if gguf_names is None and not isinstance(error, _LOADING_ERRORS):
                raise
            raise InputError(f"{model_id}: cannot be loaded: {first_line(error)}") from error
        if gguf_names is not None:
            forget_blocks(model)
        if "device_map" not in placement:
            model.to(device)
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise InputError(f"{model_id}: the weights lack {len(missing)} tensors of the model, e.g. {missing[0]}")
    if model.dtype not in SUPPORTED_DTYPES:
        raise InputError(f"{model_id}: computes in {model.dtype}; give `dtype` float16, bfloat16 or float32")
    model.eval()
    _keep_special_tokens_only(model)
    return LoadedModel(model, tokenizer, model_id, fingerprint, read_rotary_embeddings(model))


def load_tokenizer(model_id: str, *, gguf_file: str | None = None) -> Any:
    """Load a model's tokenizer alone, from where `load_model` would.

    Raises:
        InputError: there is no such model, or its tokenizer is damaged.
        BackendUnavailableError: a package that reads it is not there.
    """
    model_id = name_gguf_model(model_id, gguf_file)
    with quiet_transformers():
        local_files_only = _check_reachable(model_id)
        place, source = _find_source(model_id, local_files_only)
        try:
            return AutoTokenizer.from_pretrained(place, **source)
        except (MemoryError, ImportError):
            raise
        except Exception as error:  # tokenizers raises a plain one
            raise InputError(f"{model_id}: its tokenizer cannot be loaded: {first_line(error)}") from error


def identify_model(model: Any, fingerprint: str | None = None) -> LoadedModel:
    """Say what a model in memory is; the model itself is neither copied nor changed.

    Args:
        model: a transformers causal language model in evaluation mode, from anywhere; a `LoadedModel` is returned as
            it is.
        fingerprint: that files say theirs is; see `identify_checkpoint`.

    Returns:
        The model with the fingerprint of what it is now, and without a tokenizer; with that of its checkpoint, if that
        is `fingerprint`.

    Raises:
        TypeError: it is no transformers model.
        ValueError: it is in training mode.
        InputError: its cache holds what is not supported, it computes in another dtype than fp16, bf16
            or fp32, or some of its weights are not in memory.
    """
    if isinstance(model, LoadedModel):
        return model
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model` must be a transformers model or a LoadedModel, got {type(model).__name__}")
    if model.training:
        raise ValueError("`model` must be in evaluation mode: call model.eval()")
    name = f"{model.name_or_path or type(model).__name__} (in memory)"
    refuse_unrepresentable(name, model.config)
    if not model.can_generate():
        raise InputError(f"{name}: {type(model).__name__} has no head that predicts tokens")
    if model.dtype not in SUPPORTED_DTYPES:
        raise InputError(f"{name}: computes in {model.dtype}; use float16, bfloat16 or float32")
    loaded = LoadedModel(model, None, name, compute_memory_fingerprint(model), read_rotary_embeddings(model))
    if fingerprint is None or fingerprint == loaded.fingerprint:
        return loaded
    known = identify_checkpoint(loaded)
    return known if known is not None and known.fingerprint == fingerprint else loaded


def identify_checkpoint(loaded: LoadedModel) -> LoadedModel | None:
    """Return a model of `identify_model` by the name and the fingerprint of the checkpoint that it was loaded from.

    Returns:
        What `load_model` calls it, still without a tokenizer; None where the checkpoint is not at hand, or the model
        is not what it says any more. A model that `load_model` returned is returned as it is.
    """
    if loaded.tokenizer is not None:
        return loaded
    fingerprint = find_checkpoint_fingerprint(loaded.model)
    if fingerprint is None:
        return None
    return dataclasses.replace(loaded, model_id=loaded.model.name_or_path, fingerprint=fingerprint)


def read_rotary_embeddings(model: Any) -> tuple[RotaryEmbedding, ...]:
    """Read the rotary embeddings in force from the decoder's modules.

    Returns:
        One per `inv_freq` buffer, named by its path below the decoder: models that alternate local and global
        attention have several, a model with learned positions none.
    """
    embeddings = []
    for module_name, module in decoder_of(model).named_modules():
        for buffer_name, buffer in module.named_buffers(recurse=False):
            if not buffer_name.endswith("inv_freq") or buffer_name.endswith("original_inv_freq"):
                continue
            prefix = buffer_name.removesuffix("inv_freq")  # "" or "sliding_attention_", ...
            rope_type = getattr(module, "rope_type", "default")
            if isinstance(rope_type, dict):
                rope_type = rope_type[prefix.removesuffix("_")]
            embeddings.append(
                RotaryEmbedding(
                    name=f"{module_name}.{buffer_name}",
                    rope_type=str(rope_type),
                    inv_freq=tuple(buffer.detach().float().cpu().tolist()),
                    attention_scaling=float(getattr(module, f"{prefix}attention_scaling", 1.0)),
                )
            )
    return tuple(embeddings)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence what transformers and huggingface_hub print and warn about, short of errors; restore it afterwards."""
    hub_logging, model_logging = huggingface_hub.utils.logging, transformers.utils.logging
    verbosities = hub_logging.get_verbosity(), model_logging.get_verbosity()
    had_progress_bars = model_logging.is_progress_bar_enabled()
    hub_logging.set_verbosity_error()
    model_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        model_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hub_logging.set_verbosity(verbosities[0])
        model_logging.set_verbosity(verbosities[1])
        if had_progress_bars:
            model_logging.enable_progress_bar()


def _plan_placement(
    device: torch.device,
    dtype: torch.dtype | Literal["auto"],
    weight_bits: int | None,
    num_gpus: int | None,
    max_gpu_memory: int | None,
) -> dict[str, Any]:
    """Return the arguments of from_pretrained that place and quantize the weights."""
    placement: dict[str, Any] = {}
    if weight_bits is not None:
        _require_package("bitsandbytes", f"`load_in_{weight_bits}bit`")
        _require_package("accelerate", f"`load_in_{weight_bits}bit`")
        computing: dict[str, Any] = {} if dtype == "auto" or weight_bits == 8 else {"bnb_4bit_compute_dtype": dtype}
        placement["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=weight_bits == 8, load_in_4bit=weight_bits == 4, bnb_4bit_quant_type="nf4", **computing
        )
        placement["device_map"] = {"": device}
    if num_gpus is None and max_gpu_memory is None:
        return placement
    if device.type != "cuda":
        raise ConfigError(f"`num_gpus` and `max_gpu_memory` need `device` cuda, got {device.type}")
    num_present = torch.cuda.device_count()
    if num_gpus is not None and num_gpus > num_present:
        raise BackendUnavailableError(f"`num_gpus` {num_gpus}: torch sees {num_present}")
    _require_package("accelerate", "`num_gpus` and `max_gpu_memory`")
    gpus = range(num_gpus if num_gpus is not None else num_present)
    placement["device_map"] = "auto"
    placement["max_memory"] = {
        gpu: torch.cuda.mem_get_info(gpu)[0] if max_gpu_memory is None else max_gpu_memory * 2**30 for gpu in gpus
    }
    return placement


def _require_package(package: str, flag: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise BackendUnavailableError(f"{flag}: needs the package {package}: pip install {package}")


def _find_source(model_id: str, local_files_only: bool) -> tuple[str, dict[str, Any]]:
    """Return what from_pretrained is given for a model: the folder or id, and further arguments.

    Raises:
        InputError: its config, or its GGUF file, is missing or damaged.
        BackendUnavailableError: a package that reads GGUF files is not there.
    """
    names = split_gguf_name(model_id)
    if names is None:
        read_config(model_id, local_files_only)  # says better than transformers what is wrong with it
        return model_id, {"local_files_only": local_files_only}
    require_gguf(model_id)
    find_gguf_file(model_id, local_files_only)
    return names[0], {"local_files_only": local_files_only, "gguf_file": names[1]}


def _check_reachable(model_id: str) -> bool:
    """Find out quickly whether there is such a model at all.

    Returns:
        Whether only local files may be used, because `model_id` is a folder or the hub cannot be reached.

    Raises:
        InputError: it is neither a folder, nor in the Hugging Face cache, nor on a hub that answers.
    """
    model_id, name = split_gguf_name(model_id) or (model_id, CONFIG_NAME)
    advice = f"give a folder or a Hugging Face id; the bundled model is {BUNDLED_MODEL}"
    if os.path.isdir(model_id):
        return True
    if os.path.exists(model_id) or os.path.isabs(model_id) or model_id.startswith("."):
        raise InputError(f"{model_id}: there is no such model folder ({advice})")
    # huggingface_hub would retry for half a minute before it says that there is no network.
    local_files_only = huggingface_hub.constants.HF_HUB_OFFLINE or not _is_hub_reachable()
    try:
        found = cached_file(model_id, name, local_files_only=local_files_only)
    except OSError as error:
        if local_files_only:
            reason = "is neither a folder nor cached, and the Hugging Face hub cannot be reached"
        else:
            reason = f"is neither a folder nor to be had from the Hugging Face hub: {first_line(error)}"
        raise InputError(f"{model_id}: {reason} ({advice})") from error
    if found is None:
        raise InputError(f"{model_id}: is no model: it has no {name} ({advice})")
    return local_files_only


def _is_hub_reachable() -> bool:
    """Ask the hub for any answer at all, once, through whatever proxy the system has."""
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # huggingface_hub has certificates of its own
    except OSError:
        return False


def _keep_special_tokens_only(model: Any) -> None:
    """Drop the checkpoint's sampling defaults: answers are greedy, and generate() would mix them in."""
    defaults = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=defaults.bos_token_id, eos_token_id=defaults.eos_token_id, pad_token_id=defaults.pad_token_id
    )
