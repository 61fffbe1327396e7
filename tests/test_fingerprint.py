"""The fingerprint of a model: what changes it, what does not, and what it reads."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cachegen.errors import BackendUnavailableError, InputError
from cachegen.pipeline import fingerprint as fingerprint_module
from cachegen.pipeline.fingerprint import (
    choose_rows,
    compute_fingerprint,
    compute_memory_fingerprint,
    find_checkpoint_fingerprint,
)
from cachegen.pipeline.model import identify_model, load_model, quiet_transformers
from tests.fixtures import BUNDLED_MODEL
from tests.fixtures.models import CONFIGS, copy_with_other_keys, make_named, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def model_folder(tmp_path) -> Path:
    """A copy of the bundled model that a test may change."""
    return Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "model"))


def edit_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def fingerprint_of(folder: Path, **flags) -> str:
    return compute_fingerprint(str(folder), **flags)


def test_it_is_this_very_value():
    """Saved caches, documents and profiles hold it: if this changes, they are no longer this model's."""
    folder = Path(BUNDLED_MODEL)
    config = json.loads((folder / "config.json").read_text())
    del config["transformers_version"]
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    tokenizer = (folder / "tokenizer.json").read_bytes()
    content = b"config.json\0%d\0" % len(canonical) + canonical
    content += b"tokenizer.json\0%d\0" % len(tokenizer) + tokenizer
    # The file by hand: a length, a JSON header, bytes.
    raw = (folder / "model.safetensors").read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    items = []
    for name, tensor in header.items():
        assert tensor["dtype"] == "BF16"
        start, stop = (8 + header_bytes + offset for offset in tensor["data_offsets"])
        values = raw[start:stop]
        if len(values) > 2 * 65536:
            num_rows, row_bytes = tensor["shape"][0], 2 * tensor["shape"][1]
            num_chosen = {256: 8, 640: 8}[tensor["shape"][1]]
            rows = [i * (num_rows - 1) // (num_chosen - 1) for i in range(num_chosen)]
            values = b"".join(values[row * row_bytes : (row + 1) * row_bytes] for row in rows)
        items.append((f"tensor {name} bfloat16 {'x'.join(map(str, tensor['shape']))}".encode(), values))
    for name, values in sorted(items):
        content += name + b"\0%d\0" % len(values) + values
    assert fingerprint_of(folder) == hashlib.sha256(content).hexdigest()


def test_it_is_the_same_wherever_the_files_lie_and_whatever_version_wrote_them(model_folder):
    edit_config(model_folder, transformers_version="9.9", _name_or_path="elsewhere")
    assert fingerprint_of(model_folder) == compute_fingerprint(BUNDLED_MODEL)


def test_it_depends_on_config_and_tokenizer(model_folder):
    original = fingerprint_of(model_folder)
    edit_config(model_folder, rms_norm_eps=1e-5)
    other_config = fingerprint_of(model_folder)
    (model_folder / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes() + b"\n")
    assert len({original, other_config, fingerprint_of(model_folder)}) == 3


def test_it_takes_the_older_forms_of_a_tokenizer_only_where_there_is_no_tokenizer_json(model_folder):
    original = fingerprint_of(model_folder)
    (model_folder / "vocab.json").write_text("{}")
    assert fingerprint_of(model_folder) == original
    (model_folder / "tokenizer.json").unlink()
    with_vocabulary = fingerprint_of(model_folder)
    (model_folder / "merges.txt").write_text("")
    assert len({original, with_vocabulary, fingerprint_of(model_folder)}) == 3


def test_other_projections_behind_the_same_config_are_another_model(tmp_path):
    assert fingerprint_of(copy_with_other_keys(tmp_path / "other")) != compute_fingerprint(BUNDLED_MODEL)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.5.mlp.down_proj.weight", "model.layers.0.self_attn.v_proj.weight"]
)
def test_any_tensor_changes_it(model_folder, name):
    weights = read_weights(model_folder)
    weights[name] = weights[name] + 1
    write_weights(model_folder, weights)
    assert fingerprint_of(model_folder) != compute_fingerprint(BUNDLED_MODEL)


@pytest.mark.parametrize("change", ["missing", "added", "renamed", "reshaped", "another dtype"])
def test_names_shapes_and_dtypes_belong_to_it(model_folder, change):
    name = "model.norm.weight"
    weights = read_weights(model_folder)
    tensor = weights.pop(name)
    weights |= {
        "missing": {},
        "added": {name: tensor, "extra": torch.zeros(1)},
        "renamed": {name + "s": tensor},
        "reshaped": {name: tensor[None]},
        "another dtype": {name: tensor.view(torch.float16)},
    }[change]
    write_weights(model_folder, weights)
    assert fingerprint_of(model_folder) != compute_fingerprint(BUNDLED_MODEL)


def test_a_large_tensor_is_known_by_its_chosen_rows_only(model_folder):
    weights = read_weights(model_folder)
    matrix = weights["model.embed_tokens.weight"]
    chosen = choose_rows(*matrix.shape)
    for row, is_noticed in ((0, True), (1, False), (chosen[3], True), (chosen[3] + 1, False), (len(matrix) - 1, True)):
        changed = matrix.clone()
        changed[row, 7] += 1
        write_weights(model_folder, weights | {"model.embed_tokens.weight": changed})
        assert (fingerprint_of(model_folder) != compute_fingerprint(BUNDLED_MODEL)) == is_noticed


@pytest.mark.parametrize(
    ("num_rows", "row_values", "num_chosen"), [(4096, 4096, 8), (5, 100_000, 5), (100_000, 1, 2048), (10_000, 512, 8)]
)
def test_rows_are_evenly_spaced_from_the_first_to_the_last(num_rows, row_values, num_chosen):
    rows = choose_rows(num_rows, row_values)
    assert (rows[0], rows[-1], len(set(rows)), len(rows)) == (0, num_rows - 1, num_chosen, num_chosen)
    gaps = {b - a for a, b in itertools.pairwise(rows)}
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("shape", [(70_000,), (70_000, 1), (3, 5, 7, 1000), (2, 50_000), (0, 4), ()])
def test_tensors_of_every_rank_are_sampled_alike_whole_or_in_slices(tmp_path, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    ((name, found, rows),) = fingerprint_module._read_samples(tmp_path / "x.safetensors")
    description, sample = fingerprint_module._describe_sample(name, found, rows)
    flat = tensor.reshape(-1)
    if flat.numel() > 65536:
        row_values = shape[-1] if len(shape) > 1 else 1
        flat = flat.reshape(-1, row_values)[choose_rows(flat.numel() // row_values, row_values)].reshape(-1)
    assert description == f"x float32 {'x'.join(map(str, shape))}"
    assert sample == flat.numpy().tobytes()


def shard(folder: Path, extension: str) -> None:
    """Split the weights of a folder into three files and an index."""
    weights = read_weights(folder)
    (folder / "model.safetensors").unlink()
    stem = "model" if extension == "safetensors" else "pytorch_model"
    weight_map = {}
    for part in range(3):
        name = f"{stem}-{part}.{extension}"
        tensors = {key: weights[key] for key in sorted(weights)[part::3]}
        weight_map |= dict.fromkeys(tensors, name)
        if extension == "safetensors":
            save_file(tensors, folder / name, metadata={"format": "pt"})
        else:
            torch.save(tensors, folder / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{extension}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("extension", ["safetensors", "bin"])
def test_shards_and_the_other_format_of_the_same_weights_are_the_same_model_and_load(model_folder, extension):
    shard(model_folder, extension)
    loaded = load_model(str(model_folder), device=CPU)
    assert loaded.fingerprint == compute_fingerprint(BUNDLED_MODEL)


@pytest.mark.parametrize("is_archive", [True, False])
def test_a_file_of_torch_is_read_without_running_it(model_folder, is_archive):
    weights = read_weights(model_folder)
    (model_folder / "model.safetensors").unlink()
    torch.save(weights, model_folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_archive)
    assert fingerprint_of(model_folder) == compute_fingerprint(BUNDLED_MODEL)


def test_weights_that_transformers_would_not_load_do_not_count(model_folder):
    torch.save({}, model_folder / "pytorch_model.bin")
    (model_folder / "consolidated.safetensors").write_bytes(b"")
    assert fingerprint_of(model_folder) == compute_fingerprint(BUNDLED_MODEL)


def test_weights_that_the_config_names_are_those_that_count(model_folder):
    shutil.copy(model_folder / "model.safetensors", model_folder / "other.safetensors")
    edit_config(model_folder, transformers_weights="other.safetensors")
    before = fingerprint_of(model_folder)
    weights = read_weights(model_folder)
    weights["model.norm.weight"] *= 2
    write_weights(model_folder, weights)
    assert fingerprint_of(model_folder) == before
    save_file(weights, model_folder / "other.safetensors", metadata={"format": "pt"})
    assert fingerprint_of(model_folder) != before


def test_weights_rounded_on_loading_are_another_model():
    assert len({compute_fingerprint(BUNDLED_MODEL, weight_bits=bits) for bits in (None, 8, 4)}) == 3


def test_an_adapter_is_part_of_the_model(model_folder, monkeypatch):
    monkeypatch.setattr(fingerprint_module.importlib.util, "find_spec", lambda name: object())
    (model_folder / "adapter_config.json").write_text('{"r": 4}')
    save_file({"lora_A": torch.zeros(4, 256)}, model_folder / "adapter_model.safetensors")
    first = fingerprint_of(model_folder)
    save_file({"lora_A": torch.ones(4, 256)}, model_folder / "adapter_model.safetensors")
    second = fingerprint_of(model_folder)
    (model_folder / "adapter_config.json").write_text('{"r": 8}')
    assert len({compute_fingerprint(BUNDLED_MODEL), first, second, fingerprint_of(model_folder)}) == 4


def test_an_adapter_that_would_be_left_out_is_refused(model_folder, monkeypatch):
    monkeypatch.setattr(fingerprint_module.importlib.util, "find_spec", lambda name: None)
    (model_folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BackendUnavailableError, match="needs the package peft: pip install peft"):
        load_model(str(model_folder), device=CPU)


@pytest.mark.parametrize("damage", ["empty", "truncated", "no header", "a pickle"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights_are_refused_by_name_in_one_line(model_folder, name, damage):
    weights = read_weights(model_folder)
    path = model_folder / name
    if name == "pytorch_model.bin":
        (model_folder / "model.safetensors").unlink()
        torch.save(weights, path)
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "truncated": content[:-100_000], "no header": b"\xff" * 100, "a pickle": b"\x80\x04N."}[damage]
    )
    with pytest.raises(InputError) as caught:
        load_model(str(model_folder), device=CPU)
    assert str(caught.value).startswith(f"{path}: the weights cannot be read: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "field weight_map must name a file"),
        ('{"weight_map": {"a": 1}}', "field weight_map must name a file"),
        ('{"weight_map": {"a": "nope.safetensors"}}', "nope.safetensors: no such file"),
    ],
)
def test_a_damaged_index_is_refused(model_folder, index, message):
    (model_folder / "model.safetensors").unlink()
    (model_folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=message):
        fingerprint_of(model_folder)


# --- models in memory -------------------------------------------------------------------------------------------------


def test_a_model_in_memory_is_the_same_after_saving_and_loading(tmp_path):
    model = make_named("llama").model
    before = compute_memory_fingerprint(model)
    with quiet_transformers():
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert compute_memory_fingerprint(again) == compute_memory_fingerprint(model) == before
    assert identify_model(again).model_id == f"{tmp_path} (in memory)"


def test_weights_config_dtype_and_class_make_a_model_in_memory():
    original = make_named("llama").model
    weights, config, kind = (copy.deepcopy(original) for _ in range(3))
    with torch.no_grad():
        weights.model.layers[-1].mlp.down_proj.weight[0, 0] += 1
    config.config.rms_norm_eps *= 2
    kind.__class__ = type("AnotherClass", (type(original),), {})
    models = [original, weights, config, kind, copy.deepcopy(original).bfloat16()]
    assert len(set(map(compute_memory_fingerprint, models))) == len(models)


def test_a_model_in_memory_is_hashed_as_documented():
    """Documents hold it: if this changes, they are no longer this model's."""
    model = make_named("llama").model
    config = json.loads(model.config.to_json_string())
    for name in ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype"):
        config.pop(name, None)
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    content = b"model in memory\x0016\0LlamaForCausalLM" + b"config\0%d\0" % len(canonical) + canonical
    items = []
    for name, tensor in model.state_dict().items():
        rows = tensor.reshape(-1, tensor.shape[-1])
        if tensor.numel() > 65536:
            assert tensor.shape == (4096, 64)
            rows = rows[[i * 4095 // 31 for i in range(32)]]
        shape = "x".join(map(str, tensor.shape))
        items.append((f"tensor {name} float32 {shape}".encode(), rows.numpy().tobytes()))
    for name, values in sorted(items):
        content += name + b"\0%d\0" % len(values) + values
    assert compute_memory_fingerprint(model) == hashlib.sha256(content).hexdigest()


def test_adapters_in_memory_count_as_they_are_in_force():
    """What layers of peft say of themselves, without peft: the tensors are the same whatever is switched on."""
    model = copy.deepcopy(make_named("llama").model)
    without = compute_memory_fingerprint(model)
    layer = model.model.layers[1].self_attn.q_proj
    found = {without}
    for changed in (
        {"active_adapters": ["a"], "disable_adapters": False, "merged_adapters": [], "scaling": {"a": 2.0, "b": 4.0}},
        {"disable_adapters": True},
        {"disable_adapters": False, "active_adapters": ["b"]},
        {"scaling": {"a": 2.0, "b": 5.0}},
        {"merged_adapters": ["b"]},
    ):
        vars(layer).update(changed)
        found.add(compute_memory_fingerprint(model))
    assert len(found) == 6
    layer.scaling["a"] = 3.0  # of one that is not active
    assert compute_memory_fingerprint(model) in found


def test_a_model_in_memory_is_not_known_by_the_files_of_its_checkpoint():
    loaded = load_model(BUNDLED_MODEL, device=CPU)
    assert compute_memory_fingerprint(loaded.model) != loaded.fingerprint
    assert identify_model(loaded) is loaded


@functools.cache
def load_plainly(folder: str = BUNDLED_MODEL, dtype: str = "auto"):
    """A model as transformers gives it; tests must not change it."""
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_a_model_in_memory_is_found_to_be_its_checkpoint_in_any_dtype(dtype):
    model, expected = load_plainly(dtype=dtype), compute_fingerprint(BUNDLED_MODEL)
    assert find_checkpoint_fingerprint(model) == expected
    assert identify_model(model, expected).fingerprint == expected
    assert identify_model(model, expected).model_id == BUNDLED_MODEL
    for other in (None, "0" * 64):
        assert identify_model(model, other).fingerprint == compute_memory_fingerprint(model)


def test_a_model_in_memory_with_tied_weights_and_one_from_a_pickle_are_found_to_be_their_checkpoints(tmp_path):
    config = copy.deepcopy(CONFIGS["llama"])
    config.tie_word_embeddings = True
    save_model(config, tmp_path)
    model = load_plainly(str(tmp_path))
    assert "lm_head.weight" not in read_weights(tmp_path) and "lm_head.weight" in model.state_dict()
    assert find_checkpoint_fingerprint(model) == fingerprint_of(tmp_path)
    torch.save(read_weights(tmp_path), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert find_checkpoint_fingerprint(model) == fingerprint_of(tmp_path)


def change_weight(model) -> None:
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight *= 1.25


def add_tensor(model) -> None:
    model.model.layers[0].register_buffer("more", torch.ones(3))


@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        add_tensor,
        lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
        lambda model: setattr(model.config, "_name_or_path", "no/such-model"),
        lambda model: setattr(model, "name_or_path", ""),
    ],
    ids=["weights", "a tensor more", "config", "no files", "no name"],
)
def test_a_model_that_was_changed_in_memory_is_not_its_checkpoint(change):
    model = copy.deepcopy(load_plainly())
    assert find_checkpoint_fingerprint(model) is not None
    change(model)
    if model.config._name_or_path != BUNDLED_MODEL:
        model.name_or_path = model.config._name_or_path
    assert find_checkpoint_fingerprint(model) is None


@pytest.mark.parametrize("damage", ["adapter_config.json", "model.safetensors", "config.json"])
def test_files_that_have_changed_since_are_not_the_models_any_more(model_folder, damage):
    model = load_plainly(str(model_folder))
    assert find_checkpoint_fingerprint(model) is not None
    (model_folder / damage).write_bytes(b"{}")
    assert find_checkpoint_fingerprint(model) is None
