import copy

import keras
import numpy as np
import pytest
from keras import ops

from keras_pg2 import (
    GemmaConfig,
    PaliGemma2,
    PaliGemmaConfig,
    Preprocessor,
    SiglipConfig,
    _backend,
)
from keras_pg2.linear import Linear
from tests.conftest import logits_of


def _numpy(x):
    return ops.convert_to_numpy(x)


def _tiny(**changes):
    text = dict(width=16, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=6)
    text |= dict(query_pre_attn_scalar=6, vocab_size=50, use_post_norms=True)
    return PaliGemmaConfig(SiglipConfig(12, 2, 20, 3, 28, 14), GemmaConfig(**text)).replace(
        **changes
    )


def test_paths_follow_the_design(model):
    paths = set(model.variables_by_path())
    assert len(paths) == len(model.variables) == 85
    assert {
        "vision/position_embedding",
        "vision/patch_embedding/kernel",
        "vision/block_1/attention/query/bias",
        "projector/kernel",
        "text/embedding/embeddings",
        "text/block_3/pre_attention_norm/scale",
        "text/block_3/attention/output/kernel",
        "text/block_3/post_mlp_norm/scale",
        "text/final_norm/scale",
    } <= paths


def test_four_and_five_axes_agree(model, inputs):
    five = inputs | {"images": inputs["images"][:, None]}
    np.testing.assert_allclose(_numpy(model(five)), _numpy(model(inputs)), atol=1e-5)


def test_missing_masks_mean_real_prefix(model, inputs):
    bare = {"images": inputs["images"][:1], "token_ids": inputs["token_ids"][:1]}
    full = bare | {"padding_mask": np.ones((1, 10), bool), "suffix_mask": np.zeros((1, 10), bool)}
    np.testing.assert_array_equal(_numpy(model(bare)), _numpy(model(full)))


def test_padding_is_invisible(model, inputs):
    """Neither its ids nor its place changes the logits of real tokens."""
    real = inputs["padding_mask"]
    logits = _numpy(model(inputs))
    noisy = inputs | {"token_ids": np.where(real, inputs["token_ids"], 1000)}
    np.testing.assert_allclose(_numpy(model(noisy))[real], logits[real], atol=1e-5)
    moved = {name: np.roll(x, 3, axis=1) if name != "images" else x for name, x in inputs.items()}
    np.testing.assert_allclose(_numpy(model(moved))[1, 3:], logits[1, :7], atol=1e-4)


@pytest.mark.parametrize("has_cache", [False, True])
def test_outputs_of_the_last_positions_alone(model, has_cache):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 9, model.config.text.width)).astype("float32")
    positions = np.tile(np.arange(9, dtype="int32"), (2, 1))
    mask = rng.random((2, 9, 12 if has_cache else 9)) < 0.8
    options = {"cache": model.text.empty_cache(2, 12), "cache_index": 0} if has_cache else {}
    expected, expected_cache = model.text(x, positions, (mask, mask), **options)
    if has_cache:
        options["cache"] = model.text.empty_cache(2, 12)
    hidden, cache = model.text(x, positions, (mask, mask), output_start=6, **options)
    np.testing.assert_allclose(_numpy(hidden), _numpy(expected)[:, 6:], atol=1e-5)
    for layer, expected_layer in zip(cache or [], expected_cache or []):
        np.testing.assert_allclose(_numpy(layer[0]), _numpy(expected_layer[0]), atol=1e-5)
        np.testing.assert_allclose(_numpy(layer[1]), _numpy(expected_layer[1]), atol=1e-5)


def test_suffix_is_causal_and_prefix_is_not(model, inputs):
    logits = _numpy(model(inputs))[0]  # prefix of 6, suffix of 4
    token_ids = inputs["token_ids"].copy()
    token_ids[0, 8] = 7
    changed = _numpy(model(inputs | {"token_ids": token_ids}))[0]
    np.testing.assert_allclose(changed[:8], logits[:8], atol=1e-5)
    assert np.abs(changed[8:] - logits[8:]).max(axis=1).min() > 0.01
    token_ids = inputs["token_ids"].copy()
    token_ids[0, 5] = 7
    changed = _numpy(model(inputs | {"token_ids": token_ids}))[0]
    assert np.abs(changed - logits).max(axis=1).min() > 0.01


def test_bad_inputs(model, inputs):
    with pytest.raises(ValueError, match=r"Missing: \['token_ids'\]"):
        model({"images": inputs["images"]})
    with pytest.raises(ValueError, match=r"Unknown: \['text'\]"):
        model(inputs | {"text": inputs["token_ids"]})
    with pytest.raises(ValueError, match=r"\(B, 42, 42, 3\).*\(2, 41, 42, 3\)"):
        model(inputs | {"images": inputs["images"][:, 1:]})
    with pytest.raises(ValueError, match=r"`suffix_mask` must be \(B, T\)"):
        model(inputs | {"suffix_mask": inputs["suffix_mask"][0]})


def test_a_preprocessor_of_another_model(tokenizer):
    with pytest.raises(ValueError, match=r"same image size.*56 and 28"):
        PaliGemma2(_tiny(), Preprocessor(tokenizer, 56))
    model = PaliGemma2(_tiny())
    with pytest.raises(ValueError, match=r"same image size.*56 and 28"):
        model.preprocessor = Preprocessor(tokenizer, 56)
    with pytest.raises(ValueError, match=r"but the model only .* another model's tokenizer"):
        model.preprocessor = Preprocessor(tokenizer, 28)
    assert model.preprocessor is None


def test_a_name_is_no_config():
    with pytest.raises(TypeError, match=r"from_variant.*Received: 'paligemma2-3b'"):
        PaliGemma2("paligemma2-3b")


def test_a_quantized_policy():
    """As keras_hub is told to quantize."""
    with pytest.raises(ValueError, match=r"call `quantize`.*dtype='int8_from_float32'"):
        PaliGemma2(_tiny(), dtype="int8_from_float32")
    policies = keras.dtype_policies.DTypePolicyMap(default_policy="float32")
    policies["paligemma2/text/block_1/.*"] = keras.dtype_policies.get("int8_from_float32")
    with pytest.raises(ValueError, match=r"dtype='int8_from_float32'"):
        PaliGemma2(_tiny(), dtype=policies)


def test_weights_that_a_subclass_adds(tmp_path):
    class Scored(PaliGemma2):
        def build(self, input_shape=None):
            super().build(input_shape)
            self.head = keras.layers.Dense(1, name="head")
            self.head.build((None, 16))

    with pytest.raises(ValueError, match=r"no place for weights .*: head/bias, head/kernel"):
        Scored(_tiny()).save_to_preset(tmp_path / "preset")
    assert not list(tmp_path.iterdir())
    model = PaliGemma2(_tiny())
    model.save_to_preset(tmp_path / "preset")
    scored = Scored.from_preset(tmp_path / "preset", dtype="float32")
    np.testing.assert_array_equal(_numpy(scored.head.bias), 0)
    assert _numpy(scored.head.kernel).std() > 0
    for path, variable in model.variables_by_path().items():
        np.testing.assert_array_equal(*map(_numpy, (scored.variables_by_path()[path], variable)))


def test_inputs_that_are_no_dict(model, inputs):
    with pytest.raises(ValueError, match="The model reads a dict"):
        model(inputs["images"])


def test_masks_may_be_none(model, inputs):
    given = {name: inputs[name] for name in ("images", "token_ids")}
    expected = _numpy(model(given))
    masks = dict.fromkeys(("padding_mask", "suffix_mask", "loss_mask"))
    np.testing.assert_array_equal(_numpy(model({**given, **masks})), expected)
    answers = model.generate({**given, **masks}, max_new_tokens=2)
    for answer, wanted in zip(answers, model.generate(given, max_new_tokens=2), strict=True):
        np.testing.assert_array_equal(answer.token_ids, wanted.token_ids)


def test_what_is_no_preprocessor(model):
    for other in ("tokenizer.model", model.preprocessor.tokenizer):
        with pytest.raises(ValueError, match=r"must be a keras_pg2\.Preprocessor or None"):
            PaliGemma2(model.config, other)


def test_files_of_the_older_format_are_refused(model, tmp_path):
    for name in ("model.h5", "model.hdf5"):
        with pytest.raises(ValueError, match=r"must end in '\.keras'.*save_weights"):
            model.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="others write this format")
def test_a_format_that_keras_cannot_export(model, tmp_path):
    with pytest.raises(ValueError, match="With torch pass format='onnx'"):
        model.export(tmp_path / "served")


def test_lora_of_a_layer_that_a_subclass_adds(tmp_path):
    class Doubled(PaliGemma2):
        def build(self, input_shape=None):
            super().build(input_shape)
            self.extra = Linear(16, name="extra")
            self.extra.build((None, 16))

    model = Doubled(_tiny())
    model.enable_lora(2, pattern="extra|projector")
    with pytest.raises(ValueError, match=r"no place for LoRA of layers .*: extra\. `model.save`"):
        model.save_adapter(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_loss_of_symbols():
    model = PaliGemma2(_tiny())
    inputs = {
        "images": keras.KerasTensor((None, 1, 28, 28, 3)),
        "token_ids": keras.KerasTensor((None, 5), "int32"),
        "loss_mask": keras.KerasTensor((None, 5), "bool"),
    }
    outputs = model.compute_output_spec(inputs)
    assert outputs["loss"].shape == ()
    assert outputs["num_tokens"].shape == (None,)


def test_keras_file_round_trip(model, image, inputs, tmp_path):
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.config == model.config
    assert loaded.preprocessor.get_config() == model.preprocessor.get_config()
    np.testing.assert_array_equal(_numpy(loaded(inputs)), _numpy(model(inputs)))
    expected = model.generate(image, "ocr", max_new_tokens=4)
    assert loaded.generate(image, "ocr", max_new_tokens=4) == expected


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path, monkeypatch):
    model = PaliGemma2(_tiny())
    saves = {"model.keras": model.save, "model.weights.h5": model.save_weights}
    for name, save in saves.items():
        save(str(tmp_path / "new" / name))
        save(tmp_path / "new" / name)  # replaced without a question
    contents = {name: (tmp_path / "new" / name).read_bytes() for name in saves}
    norm = model.text.final_norm
    norm.scale.assign(norm.scale + 1)

    def full_disk(store):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(norm, "save_own_variables", full_disk)
        for name, save in saves.items():
            with pytest.raises(OSError, match="No space left"):
                save(tmp_path / "new" / name)
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": 10**4})
        patch.setattr("shutil.disk_usage", lambda folder: usage)
        for name, save in saves.items():
            with pytest.raises(OSError, match="MB are needed"):
                save(tmp_path / "new" / name)
    monkeypatch.setattr("builtins.input", lambda prompt: "n")
    for name, save in saves.items():
        save(tmp_path / "new" / name, overwrite=False)
        assert (tmp_path / "new" / name).read_bytes() == contents[name]
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(saves)
    monkeypatch.setenv("HOME", str(tmp_path / "new"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "new"))
    for name, save in saves.items():
        save(f"~/{name}")
        other = PaliGemma2(_tiny())
        other.load_weights(tmp_path / "new" / name)
        np.testing.assert_array_equal(_numpy(other.text.final_norm.scale), _numpy(norm.scale))
    # What is left to Keras: shards and folders.
    model.save_weights(tmp_path / "shards.weights.json", max_shard_size=3e-5)
    assert len(list(tmp_path.glob("shards_*.h5"))) > 1
    model.save(tmp_path / "folder", zipped=False)
    assert (tmp_path / "folder" / "config.json").exists()
    with pytest.raises(ValueError, match="extension"):
        model.save(tmp_path / "model.other")


def test_keras_file_keeps_the_policy(tmp_path):
    model = PaliGemma2(_tiny(), dtype="mixed_bfloat16")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.dtype_policy.name == "mixed_bfloat16"
    assert loaded.text.blocks[1].mlp.up.compute_dtype == "bfloat16"
    assert loaded.preprocessor is None


def test_weights_round_trip(model, inputs, tmp_path):
    model.save_weights(tmp_path / "model.weights.h5")
    other = PaliGemma2(model.config, dtype="float32")
    assert np.abs(_numpy(other(inputs)) - _numpy(model(inputs))).max() > 1
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(_numpy(other(inputs)), _numpy(model(inputs)))


@pytest.mark.slow_if_compiled
def test_deep_copy(data, image):
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32")
    expected = model.generate(image, "ocr", max_new_tokens=3)
    assert copy.deepcopy(model).generate(image, "ocr", max_new_tokens=3) == expected


def test_new_weights_are_used_at_once(data, image):
    """Compiled programs read the variables, not their old values."""
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32")
    before = model.generate(image, "ocr", max_new_tokens=4, details=True)
    embedding = model.variables_by_path()["text/embedding/embeddings"]
    embedding.assign(ops.flip(embedding, axis=0))
    after = model.generate(image, "ocr", max_new_tokens=4, details=True)
    assert before.token_ids.tolist() != after.token_ids.tolist()


@pytest.mark.slow_if_compiled
def test_fit_lowers_the_loss():
    """The raw model trains with a plain Keras loss."""
    rng = np.random.default_rng(0)
    model = PaliGemma2(_tiny(), dtype="float32")
    x = {
        "images": rng.uniform(-1, 1, (4, 28, 28, 3)).astype("float32"),
        "token_ids": rng.integers(3, 50, (4, 8)).astype("int32"),
        "padding_mask": np.ones((4, 8), bool),
        "suffix_mask": np.arange(8)[None].repeat(4, 0) >= 4,
    }
    y = np.roll(x["token_ids"], -1, axis=1)
    weight = np.roll(x["suffix_mask"], -1, axis=1) * np.array([1.0] * 7 + [0.0])
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss=loss)
    history = model.fit(x, y, sample_weight=weight, epochs=30, verbose=0)
    assert history.history["loss"][-1] < 0.5 * history.history["loss"][0]


def test_any_text_length(model, inputs):
    """`predict` on batches of several lengths, where TensorFlow's shapes become dynamic."""
    expected = _numpy(model(inputs))
    for length in (10, 8, 7):
        cut = {name: x if name == "images" else x[:, :length] for name, x in inputs.items()}
        logits = model.predict(cut, verbose=0)
        assert logits.shape == (2, length, 1664)
    np.testing.assert_allclose(logits[1], expected[1, :7], atol=3e-4)  # added up in another order


def test_generate_in_the_middle_of_fit():
    rng = np.random.default_rng(0)
    model = PaliGemma2(_tiny(), dtype="float32")
    x = {
        "images": rng.uniform(-1, 1, (2, 28, 28, 3)).astype("float32"),
        "token_ids": rng.integers(3, 50, (2, 6)).astype("int32"),
    }
    answers = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: answers.append(model.generate(x, max_new_tokens=2))
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.SGD(1.0), loss=loss)
    model.fit(x, np.roll(x["token_ids"], -1, 1), epochs=2, callbacks=[callback], verbose=0)
    after = model.generate(x, max_new_tokens=2)
    assert answers[-1][0].log_probs.tolist() == pytest.approx(after[0].log_probs.tolist())
    assert answers[0][0].log_probs[0] != answers[1][0].log_probs[0]


def test_loss_equals_big_vision(data):
    """Mean over examples of the mean over suffix tokens, whatever the padding."""
    golden = np.load(data / "bv_tiny_paligemma2_expected.npz")
    model = PaliGemma2.from_preset(
        data / "bv_tiny_paligemma2.npz",
        dtype="float32",
        query_pre_attn_scalar=10,
        final_logit_softcap=None,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )
    texts = [golden[f"train_{i}_text"] for i in range(len(golden["image"]))]
    length = 5 + max(map(len, texts))
    for i, (image, text) in enumerate(zip(golden["image"], texts)):
        padding = (0, length - len(text))
        token_ids = np.pad(text, padding)[None]
        suffix_mask = np.pad(golden[f"train_{i}_mask_ar"], padding)[None]
        logits = logits_of(
            model,
            {
                "images": image[None],
                "token_ids": token_ids,
                "padding_mask": token_ids > 0,
                "suffix_mask": suffix_mask,
            },
        )
        weight = np.roll(suffix_mask, -1, axis=1).astype("float32")
        value = loss(np.roll(token_ids, -1, axis=1), logits, weight / weight.sum())
        np.testing.assert_allclose(
            float(_numpy(value)), golden[f"train_{i}_loss_bigvision_nocap"], rtol=1e-5
        )
