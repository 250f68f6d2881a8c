import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from keras import ops

from keras_pg2 import PaliGemma2, PaliGemmaConfig, _backend
from keras_pg2.checkpoints import io, names, presets
from keras_pg2.config import VARIANTS

FORMATS = ("hf", "keras-hub", "big-vision")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_tables_cover_every_variable_once(variant, format):
    config = PaliGemmaConfig.from_variant(variant, 448)
    with _backend.variables_without_values():
        variables = PaliGemma2(config).variables_by_path()
    specs = names.tensor_specs(format, config)
    assert len({(spec.name, spec.index) for spec in specs}) == len(specs)
    assert {spec.path: spec.shape for spec in specs} == {
        path: tuple(variable.shape) for path, variable in variables.items()
    }
    for spec in specs:
        assert np.prod(spec.source_shape) == np.prod(spec.shape)


@pytest.mark.parametrize("layout", ["old", "new", "v5saved", "in_memory_5x"])
def test_all_layouts_of_transformers(data, model, layout):
    layouts = json.loads((data / "hf_key_layouts_paligemma2.json").read_text())
    found = {names.canonical_name(key) for key in layouts[layout]} - set(names.HUGGING_FACE_IGNORED)
    assert found == {spec.name for spec in names.tensor_specs("hf", model.config)}


def test_names_and_shapes_of_keras_hub(data, model):
    golden = json.loads((data / "keras_hub_h5_layout_paligemma2.json").read_text())
    specs = names.tensor_specs("keras-hub", model.config)
    assert {spec.name: list(spec.source_shape) for spec in specs} == golden


@pytest.mark.parametrize("format", FORMATS)
def test_layouts_invert(model, format):
    rng = np.random.default_rng(0)
    for spec in names.tensor_specs(format, model.config):
        array = rng.normal(size=spec.source_shape)
        np.testing.assert_array_equal(spec.to_source(spec.to_ours(array)), array)


def test_all_formats_hold_the_same_weights(data):
    def weights(path, **changes):
        model = PaliGemma2.from_preset(data / path, dtype="float32", **changes)
        return {k: ops.convert_to_numpy(v) for k, v in model.variables_by_path().items()}

    for version, changes in ((1, {}), (2, {"query_pre_attn_scalar": 10})):
        expected = weights(f"hf_tiny_paligemma{version}")
        for path in (f"keras_hub_tiny_paligemma{version}", f"bv_tiny_paligemma{version}.npz"):
            for name, value in weights(path, **(changes if "npz" in path else {})).items():
                np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.fixture
def folder(data, tmp_path):
    """A copy of a Hugging Face checkpoint to damage."""
    return shutil.copytree(data / "hf_tiny_paligemma2", tmp_path / "checkpoint")


def _tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def _shard(folder, count=3):
    tensors = sorted(_tensors(folder).items())
    weight_map = {}
    for i in range(count):
        shard = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = dict(tensors[i::count])
        safetensors.numpy.save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(folder, model, inputs):
    _shard(folder)
    sharded = PaliGemma2.from_preset(folder, dtype="float32")
    np.testing.assert_array_equal(
        ops.convert_to_numpy(sharded(inputs)), ops.convert_to_numpy(model(inputs))
    )


def test_missing_shard(folder):
    _shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        PaliGemma2.from_preset(folder)


def test_missing_and_unknown_tensors_are_all_named(folder):
    tensors = _tensors(folder)
    norm = tensors.pop("language_model.model.norm.weight")
    tensors["language_model.model.nrom.weight"] = norm
    bias = "multi_modal_projector.linear.bias"
    tensors[bias] = np.append(tensors[bias], tensors[bias])
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit its config") as caught:
        PaliGemma2.from_preset(folder)
    message = str(caught.value)
    assert "Missing tensors (1): language_model.model.norm.weight" in message
    assert "Unknown tensors (1): language_model.model.nrom.weight" in message
    assert f"Wrong tensors (1): {bias}: expected (40,), found (80,)" in message


@pytest.mark.parametrize("is_tied", [True, False])
def test_stored_heads_are_ignored(folder, model, inputs, is_tied, caplog):
    tensors = _tensors(folder)
    head = tensors["language_model.model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"] = head if is_tied else -head
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    loaded = PaliGemma2.from_preset(folder, dtype="float32")
    assert ("differs from the embedding" in caplog.text) != is_tied
    np.testing.assert_array_equal(
        ops.convert_to_numpy(loaded(inputs)), ops.convert_to_numpy(model(inputs))
    )


def test_tensors_that_are_no_floats(folder):
    tensors = {name: tensor.astype("int8") for name, tensor in _tensors(folder).items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"must be one of.*Received: I8"):
        PaliGemma2.from_preset(folder)


def test_damaged_files(folder, data, tmp_path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors' is damaged"):
        PaliGemma2.from_preset(folder)
    path = tmp_path / "cut.npz"
    path.write_bytes((data / "bv_tiny_paligemma2.npz").read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"cut\.npz' is damaged"):
        PaliGemma2.from_preset(path)


def test_pickled_objects_are_refused(tmp_path):
    path = tmp_path / "evil.npz"
    np.savez(path, **{"params/img/head/bias": np.array([{}], dtype=object)})
    with pytest.raises(ValueError, match="Python object"):
        PaliGemma2.from_preset(path)


def test_compressed_npz(data, tmp_path):
    with np.load(data / "bv_tiny_paligemma2.npz") as archive:
        np.savez_compressed(tmp_path / "small.npz", **archive)
    plain = io.read_npz(data / "bv_tiny_paligemma2.npz")
    compressed = io.read_npz(tmp_path / "small.npz")
    assert set(compressed) == set(plain)
    for name, tensor in plain.items():
        np.testing.assert_array_equal(compressed[name].read(), tensor.read())


def test_what_is_no_checkpoint(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="`preset` must be an official name"):
        PaliGemma2.from_preset(tmp_path / "nowhere")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"no PaliGemma model.*'llama'"):
        PaliGemma2.from_preset(folder)
    (folder / "config.json").write_text('{"model_type": "paligemma"}')
    with pytest.raises(ValueError, match="lacks the field 'vision_config'"):
        PaliGemma2.from_preset(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must be a JSON object"):
        PaliGemma2.from_preset(folder)
    text = '{"model_type": "paligemma", "vision_config": null, "text_config": {}}'
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json' "):
        PaliGemma2.from_preset(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        PaliGemma2.from_preset(folder)


@pytest.mark.parametrize(
    ("path", "variant"),
    [
        ("hf_tiny_paligemma2", {"use_post_norms": True, "query_pre_attn_scalar": 10}),
        ("hf_tiny_paligemma2_layout_v5saved", {"query_pre_attn_scalar": 10}),
        ("hf_tiny_paligemma1", {"use_post_norms": False, "attn_logit_softcap": None}),
        ("keras_hub_tiny_paligemma2", {"query_pre_attn_scalar": 12, "mlp_dim": 56}),
        ("keras_hub_tiny_paligemma2_qscale", {"query_pre_attn_scalar": 10}),
        ("bv_tiny_paligemma2.npz", {"query_pre_attn_scalar": 12, "final_logit_softcap": 30.0}),
    ],
)
def test_configs(data, path, variant):
    config = presets.find_checkpoint(data / path).config
    for field, value in variant.items():
        assert getattr(config.text, field) == value
    assert config.vision.image_size == 42
    # transformers and keras_hub write a window of 4,096, which the models were trained without.
    assert config.text.sliding_window is None
    assert config.text.vocab_size == 1664


def test_known_query_scales(monkeypatch):
    """A `.npz` of the 28B model is known by its width: no shape tells its query scale."""
    config = PaliGemmaConfig.from_variant("paligemma2-28b", 448)
    stacked = {}
    for spec in names.tensor_specs("big-vision", config):
        leading = tuple(i + 1 for i in spec.index)
        shape = (*leading, *spec.source_shape)
        stacked[spec.name] = max(stacked.get(spec.name, shape), shape)
    assert presets._big_vision_config(stacked, "28b.npz") == config


def test_auto_dtype(data):
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2")
    assert model.dtype_policy.name == _backend.fastest_dtype()


def test_tokenizer_json_replaces_tokenizer_model(folder, model, image):
    expected = model.generate(image, "caption en", max_new_tokens=8)
    (folder / "tokenizer.json").rename(folder / "aside.json")
    assert presets.find_checkpoint(folder).tokenizer == str(folder / "tokenizer.model")
    (folder / "aside.json").rename(folder / "tokenizer.json")
    assert presets.find_checkpoint(folder).tokenizer == str(folder / "tokenizer.model")
    (folder / "tokenizer.model").unlink()
    loaded = PaliGemma2.from_preset(folder, dtype="float32")
    assert loaded.generate(image, "caption en", max_new_tokens=8) == expected
    (folder / "tokenizer.json").unlink()
    assert presets.find_checkpoint(folder).tokenizer is None
