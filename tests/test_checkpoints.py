import collections
import dataclasses
import errno
import json
import os
import resource
import shutil
import zipfile

import h5py
import keras
import numpy as np
import pytest
import safetensors.numpy
from keras import ops

import keras_pg2
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
    found = {names.canonical_name(key) for key in layouts[layout]} - set(names.HUGGING_FACE_HEADS)
    assert found == {spec.name for spec in names.tensor_specs("hf", model.config)}


# Widths, depths, heads and sizes of the published models, once more and in other words.
PUBLISHED = {  # variant: (D, L, N, K, H, F)
    "paligemma-3b": (2048, 18, 8, 1, 256, 16384),
    "paligemma2-3b": (2304, 26, 8, 4, 256, 9216),
    "paligemma2-10b": (3584, 42, 16, 8, 256, 14336),
    "paligemma2-28b": (4608, 46, 32, 16, 128, 36864),
}


@pytest.mark.parametrize("image_size", [224, 448, 896])
@pytest.mark.parametrize("variant", sorted(PUBLISHED))
def test_published_names_and_shapes(variant, image_size):
    d, depth, n, k, h, f = PUBLISHED[variant]
    is_gemma2 = variant.startswith("paligemma2")
    p, w, m, v = (image_size // 14) ** 2, 1152, 4304, 257_152
    vision, text = "vision_tower.vision_model.", "language_model.model."
    hugging_face = {
        f"{vision}embeddings.patch_embedding.weight": (w, 3, 14, 14),
        f"{vision}embeddings.patch_embedding.bias": (w,),
        f"{vision}embeddings.position_embedding.weight": (p, w),
        f"{vision}post_layernorm.weight": (w,),
        f"{vision}post_layernorm.bias": (w,),
        "multi_modal_projector.linear.weight": (d, w),
        "multi_modal_projector.linear.bias": (d,),
        f"{text}embed_tokens.weight": (v, d),
        f"{text}norm.weight": (d,),
    }
    for i in range(27):
        layer = f"{vision}encoder.layers.{i}."
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            hugging_face |= {f"{layer}{name}.weight": (w, w), f"{layer}{name}.bias": (w,)}
        hugging_face |= {
            f"{layer}self_attn.out_proj.weight": (w, w),
            f"{layer}self_attn.out_proj.bias": (w,),
            f"{layer}mlp.fc1.weight": (m, w),
            f"{layer}mlp.fc1.bias": (m,),
            f"{layer}mlp.fc2.weight": (w, m),
            f"{layer}mlp.fc2.bias": (w,),
        }
        for name in ("layer_norm1", "layer_norm2"):
            hugging_face |= {f"{layer}{name}.weight": (w,), f"{layer}{name}.bias": (w,)}
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if is_gemma2 else []
    for i in range(depth):
        layer = f"{text}layers.{i}."
        hugging_face |= {f"{layer}{name}.weight": (d,) for name in norms}
        hugging_face |= {
            f"{layer}self_attn.q_proj.weight": (n * h, d),
            f"{layer}self_attn.k_proj.weight": (k * h, d),
            f"{layer}self_attn.v_proj.weight": (k * h, d),
            f"{layer}self_attn.o_proj.weight": (d, n * h),
            f"{layer}mlp.gate_proj.weight": (f, d),
            f"{layer}mlp.up_proj.weight": (f, d),
            f"{layer}mlp.down_proj.weight": (d, f),
        }
    image, block = "params/img/", "params/img/Transformer/encoderblock/"
    llm, attention = "params/llm/", "params/llm/layers/attn/"
    big_vision = {
        f"{image}embedding/kernel": (14, 14, 3, w),
        f"{image}embedding/bias": (w,),
        f"{image}pos_embedding": (1, p, w),
        f"{image}Transformer/encoder_norm/scale": (w,),
        f"{image}Transformer/encoder_norm/bias": (w,),
        f"{image}head/kernel": (w, d),
        f"{image}head/bias": (d,),
        f"{block}MlpBlock_0/Dense_0/kernel": (27, w, m),
        f"{block}MlpBlock_0/Dense_0/bias": (27, m),
        f"{block}MlpBlock_0/Dense_1/kernel": (27, m, w),
        f"{block}MlpBlock_0/Dense_1/bias": (27, w),
        f"{block}MultiHeadDotProductAttention_0/out/kernel": (27, 16, 72, w),
        f"{block}MultiHeadDotProductAttention_0/out/bias": (27, w),
        f"{llm}embedder/input_embedding": (v, d),
        f"{llm}final_norm/scale": (d,),
        f"{attention}q_einsum/w": (depth, n, d, h),
        f"{attention}kv_einsum/w": (depth, 2, k, d, h),
        f"{attention}attn_vec_einsum/w": (depth, n, h, d),
        f"{llm}layers/mlp/gating_einsum": (depth, 2, d, f),
        f"{llm}layers/mlp/linear": (depth, f, d),
    }
    for name in ("query", "key", "value"):
        big_vision |= {
            f"{block}MultiHeadDotProductAttention_0/{name}/kernel": (27, w, 16, 72),
            f"{block}MultiHeadDotProductAttention_0/{name}/bias": (27, 16, 72),
        }
    for name in ("LayerNorm_0", "LayerNorm_1"):
        big_vision |= {f"{block}{name}/scale": (27, w), f"{block}{name}/bias": (27, w)}
    norms = ["pre_attention_norm", "pre_ffw_norm"]
    norms += ["post_attention_norm", "post_ffw_norm"] if is_gemma2 else []
    big_vision |= {f"{llm}layers/{name}/scale": (depth, d) for name in norms}

    config = PaliGemmaConfig.from_variant(variant, image_size)
    assert {s.name: s.source_shape for s in names.tensor_specs("hf", config)} == hugging_face
    groups = {}
    for spec in names.tensor_specs("big-vision", config):
        groups.setdefault(spec.name, []).append(spec)
    assert {name: names.stacked_shape(group) for name, group in groups.items()} == big_vision
    # keras_hub's names are those of the golden, one set per block.
    hub = names.tensor_specs("keras-hub", config)
    assert len({spec.name for spec in hub}) == len(hugging_face)


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


def test_a_whole_file_comes_before_an_index(folder, model, inputs):
    """As in transformers."""
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    read = PaliGemma2.from_preset(folder, dtype="float32")
    np.testing.assert_array_equal(
        ops.convert_to_numpy(read(inputs)), ops.convert_to_numpy(model(inputs))
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


@pytest.mark.parametrize(
    ("tower", "field", "value", "message"),
    [
        ("text_config", "num_hidden_layers", 3, r"Unknown tensors \(11\): .*layers\.3\."),
        ("text_config", "num_hidden_layers", 5, r"Missing tensors \(11\): .*layers\.4\."),
        ("text_config", "intermediate_size", 64, r"gate_proj\.weight: expected \(64, 40\), found"),
        ("vision_config", "image_size", 56, r"position_embedding\.weight: expected \(16, "),
    ],
)
def test_config_contradicts_the_tensors(folder, tower, field, value, message):
    config = json.loads((folder / "config.json").read_text())
    assert config[tower][field] != value
    config[tower][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        PaliGemma2.from_preset(folder)


def test_tokenizer_of_another_model(data):
    with pytest.raises(ValueError, match="has 1664 tokens, but the model only 1000"):
        PaliGemma2(
            PaliGemmaConfig.from_dict(
                presets.find_checkpoint(data / "hf_tiny_paligemma2").config.to_dict()
            ).replace(vocab_size=1000),
            keras_pg2.Preprocessor(
                keras_pg2.Tokenizer.from_file(data / "tok" / "tokenizer.model"), 42
            ),
        )


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_the_tied_matrix_may_have_the_name_of_the_head(folder, model, inputs, name, caplog):
    tensors = _tensors(folder)
    tensors[name] = tensors.pop("language_model.model.embed_tokens.weight")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    loaded = PaliGemma2.from_preset(folder, dtype="float32")
    assert not caplog.records
    np.testing.assert_array_equal(
        ops.convert_to_numpy(loaded(inputs)), ops.convert_to_numpy(model(inputs))
    )


def test_what_no_answer_needs_is_left_out(folder):
    tensors = _tensors(folder)
    tensors["vision_tower.vision_model.head.probe"] = np.zeros((1, 1, 8), "float32")
    tensors["vision_tower.head.probe"] = np.zeros((1, 1, 8), "float32")
    positions = np.arange(9, dtype="int64")[None]
    tensors["vision_tower.vision_model.embeddings.position_ids"] = positions
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, "float32")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    PaliGemma2.from_preset(folder)
    tensors["language_model.model.layers.0.self_attn.rotary_emb.scale"] = np.zeros(4, "float32")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"Unknown tensors \(1\): .*rotary_emb\.scale"):
        PaliGemma2.from_preset(folder)


def test_rows_of_added_tokens_are_told_of(folder, caplog):
    tensors = _tensors(folder)
    name = "language_model.model.embed_tokens.weight"
    tensors[name] = np.pad(tensors[name], ((0, 3), (0, 0)))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    PaliGemma2.from_preset(folder)
    assert "has 3 more rows than PaliGemma's" in caplog.text


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


def _changed(path, at, content):
    """A copy of a file with other bytes at a place."""
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    copy = path.with_name(f"changed-{path.name}")
    copy.write_bytes(data)
    return str(copy)


def test_damage_inside_of_files(tmp_path):
    """What the libraries raise then is of many kinds, and names no file."""
    values = np.arange(6, dtype="float32")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["layer/x"] = values
        file.create_dataset("layer/y", data=values, chunks=(6,), compression="gzip")
    content = (tmp_path / "a.h5").read_bytes()
    path = _changed(tmp_path / "a.h5", content.find(b"HEAP") + 16, b"\xff" * 8)
    with pytest.raises(ValueError, match=r"changed-a\.h5' is damaged or no HDF5 file"):
        io.read_h5(path)
    path = _changed(tmp_path / "a.h5", content.find(b"\x78\x5e"), b"\x00" * 8)
    with pytest.raises(ValueError, match=r"changed-a\.h5' is damaged: 'layer/y'"):
        io.read_h5(path)["layer/y"].read()
    values = np.random.default_rng(0).normal(size=20_000)
    np.savez_compressed(tmp_path / "a.npz", x=values)
    content = (tmp_path / "a.npz").read_bytes()
    path = _changed(tmp_path / "a.npz", content.rfind(b"PK\x01\x02") + 10, b"\x63")
    with pytest.raises(ValueError, match=r"changed-a\.npz' is damaged or no checkpoint"):
        io.read_npz(path)
    path = _changed(tmp_path / "a.npz", len(content) - 1000, b"\xff" * 4)
    with pytest.raises(ValueError, match=r"changed-a\.npz' is damaged: 'x'"):
        io.read_npz(path)["x"].read()


def test_pickled_objects_are_refused(tmp_path):
    path = tmp_path / "evil.npz"
    np.savez(path, **{"params/img/head/bias": np.array([{}], dtype=object)})
    with pytest.raises(ValueError, match="Python object"):
        PaliGemma2.from_preset(path)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", 7])
def test_an_index_must_not_lead_out_of_its_folder(folder, shard):
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    index = {"weight_map": {"a": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must name files of its own folder"):
        PaliGemma2.from_preset(folder)


def test_names_in_an_npz_are_no_paths(data, tmp_path):
    path = tmp_path / "evil.npz"
    shutil.copy(data / "bv_tiny_paligemma2.npz", path)
    with zipfile.ZipFile(path, "a") as archive, archive.open("../../evil.npy", "w") as member:
        np.lib.format.write_array(member, np.zeros(3, "float32"))
    with pytest.raises(ValueError, match=r"Unknown tensors \(1\): \.\./\.\./evil"):
        PaliGemma2.from_preset(path)
    assert [item.name for item in tmp_path.iterdir()] == ["evil.npz"]


def test_hdf5_must_not_lead_to_other_files(data, tmp_path):
    folder = shutil.copytree(data / "keras_hub_tiny_paligemma2", tmp_path / "hub")
    name = "layers/rms_normalization/vars/0"
    with h5py.File(folder / "model.weights.h5", "a") as file:
        shape = file[name].shape
        del file[name]
        file.create_dataset(name, shape, "float32", external=[("/etc/passwd", 0, 160)])
    with pytest.raises(ValueError, match="lie in other files"):
        PaliGemma2.from_preset(folder)
    with h5py.File(folder / "model.weights.h5", "a") as file:
        del file[name]
        file[name] = h5py.ExternalLink(str(data / "keras_hub_tiny_paligemma2"), name)
    with pytest.raises(ValueError, match=rf"Missing tensors \(1\): {name}"):
        PaliGemma2.from_preset(folder)


@pytest.mark.parametrize("form", ["compressed", "in Fortran order", "without params/"])
def test_other_forms_of_npz(data, tmp_path, monkeypatch, form):
    with np.load(data / "bv_tiny_paligemma2.npz") as archive:
        tensors = dict(archive)
    if form == "in Fortran order":
        tensors = {name: np.asfortranarray(array) for name, array in tensors.items()}
    if form == "without params/":  # as big_vision's notebook for fine-tuning writes
        tensors = {name.removeprefix("params/"): array for name, array in tensors.items()}
    save = np.savez_compressed if form == "compressed" else np.savez
    save(tmp_path / "other.npz", **tensors)
    reads, read = collections.Counter(), io._read_npz
    monkeypatch.setattr(io, "_read_npz", lambda *args: reads.update([args[1]]) or read(*args))
    expected = presets.find_checkpoint(data / "bv_tiny_paligemma2.npz").weights()
    weights = presets.find_checkpoint(tmp_path / "other.npz").weights()
    for path, tensor in expected.items():
        np.testing.assert_array_equal(weights[path].read(), tensor.read())
    if form == "compressed":  # a tensor of several layers is read once
        assert reads == dict.fromkeys(tensors, 1)


def test_what_is_no_checkpoint(folder, tmp_path):
    for name in (tmp_path / "nowhere", "hf", "kaggle"):
        with pytest.raises(FileNotFoundError, match="`preset` must be an official name"):
            PaliGemma2.from_preset(name)
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
    with pytest.raises(FileNotFoundError, match=r"`keras\.models\.load_model` reads"):
        PaliGemma2.from_preset("model.keras")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"`model\.load_adapter` reads"):
        PaliGemma2.from_preset(tmp_path)


def test_a_keras_hub_config_without_heads(data, tmp_path):
    folder = shutil.copytree(data / "keras_hub_tiny_paligemma2", tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text())
    config["config"]["num_query_heads"] = 0
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json' is not as expected"):
        PaliGemma2.from_preset(folder)


def test_unknown_fields_of_a_preset(model, tmp_path):
    model.save_to_preset(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["preprocessing"]["crop"] = True
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unknown fields: \['crop'\]"):
        PaliGemma2.from_preset(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "keys", "value", "message"),
    [
        ("preset", ["version"], 2, "it has version 2, and this release reads up to 1"),
        ("preset", ["preprocessing"], ["sequence_length"], "`preprocessing` must be an object"),
        ("preset", ["preprocessing", "interpolation"], "x", "`interpolation` must be one of"),
        ("preset", ["config", "text", "num_heads"], 3, "`num_heads` must be a multiple of"),
        ("hf", ["text_config", "rope_theta"], "x", "could not convert string to float: 'x'"),
    ],
)
def test_the_file_of_a_wrong_value_is_named(data, model, tmp_path, name, keys, value, message):
    if name == "hf":
        shutil.copytree(data / "hf_tiny_paligemma2", tmp_path / name)
    else:
        model.save_to_preset(tmp_path / name)
    path = tmp_path / name / "config.json"
    config = place = json.loads(path.read_text())
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        PaliGemma2.from_preset(path.parent)
    assert str(path.parent) in str(caught.value)


def test_a_preset_that_has_lost_its_tokenizer(model, tmp_path):
    folder = tmp_path / "out"
    model.save_to_preset(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the file .*out.tokenizer\.model'"):
        PaliGemma2.from_preset(folder)
    tokenizer = model.preprocessor.tokenizer
    read = PaliGemma2.from_preset(folder, tokenizer=tokenizer)
    assert read.preprocessor.get_config() == model.preprocessor.get_config()
    PaliGemma2(model.config).save_to_preset(folder, overwrite=True)  # never had one
    assert PaliGemma2.from_preset(folder).preprocessor is None


def test_a_npz_of_other_axes(data, tmp_path):
    with np.load(data / "bv_tiny_paligemma2.npz") as archive:
        tensors = dict(archive)
    tensors["params/img/pos_embedding"] = np.zeros(9, "float32")
    np.savez(tmp_path / "flat.npz", **tensors)
    with pytest.raises(ValueError, match=r"flat\.npz' is no big_vision PaliGemma"):
        PaliGemma2.from_preset(tmp_path / "flat.npz")


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


def test_what_configs_of_transformers_leave_out(folder, data):
    """Releases 4.47 to 4.49 left the number of heads of the 3B out, which is their default."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    text = {"model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 26}
    text |= {"intermediate_size": 9216, "num_key_value_heads": 4}
    path.write_text(json.dumps({**values, "text_config": text, "image_token_index": 257_152}))
    expected = PaliGemmaConfig.from_variant("paligemma2-3b").text
    assert presets.find_checkpoint(folder).config.text == expected
    text |= {"sliding_window": 64}
    for layer_types, window in [
        (["sliding_attention", "full_attention"] * 13, 64),
        (["full_attention"] * 26, None),
        (None, 64),
    ]:
        values |= {"text_config": {**text, "layer_types": layer_types}}
        path.write_text(json.dumps(values))
        assert presets.find_checkpoint(folder).config.text.sliding_window == window
    values["text_config"]["layer_types"] = ["full_attention", "sliding_attention"] * 13
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"window is that of the first block .*layer_types="):
        presets.find_checkpoint(folder)


@pytest.mark.parametrize("path", ["keras_hub_tiny_paligemma2", "keras_hub_tiny_paligemma2_qscale"])
def test_types_that_transformers_checks(data, tmp_path, path):
    """keras_hub's configs have soft caps as integers, and we a query scale of 10.0 of one."""
    config = presets.find_checkpoint(data / path).config
    values = presets._hugging_face_json(config, "float32")
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert presets.find_checkpoint(tmp_path).config == config
    text, vision = values["text_config"], values["vision_config"]
    assert type(text["query_pre_attn_scalar"]) is int
    for value in (
        *(text["attn_logit_softcapping"], text["final_logit_softcapping"], text["rope_theta"]),
        *(text["rms_norm_eps"], vision["layer_norm_eps"]),
    ):
        assert type(value) is float


@pytest.mark.parametrize(
    ("dtype", "message"),
    [("int8", "pass `quantize='int8'`"), ("int32", "`dtype` must be a policy of floats")],
)
def test_dtypes_that_are_no_floats(folder, dtype, message):
    with pytest.raises(ValueError, match=message):
        PaliGemma2.from_preset(folder, dtype=dtype)


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


@pytest.mark.slow_if_compiled
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


# Writing


def _read(tensors):
    return {name: tensor.read() for name, tensor in tensors.items()}


def _assert_equal(actual, expected):
    assert set(actual) == set(expected)
    for name, array in actual.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("version", [1, 2])
def test_round_trips_are_equal_bit_for_bit(data, tmp_path, version):
    """Their file, our model, their file."""
    changes = {"query_pre_attn_scalar": 10} if version == 2 else {}

    folder = data / f"hf_tiny_paligemma{version}"
    PaliGemma2.from_preset(folder, dtype="float32").save_hf(tmp_path / "hf")
    ours, theirs = _read(io.read_safetensors(tmp_path / "hf")), _read(io.read_safetensors(folder))
    embedding = names.HUGGING_FACE_EMBEDDING
    assert ours[embedding].shape == theirs[embedding].shape
    assert not ours[embedding][1664:].any()  # rows that no text has; theirs are random
    theirs[embedding][1664:] = 0
    _assert_equal(ours, theirs)

    folder = data / f"keras_hub_tiny_paligemma{version}"
    PaliGemma2.from_preset(folder, dtype="float32").save_keras_hub(tmp_path / "hub")
    ours, theirs = (path / "model.weights.h5" for path in (tmp_path / "hub", folder))
    _assert_equal(_read(io.read_h5(ours)), _read(io.read_h5(theirs)))

    path = data / f"bv_tiny_paligemma{version}.npz"
    model = PaliGemma2.from_preset(path, dtype="float32", **changes)
    model.save_big_vision(tmp_path / "bv.npz")
    _assert_equal(_read(io.read_npz(tmp_path / "bv.npz")), _read(io.read_npz(path)))

    model.save_to_preset(tmp_path / "preset")
    loaded = PaliGemma2.from_preset(tmp_path / "preset", dtype="float32")
    assert loaded.config == model.config
    _assert_equal(_read(loaded.weights_by_path()), _read(model.weights_by_path()))


def test_bfloat16_npz_round_trip(data, tmp_path):
    path = data / "bv_tiny_paligemma2.bf16.npz"
    model = PaliGemma2.from_preset(path, dtype="bfloat16")
    model.save_big_vision(tmp_path / "bv.npz")
    _assert_equal(_read(io.read_npz(tmp_path / "bv.npz")), _read(io.read_npz(path)))
    with np.load(tmp_path / "bv.npz") as archive:
        assert archive["params/img/head/bias"].dtype.str == "|V2"  # as big_vision releases it


def test_a_preset_in_another_dtype(model, tmp_path):
    model.save_to_preset(tmp_path / "half", dtype="bfloat16")
    read = presets.find_checkpoint(tmp_path / "half").weights()
    expected = model.weights_by_path()
    assert {tensor.dtype for tensor in read.values()} == {"bfloat16"}
    _assert_equal(_read(read), {k: v.read().astype("bfloat16") for k, v in expected.items()})


def test_shards_of_a_keras_hub_checkpoint(data, tmp_path):
    """keras_hub writes shards of 10 GB."""
    keras_hub = pytest.importorskip("keras_hub")
    folder = data / "keras_hub_tiny_paligemma2"
    backbone = keras_hub.models.PaliGemmaBackbone.from_preset(str(folder))
    backbone.save_to_preset(str(tmp_path), max_shard_size=0.0005)
    shards = sorted(tmp_path.glob("*.h5"))
    assert len(shards) == 2
    loaded = _read(presets.find_checkpoint(tmp_path).weights())
    _assert_equal(loaded, _read(presets.find_checkpoint(folder).weights()))
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"model_00001\.weights\.h5'\.$"):
        PaliGemma2.from_preset(tmp_path)
    (tmp_path / "model.weights.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.weights\.h5', and 'model\.weights\.json'"):
        PaliGemma2.from_preset(tmp_path)


def test_keras_hub_loads_what_we_write(data, tmp_path):
    keras_hub = pytest.importorskip("keras_hub")
    folder = data / "keras_hub_tiny_paligemma2"
    golden = np.load(folder / "expected.npz")
    PaliGemma2.from_preset(folder, dtype="float32").save_keras_hub(tmp_path / "hub")
    loaded = keras_hub.models.PaliGemmaCausalLM.from_preset(str(tmp_path / "hub"), dtype="float32")
    token_ids = golden["train_0_token_ids"][None]
    logits = loaded(
        {
            "images": golden["images"][:1],
            "token_ids": token_ids,
            "padding_mask": np.ones_like(token_ids),
            "response_mask": golden["train_0_response_mask"][None],
        }
    )
    expected = golden["train_0_logits_from_last_prefix"]
    error = np.abs(ops.convert_to_numpy(logits)[0, -len(expected) :] - expected).max()
    assert error < 2e-5 * np.abs(expected).max()
    images = np.zeros((1, 50, 60, 3), "uint8")
    x = loaded.preprocessor.generate_preprocess({"images": images, "prompts": ["caption en\n"]})
    assert ops.convert_to_numpy(x["token_ids"])[0, :6].tolist() == [2, 439, 366, 407, 381, 5]


def test_files_for_transformers(model, tmp_path):
    """Checked by hand with transformers 5.23: equal logits, and its processor gives our tokens."""
    model.save_hf(tmp_path / "hf", dtype="bfloat16")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["image_token_index"] == 1664
    assert config["text_config"]["vocab_size"] == 1728
    assert config["torch_dtype"] == "bfloat16"
    names_written = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names_written == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert PaliGemma2.from_preset(tmp_path / "hf").config == model.config
    # As a mask transformers would add what the tiny preset's vocabulary lacks, before <image>.
    options = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert options["mask_token"] is None
    # `AutoTokenizer` knows no tokens but these, and spells others: checked with 5.23 as well.
    tokenizer = model.preprocessor.tokenizer
    added = {int(id): token["content"] for id, token in options["added_tokens_decoder"].items()}
    assert len(added) == 1024 + 128
    for id, text in added.items():
        assert tokenizer.encode(text) == [id]


def test_shards_are_written_above_a_size(model, tmp_path):
    tensors = io.to_source(model.weights_by_path(), "hf", model.config)
    written = []
    io.write_safetensors(tmp_path, tensors, written.append, max_shard_bytes=200_000)
    assert sum(written) == sum(tensor.num_bytes for tensor in tensors.values())
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 2
    _assert_equal(_read(io.read_safetensors(tmp_path)), _read(tensors))
    library = {}
    for shard in shards:
        library |= safetensors.numpy.load_file(tmp_path / shard)
    _assert_equal(library, _read(tensors))


def test_nothing_is_overwritten(model, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        model.save_to_preset(tmp_path / "out")
    model.save_to_preset(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("")
    with pytest.raises(FileExistsError, match="other things than a checkpoint"):
        model.save_to_preset(tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").exists()
    with pytest.raises(FileExistsError, match="is a file, where a folder is to be"):
        model.save_to_preset(tmp_path / "home" / "thesis.txt", overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == ""


def test_no_file_takes_the_place_of_a_checkpoint(model, tmp_path):
    model.save_to_preset(tmp_path / "model.npz")
    before = sorted(path.name for path in (tmp_path / "model.npz").iterdir())
    with pytest.raises(FileExistsError, match="is a folder, where a file is to be"):
        model.save_big_vision(tmp_path / "model.npz", overwrite=True)
    example = {"image": np.zeros((2, 2, 3), "uint8"), "prefix": "p", "suffix": "s"}
    with pytest.raises(FileExistsError, match="is a folder, where a file is to be"):
        keras_pg2.data.write_jsonl(tmp_path / "model.npz", [example], overwrite=True)
    assert sorted(path.name for path in (tmp_path / "model.npz").iterdir()) == before


@pytest.mark.parametrize("format", ["preset", "hf"])
def test_a_codec_that_a_format_does_not_hold(folder, tmp_path, caplog, format):
    model = PaliGemma2.from_preset(folder, dtype="float32")
    model.use_codec(keras_pg2.SegmentationCodec((8, 8, 8, 8), 0, 8))
    model._save(tmp_path / "out", format)
    assert (tmp_path / "out" / presets.CODEC_FILE).exists() == (format == "preset")
    assert ("'hf' holds no `<seg>` codec" in caplog.text) == (format == "hf")


@pytest.mark.parametrize("format", ["preset", "hf", "keras-hub"])
def test_other_things_in_a_checkpoint_are_not_lost(model, tmp_path, format):
    def save():
        model._save(tmp_path / "out", format, overwrite=True)

    save()
    save()
    (tmp_path / "out" / "adapter_model.safetensors").write_text("hours")
    with pytest.raises(
        FileExistsError, match=r"would be lost: adapter_model\.safetensors\. Choose"
    ):
        save()
    assert (tmp_path / "out" / "adapter_model.safetensors").read_text() == "hours"


def test_a_link_and_the_home_folder(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model.save_to_preset("~/old")
    old = (tmp_path / "old" / "config.json").stat().st_ino
    (tmp_path / "link").symlink_to("old")
    model.save_to_preset("~/link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "old" / "config.json").stat().st_ino != old
    assert presets.find_checkpoint("~/link").config == model.config


@pytest.mark.parametrize("format", FORMATS)
def test_weights_are_stored_as_floats(model, tmp_path, format):
    with pytest.raises(ValueError, match=r"`dtype` must be 'float32'.*Received: dtype='int8'"):
        model._save(tmp_path / "out.npz", format, "int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["folder", "file.npz"])
def test_an_interrupt_while_names_change_loses_nothing(model, tmp_path, name, monkeypatch):
    def save(**options):
        format = "preset" if name == "folder" else "big-vision"
        model._save(tmp_path / name, format, **options)

    save()
    before = presets.find_checkpoint(tmp_path / name).config

    def interrupted(source, destination):
        raise KeyboardInterrupt

    monkeypatch.setattr(io.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert presets.find_checkpoint(tmp_path / name).config == before


def test_big_vision_files_have_their_ending(model, tmp_path):
    with pytest.raises(ValueError, match=r"name ends in \.npz"):
        model.save_big_vision(tmp_path / "out")


@pytest.mark.parametrize("format", ["preset", *FORMATS])
def test_a_full_disk_leaves_everything_as_it_was(model, tmp_path, format, monkeypatch):
    path = tmp_path / "out.npz"
    weights = model.weights_by_path()
    presets.save_checkpoint(path, format, model.config, weights, model.preprocessor)

    def files():
        return {item: item.stat().st_mtime_ns for item in tmp_path.rglob("*") if item.is_file()}

    before = files()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 4, 5))
        with pytest.raises(OSError, match=r"[1-9]\d* MB are needed, 0 are free"):
            presets.save_checkpoint(path, format, model.config, weights, overwrite=True)
    assert files() == before
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # bytes of one file
        with pytest.raises(OSError, match="File too large"):
            presets.save_checkpoint(
                path, format, model.config, weights, model.preprocessor, overwrite=True
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files() == before
    assert presets.find_checkpoint(path).format == format


def test_configs_that_others_cannot_express(data, tmp_path):
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma1", final_logit_softcap=30.0)
    with pytest.raises(ValueError, match="no soft caps for Gemma 1"):
        model.save_hf(tmp_path / "hf")
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma1", sliding_window=3)
    with pytest.raises(ValueError, match="and no sliding window"):
        model.save_hf(tmp_path / "hf")
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", query_pre_attn_scalar=7)
    with pytest.raises(ValueError, match=r"keras_hub scales queries.*=7"):
        model.save_keras_hub(tmp_path / "hub")
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2")
    vision = dataclasses.replace(model.config.vision, norm_eps=1e-5)
    model = PaliGemma2(dataclasses.replace(model.config, vision=vision))
    with pytest.raises(ValueError, match=r"norm_eps=1e-6\. Received: 1e-05 in the vision tower"):
        model.save_keras_hub(tmp_path / "hub")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["hf", "keras-hub"])
def test_a_sliding_window_is_kept(data, tmp_path, format):
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", sliding_window=3)
    model._save(tmp_path / "out", format)
    assert presets.find_checkpoint(tmp_path / "out").config == model.config


def test_fields_that_a_npz_does_not_hold_are_told(data, tmp_path, caplog):
    changes = {
        "query_pre_attn_scalar": 10,
        "attn_logit_softcap": 40.0,
        "final_logit_softcap": None,
        "sliding_window": 3,
        "max_positions": 64,
        "rope_base": 500.0,
        "dropout": 0.1,
    }
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32", **changes)
    path = tmp_path / "out.npz"
    model.save_big_vision(path)
    told = ", ".join(f"{field}={value!r}" for field, value in changes.items())
    assert f"`from_preset(..., {told})`" in caplog.text
    read = PaliGemma2.from_preset(path, dtype="float32", **changes)
    assert read.config == model.config
    _assert_equal(_read(read.weights_by_path()), _read(model.weights_by_path()))
    caplog.clear()
    PaliGemma2.from_preset(path).save_big_vision(path, overwrite=True)
    assert not caplog.records  # all as it will be read
    vision = dataclasses.replace(model.config.vision, norm_eps=1e-5)
    model = PaliGemma2.from_preset(path, vision=vision)
    with pytest.raises(ValueError, match=r"norm_eps=1e-06 in the vision tower. Received: .*1e-05"):
        model.save_big_vision(tmp_path / "eps.npz")


@pytest.mark.parametrize("format", ["hf", "keras-hub"])
def test_the_window_that_is_not_read_is_told(data, tmp_path, format, caplog):
    model = PaliGemma2.from_preset(data / "keras_hub_tiny_paligemma2", sliding_window=4096)
    model._save(tmp_path / "out", format)
    assert "`from_preset(..., sliding_window=4096)`" in caplog.text
    read = PaliGemma2.from_preset(tmp_path / "out", sliding_window=4096)
    assert read.config == model.config


def test_scaled_positions_are_refused(data, tmp_path):
    folder = shutil.copytree(data / "hf_tiny_paligemma2", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is never scaled"):
        presets.find_checkpoint(folder)


@pytest.mark.parametrize(
    ("folder", "tower", "key", "activation", "is_read"),
    [
        ("hf_tiny_paligemma2", "text", "hidden_activation", "relu", False),
        ("hf_tiny_paligemma2", "text", "hidden_act", "relu", True),  # not looked at in Gemma 2
        ("hf_tiny_paligemma1", "text", "hidden_act", "relu", False),
        ("hf_tiny_paligemma1", "text", "hidden_act", "gelu", True),
        ("hf_tiny_paligemma1", "vision", "hidden_act", "gelu", False),
    ],
)
def test_other_activations_are_refused(data, tmp_path, folder, tower, key, activation, is_read):
    config = json.loads((data / folder / "config.json").read_text())
    config[f"{tower}_config"][key] = activation
    folder = shutil.copytree(data / folder, tmp_path / "hf")
    (folder / "config.json").write_text(json.dumps(config))
    if is_read:
        assert presets.find_checkpoint(folder).config
    else:
        with pytest.raises(ValueError, match=f"'gelu_pytorch_tanh'. Received: '{activation}'"):
            presets.find_checkpoint(folder)


@pytest.mark.parametrize("format", ["preset", "hf", "keras-hub", "big-vision"])
def test_weights_of_several_dtypes_are_kept(data, tmp_path, format):
    policy = keras.dtype_policies.DTypePolicyMap(default_policy="float32")
    policy["paligemma2/text/block_0/.*"] = keras.DTypePolicy("bfloat16")
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype=policy)
    path = tmp_path / "model.npz"
    model._save(path, format)
    read = presets.find_checkpoint(path).weights()
    for name, tensor in model.weights_by_path().items():
        np.testing.assert_array_equal(
            read[name].read().astype("float32"), tensor.read().astype("float32"), err_msg=name
        )
    if format == "hf":  # transformers reads all in one dtype
        assert json.loads((path / "config.json").read_text())["torch_dtype"] == "float32"


def test_arrays_of_another_byte_order(tmp_path):
    np.savez(tmp_path / "big.npz", x=np.ones(3, ">f4"))
    with pytest.raises(ValueError, match="of another byte order"):
        io.read_npz(tmp_path / "big.npz")


def test_virtual_values_of_other_files(tmp_path):
    layout = h5py.VirtualLayout((3,), "float32")
    layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "x", (3,))
    with h5py.File(tmp_path / "model.weights.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
    with pytest.raises(ValueError, match="lie in other files"):
        io.read_h5(tmp_path / "model.weights.h5")


def test_tensors_with_two_names(data, tmp_path):
    folder = shutil.copytree(data / "hf_tiny_paligemma2", tmp_path / "hf")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    name, other = "language_model.model.norm.weight", "model.language_model.norm.weight"
    assert names.canonical_name(other) == name
    safetensors.numpy.save_file({**tensors, other: tensors[name]}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"under two names each: .*norm\.weight"):
        presets.find_checkpoint(folder).weights()


# Changes meanwhile


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_while_a_checkpoint_is_written_is_kept(model, tmp_path, overwrite):
    path = tmp_path / "out"

    def write():
        with io.replace_when_done(path, overwrite) as new:
            os.makedirs(new)
            path.mkdir()
            (path / "log.txt").write_text("mine")

    with pytest.raises(FileExistsError):
        write()
    assert (path / "log.txt").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["hf_tiny_paligemma2", "bv_tiny_paligemma2.npz"])
def test_a_checkpoint_that_changes_while_it_is_read(data, tmp_path, name):
    path = tmp_path / name
    (shutil.copytree if os.path.isdir(data / name) else shutil.copy)(data / name, path)
    weights = presets.find_checkpoint(path).weights()
    file = path / "model.safetensors" if path.is_dir() else path
    shutil.copy(file, tmp_path / "new")
    os.replace(tmp_path / "new", file)
    with pytest.raises(ValueError, match="was changed while it was read"):
        next(iter(weights.values())).read()


def test_places_where_no_checkpoint_can_be_written(model, tmp_path, monkeypatch):
    path = tmp_path / "out"
    model.save_to_preset(path)
    monkeypatch.chdir(path)
    with pytest.raises(FileExistsError, match="is the current folder or holds it"):
        model.save_to_preset(".", overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`upload_adapter` write to hubs"):
        model.save_to_preset("hf://me/mine")
    monkeypatch.setattr(os.path, "ismount", lambda folder: str(folder) == str(path))
    with pytest.raises(FileExistsError, match="is a mount point"):
        model.save_to_preset(path, overwrite=True)
    assert presets.find_checkpoint(path).config == model.config


# Resolution


def test_positions_resample_like_big_vision(data):
    golden = np.load(data / "posemb_resample_bigvision.npz")
    config = PaliGemmaConfig.from_variant("paligemma2-3b").replace(image_size=42)
    source = next(golden[name] for name in golden.files if golden[name].shape[-2] == 9)
    source = source.reshape(9, -1)
    tensor = io.LazyTensor(source.shape, "float32", lambda: source)
    for name in golden.files:
        expected = golden[name].reshape(-1, source.shape[-1])
        side = round(len(expected) ** 0.5)
        weights = io.resize_positions({"vision/position_embedding": tensor}, config, 14 * side)
        actual = weights["vision/position_embedding"]
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual.read(), expected, atol=1e-6)


def test_another_image_size(data, model, image):
    resized = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32", image_size=56)
    assert resized.config.vision.num_tokens == 16
    assert resized.preprocessor.image_size == 56
    assert resized.generate(image, "ocr", max_new_tokens=2)
    same = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32", image_size=42)
    _assert_equal(_read(same.weights_by_path()), _read(model.weights_by_path()))


# Hubs


OFFICIAL = [
    "paligemma2-3b-mix-224",
    "paligemma2-28b-pt-896",
    "paligemma2-10b-ft-docci-448",
    "paligemma-3b-pt-224",
    "paligemma-3b-ft-refcoco-seg-896",
]


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_names(data, monkeypatch, name):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    def download(repository, revision, allow_patterns):
        calls.append((repository, revision))
        assert "*.safetensors" in allow_patterns
        return str(data / "hf_tiny_paligemma2")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert presets.find_checkpoint(name).format == "hf"
    assert presets.find_checkpoint(f"hf://me/{name}@main").format == "hf"
    assert calls == [(f"google/{name}", None), (f"me/{name}", "main")]


@pytest.mark.parametrize("name", ["paligemma2-3b-mix-896", "paligemma2-28b-ft-docci-448", "gemma"])
def test_unofficial_names(name):
    with pytest.raises(FileNotFoundError, match="official name"):
        presets.find_checkpoint(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("google/paligemma2-3b-mix-224", "'hf://google/paligemma2-3b-mix-224'"),
        ("https://huggingface.co/google/paligemma2", "'hf://google/paligemma2'"),
        ("pali_gemma2_mix_3b_224", "'kaggle://keras/paligemma2/keras/pali_gemma2_mix_3b_224'"),
        ("pali_gemma_3b_224", "'kaggle://keras/paligemma/keras/pali_gemma_3b_224'"),
        ("pali_gemma2_mix_28b_224", "'kaggle://keras/paligemma2/keras/pali_gemma2_28b_mix_224'"),
        ("paligemma2-3b-mix-224", "a folder without a config.json"),
        ("../mine", "Received: preset='../mine'"),
    ],
)
def test_names_of_others(tmp_path, monkeypatch, name, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paligemma2-3b-mix-224").mkdir()  # as a download that broke off leaves
    with pytest.raises(FileNotFoundError) as caught:
        presets.find_checkpoint(name)
    assert str(caught.value).endswith(hint)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        ("GatedRepoError", PermissionError, "Accept its licence at https.*hf auth login"),
        ("RepositoryNotFoundError", FileNotFoundError, "no google/paligemma2-3b-pt-224"),
        ("RevisionNotFoundError", FileNotFoundError, "no google/paligemma2-3b-pt-224"),
        ("HfHubHTTPError", ConnectionError, "did not give google/.*Run it again"),
        ("LocalEntryNotFoundError", ConnectionError, "did not give google/.*Run it again"),
        (RuntimeError, ConnectionError, "did not give google/.*Run it again"),  # of its libraries
    ],
)
def test_hugging_face_refuses(monkeypatch, error, expected, message):
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")
    error = getattr(errors, error) if isinstance(error, str) else error

    def download(*args, **kwargs):
        raise error.__new__(error, "no")  # their constructors want a response

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(expected, match=message):
        presets.find_checkpoint("paligemma2-3b-pt-224")


def test_a_full_disk_is_no_broken_download(monkeypatch):
    hub, kaggle = pytest.importorskip("huggingface_hub"), pytest.importorskip("kagglehub")

    def download(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(kaggle, "model_download", download)
    for name in ("hf://me/mine", "kaggle://me/mine/keras/tiny"):
        with pytest.raises(OSError, match="No space left") as caught:
            presets.find_checkpoint(name)
        assert type(caught.value) is OSError


def test_kaggle(data, monkeypatch):
    hub = pytest.importorskip("kagglehub")
    monkeypatch.setattr(hub, "model_download", lambda handle, _: str(data / handle.split("/")[-1]))
    preset = "kaggle://keras/paligemma2/keras/keras_hub_tiny_paligemma2"
    assert presets.find_checkpoint(preset).format == "keras-hub"


@pytest.mark.parametrize(
    ("status", "expected", "message"),
    [
        (403, PermissionError, r"licence at .*models/keras/paligemma2.*KAGGLE_KEY"),
        (404, FileNotFoundError, "There is no keras/paligemma2"),
        (500, ConnectionError, "Kaggle did not give keras/paligemma2"),
        (None, ConnectionError, "Kaggle did not give keras/paligemma2"),
    ],
)
def test_kaggle_refuses(monkeypatch, status, expected, message):
    hub = pytest.importorskip("kagglehub")

    def download(handle, path):
        if status is None:
            raise hub.exceptions.BackendError("no")
        error = hub.exceptions.KaggleApiHTTPError.__new__(hub.exceptions.KaggleApiHTTPError, "no")
        error.response = type("Response", (), {"status_code": status})
        raise error

    monkeypatch.setattr(hub, "model_download", download)
    with pytest.raises(expected, match=message):
        presets.find_checkpoint("kaggle://keras/paligemma2/keras/pali_gemma2_mix_3b_224")


def test_the_config_alone_is_fetched(data, monkeypatch):
    hub, kaggle = pytest.importorskip("huggingface_hub"), pytest.importorskip("kagglehub")
    calls = []

    def download(repository, revision, allow_patterns):
        calls.append(allow_patterns)
        return str(data / "hf_tiny_paligemma2")

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(kaggle, "model_download", lambda handle, path: str(data / handle / path))
    config = presets.find_checkpoint("hf://me/mine", only_config=True).config
    assert calls == [["config.json"]]
    assert config.text.width == 40
    name = "keras_hub_tiny_paligemma2"
    assert presets.find_checkpoint(f"kaggle://{name}", only_config=True).path == str(data / name)


@pytest.mark.parametrize("hub", ["hf", "404 of kaggle", "ValueError of kaggle"])
def test_all_is_fetched_where_there_is_no_config(data, monkeypatch, tmp_path, hub):
    """A big_vision file has none."""
    hugging_face, kaggle = (pytest.importorskip(f"{x}hub") for x in ("huggingface_", "kaggle"))
    shutil.copy(data / "bv_tiny_paligemma2.npz", tmp_path / "paligemma2.npz")

    def download(repository, revision, allow_patterns):
        return str(tmp_path / "empty" if allow_patterns == ["config.json"] else tmp_path)

    def download_of_kaggle(handle, path):
        if path is None:
            return str(tmp_path)
        if hub.startswith("ValueError"):
            raise ValueError("'config.json' is not present in the model files")
        error = kaggle.exceptions.KaggleApiHTTPError
        error = error.__new__(error, "no")
        error.response = type("Response", (), {"status_code": 404})
        raise error

    monkeypatch.setattr(hugging_face, "snapshot_download", download)
    monkeypatch.setattr(kaggle, "model_download", download_of_kaggle)
    name = "hf://me/mine" if hub == "hf" else "kaggle://google/paligemma-2/jax/mine"
    assert presets.find_checkpoint(name, only_config=True).format == "big-vision"


def test_a_folder_with_one_npz(data, tmp_path):
    """As Kaggle serves big_vision's files."""
    shutil.copy(data / "bv_tiny_paligemma2.npz", tmp_path / "paligemma2.npz")
    assert presets.find_checkpoint(tmp_path).format == "big-vision"


def test_all_files_of_a_model_are_replaced(model, tmp_path):
    written = set()
    for format in ("preset", "hf", "keras-hub"):
        folder = tmp_path / format
        model._save(folder, format)
        files = (path for path in folder.rglob("*") if path.is_file())
        written |= {path.relative_to(folder).as_posix() for path in files}
    assert set(presets.MODEL_FILES) - written == {
        presets.CODEC_FILE,
        "model-?????-of-?????.safetensors",
        "model.safetensors.index.json",
        *("processor_config.json", "generation_config.json", "added_tokens.json"),  # transformers'
        *("model.weights.json", "model_?????.weights.h5"),  # Keras'
    }
    assert written < set(presets.MODEL_FILES)


def test_upload(model, monkeypatch):
    hub, kaggle = pytest.importorskip("huggingface_hub"), pytest.importorskip("kagglehub")
    calls = []

    def record(*args, **kwargs):
        folder = kwargs.get("folder_path") or args[-1]
        is_adapter = os.path.exists(os.path.join(folder, "adapter_config.json"))
        format = "adapter" if is_adapter else presets.find_checkpoint(folder).format
        calls.append((kwargs.get("repo_id") or args[0], format))
        deleted.append(kwargs.get("delete_patterns"))

    made, deleted = [], []
    monkeypatch.setattr(hub, "whoami", lambda: None)
    monkeypatch.setattr(hub, "create_repo", lambda name, exist_ok: made.append(name))
    monkeypatch.setattr(hub, "upload_folder", record)
    monkeypatch.setattr(kaggle, "model_upload", record)
    model.upload_preset("hf://me/mine")
    model.upload_preset("kaggle://me/mine/keras/tiny", format="keras-hub")
    tuned = PaliGemma2(model.config)
    tuned.enable_lora(2)
    tuned.upload_adapter("hf://me/adapter")
    assert calls == [
        ("me/mine", "preset"),
        ("me/mine/keras/tiny", "keras-hub"),
        ("me/adapter", "adapter"),
    ]
    # Hugging Face keeps what an upload lacks, and an old `model.safetensors` hides new shards.
    old = ["model.safetensors", "model-00001-of-00002.safetensors", presets.CODEC_FILE]
    kept = ["README.md", "images/config.json", "adapter_model.safetensors", "chat_template.json"]
    assert [*hub.utils.filter_repo_objects([*old, *kept], allow_patterns=deleted[0])] == old
    assert deleted[1:] == [None, None]  # an adapter may lie beside a model
    with pytest.raises(ValueError, match="Call `enable_lora` or"):
        model.upload_adapter("hf://me/adapter")
    assert made == ["me/mine", "me/adapter"]
    monkeypatch.setattr(presets, "save_checkpoint", None)
    with pytest.raises(TypeError):
        model.upload_preset("hf://me/new")
    assert "me/new" not in made  # nothing is left where nothing was written
    with pytest.raises(ValueError, match="`target` must be hf://org/repo"):  # looked at first
        model.upload_preset("me/mine")
    with pytest.raises(ValueError, match="`format` must be"):
        model.upload_preset("hf://me/mine", format="big-vision")
