import dataclasses
import gc
import json
import os
import re
import shutil
import weakref

import keras
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from keras import ops

from keras_pg2 import GemmaConfig, LoraOptions, PaliGemma2, PaliGemmaConfig, SiglipConfig, _backend
from keras_pg2.checkpoints import adapters
from keras_pg2.linear import Linear
from tests.conftest import logits_of

POLICIES = ("float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")
ATTENTION = {
    f"text/block_{block}/attention/{name}"
    for block in range(2)
    for name in ("query", "key", "value", "output")
}


def _numpy(x):
    return ops.convert_to_numpy(x).astype("float32")


def _error(actual, expected):
    return np.abs(actual - expected).max() / np.abs(expected).max()


def _layer(dtype="float32", **options):
    keras.utils.set_random_seed(0)
    layer = Linear(5, name="layer", dtype=dtype)
    layer.build((None, 6))
    layer.bias.assign(np.arange(5) / 5)
    if options:
        layer.enable_lora(**options)
        rng = np.random.default_rng(1)
        layer.lora_kernel_b.assign(rng.normal(size=layer.lora_kernel_b.shape))
    return layer


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(3, 6)).astype("float32")


def _model(dtype="float32", **options):
    """A model of two blocks each; with options, LoRA whose B is not zero."""
    keras.utils.set_random_seed(0)
    config = PaliGemmaConfig(
        SiglipConfig(12, 2, 20, 3, 28, 14),
        GemmaConfig(
            width=16,
            depth=2,
            mlp_dim=24,
            num_heads=4,
            num_kv_heads=2,
            head_dim=6,
            query_pre_attn_scalar=6,
            vocab_size=50,
            use_post_norms=True,
        ),
    )
    model = PaliGemma2(config, dtype=dtype)
    if options:
        model.enable_lora(**options)
        _fill(model)
    return model


def _fill(model):
    rng = np.random.default_rng(2)
    for _, layer in sorted(model.lora_layers().items()):
        layer.lora_kernel_b.assign(0.3 * rng.normal(size=layer.lora_kernel_b.shape))


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "images": rng.uniform(-1, 1, (2, 28, 28, 3)).astype("float32"),
        "token_ids": rng.integers(3, 50, (2, 6)).astype("int32"),
        "padding_mask": np.ones((2, 6), bool),
        "suffix_mask": np.arange(6)[None].repeat(2, 0) >= 3,
    }


def _weights(model):
    return {path: _numpy(v) for path, v in model.variables_by_path().items()}


# One layer


def test_the_sum_of_the_paper(x):
    layer = _layer(rank=2, alpha=3)
    w, b = _numpy(layer.kernel), _numpy(layer.bias)
    lora_a, lora_b = _numpy(layer.lora_kernel_a), _numpy(layer.lora_kernel_b)
    expected = x @ w + b + 1.5 * (x @ lora_a @ lora_b)
    np.testing.assert_allclose(_numpy(layer(x)), expected, atol=1e-6)
    assert layer.lora.alpha == 3
    assert _layer(rank=4).lora.scale == 1  # alpha is the rank


def test_initial_values():
    layer = Linear(50, name="layer", dtype="bfloat16")
    layer.build((None, 400))
    layer.enable_lora(8)
    values = _numpy(layer.lora_kernel_a)
    assert 0.049 < np.abs(values).max() <= 0.05  # 1/√400
    np.testing.assert_allclose(values.std(), 0.05 / 3**0.5, rtol=0.05)
    assert not _numpy(layer.lora_kernel_b).any()
    variables = (layer.lora_kernel_a, layer.lora_kernel_b)
    assert [v.path for v in variables] == ["layer/lora_kernel_a", "layer/lora_kernel_b"]
    assert {v.dtype for v in variables} == {"float32"}
    assert [v.path for v in layer.trainable_variables if "kernel" in v.name] == [
        "layer/lora_kernel_a",
        "layer/lora_kernel_b",
    ]


def test_the_kernel_is_never_merged_in_the_product(x, monkeypatch):
    layer = _layer(rank=2)
    expected = _numpy(layer(x))
    shapes = []
    matmul = _backend.matmul

    def recorded(x, kernel):
        shapes.append((tuple(x.shape), tuple(kernel.shape)))
        return matmul(x, kernel)

    monkeypatch.setattr(_backend, "matmul", recorded)
    np.testing.assert_array_equal(_numpy(layer(x)), expected)
    assert shapes == [((3, 6), (6, 5)), ((3, 6), (6, 2)), ((3, 2), (2, 5))]
    assert layer.kernel is layer._kernel


def test_dropout_acts_in_training_alone(x):
    layer = _layer(rank=2, dropout=0.5)
    base = x @ _numpy(layer.kernel) + _numpy(layer.bias)
    update = _numpy(layer(x)) - base
    np.testing.assert_allclose(_numpy(layer(x, training=False)) - base, update, atol=1e-6)
    np.testing.assert_array_equal(*(_numpy(layer(x, training=True)) for _ in range(2)))

    def next_step():
        layer._dropout_seed.renew()  # as the model does before each step
        return _numpy(layer(x, training=True))

    many = np.stack([next_step() for _ in range(400)]) - base
    assert many.std(axis=0).min() > 0.05
    np.testing.assert_allclose(many.mean(axis=0), update, atol=5 * many.std() / 400**0.5)
    # Only A's inputs are dropped, so a layer whose B is zero is untouched.
    layer.lora_kernel_b.assign(np.zeros((2, 5)))
    np.testing.assert_allclose(_numpy(layer(x, training=True)), base, atol=1e-6)


def test_parts_of_a_sequence_drop_inputs_of_their_own(x, monkeypatch):
    masks, dropout = [], keras.random.dropout

    def spied(inputs, rate, seed):
        masks.append(_numpy(dropout(ops.ones_like(inputs), rate, seed=seed)))
        return dropout(inputs, rate, seed=seed)

    monkeypatch.setattr(keras.random, "dropout", spied)
    layer = _layer(rank=2, dropout=0.5)
    sequence = np.repeat(x[None, :1], 64, axis=1)
    for _ in range(2):  # rematerialization runs them twice
        _backend.in_chunks(lambda x: layer(x, training=True), [sequence], 32)
    np.testing.assert_array_equal(masks[:2], masks[2:])
    assert 0.2 < (masks[0] != masks[1]).mean() < 0.8


@pytest.mark.parametrize("dtype", POLICIES)
def test_merging_and_back(x, dtype):
    layer = _layer(dtype, rank=2, alpha=3)
    kernel, outputs = _numpy(layer.kernel), _numpy(layer(x))
    update = 1.5 * (_numpy(layer.lora_kernel_a) @ _numpy(layer.lora_kernel_b))
    layer.merge_lora()
    assert layer.is_merged
    expected = (kernel + update).astype(layer.kernel.dtype).astype("float32")  # rounded once
    np.testing.assert_array_equal(_numpy(layer.kernel), expected)
    tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[layer.compute_dtype]
    assert _error(_numpy(layer(x)), outputs) < tolerance
    assert not layer.lora_kernel_a.trainable
    layer.unmerge_lora()
    np.testing.assert_array_equal(_numpy(layer.kernel), kernel)
    np.testing.assert_array_equal(_numpy(layer(x)), outputs)
    assert layer.lora_kernel_a.trainable


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16"])
def test_wide_inputs_in_float16(x, dtype):
    """Inputs, x·A and the result exceed 65,504."""
    exact, layer = (_layer(policy, rank=2, alpha=64) for policy in ("float32", dtype))
    for variable, other in zip(exact.variables, layer.variables):
        variable.assign(_numpy(other))
    expected = _numpy(exact(1e6 * x))
    assert np.abs(expected).max() > 1e7
    assert _error(_numpy(layer(1e6 * x)), expected) < 3e-3


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "bfloat16"])
def test_quantized_kernel(x, dtype):
    layer = _layer(dtype, rank=2, alpha=3)
    expected = _numpy(layer(x))
    layer.quantize("int8")
    assert layer.quantization_mode == "int8"
    assert layer.quantized.codes.path == "layer/quantized/codes"
    assert _error(_numpy(layer(x)), expected) < 0.05
    after = _layer(dtype)
    after.quantize("int8")
    base = _numpy(after(x))
    after.enable_lora(2, 3)
    np.testing.assert_array_equal(_numpy(after(x)), base)
    for name in ("lora_kernel_a", "lora_kernel_b"):
        getattr(after, name).assign(getattr(layer, name))
    np.testing.assert_array_equal(_numpy(after(x)), _numpy(layer(x)))
    with pytest.raises(ValueError, match="quantized to int8, which is too coarse"):
        layer.merge_lora()
    layer.drop_lora()
    np.testing.assert_array_equal(_numpy(layer(x)), base)


def test_quantized_layers_drop_inputs_in_training(x):
    layer = _layer(rank=2, dropout=0.5)
    layer.quantize("int8")
    assert np.abs(_numpy(layer(x, training=True)) - _numpy(layer(x))).max() > 0.01


def test_layer_errors():
    with pytest.raises(ValueError, match="A Linear has no `activation`"):
        Linear(5, activation="relu")
    for options, message in (
        ({"rank": 0}, "`rank` must be a positive integer. Received: rank=0"),
        ({"rank": 2.0}, r"Received: rank=2\.0"),
        ({"rank": True}, "Received: rank=True"),
        ({"rank": 2, "alpha": 0}, "`alpha` must be a positive number. Received: alpha=0"),
        ({"rank": 2, "alpha": float("nan")}, "Received: alpha=nan"),
        ({"rank": 2, "dropout": 1.0}, r"`dropout` must be in \[0, 1\). Received: dropout=1.0"),
        ({"rank": 2, "dropout": -0.1}, r"Received: dropout=-0\.1"),
    ):
        with pytest.raises(ValueError, match=message):
            _layer(**options)
    with pytest.raises(ValueError, match="Build the layer 'layer' before"):
        Linear(5, name="layer").enable_lora(2)
    layer = _layer()
    for method in (layer.merge_lora, layer.unmerge_lora, layer.drop_lora):
        with pytest.raises(ValueError, match="'layer' has no LoRA"):
            method()
    layer.enable_lora(2)
    with pytest.raises(ValueError, match="has LoRA of rank 2 already"):
        layer.enable_lora(2)
    with pytest.raises(ValueError, match=r"not merged. Call `merge_lora\(\)` first"):
        layer.unmerge_lora()
    layer.merge_lora()
    with pytest.raises(ValueError, match=r"is merged. Call `unmerge_lora\(\)` first"):
        layer.merge_lora()
    with pytest.raises(ValueError, match="before `quantize`"):
        layer.quantize("int8")


# The model


def test_enabling_changes_nothing_but_what_is_trained(batch, capsys):
    model = _model()
    expected = _numpy(model(batch))
    count = len(model.variables)
    model.vision.trainable = False  # a frozen tower must not hide its LoRA
    model.enable_lora(rank=2, pattern="block_1/(attention/query|mlp/up)|projector")
    np.testing.assert_array_equal(_numpy(model(batch)), expected)
    paths = {
        "vision/block_1/attention/query",
        "vision/block_1/mlp/up",
        "projector",
        "text/block_1/attention/query",
        "text/block_1/mlp/up",
    }
    assert set(model.lora_layers()) == paths
    variables = {path for path, v in model.variables_by_path().items() if v.trainable}
    assert variables == {f"{path}/lora_kernel_{x}" for path in paths for x in "ab"}
    assert len(model.trainable_variables) == 10
    assert len(model.variables) == count + 10
    trained = 2 * ((12 + 12) + (12 + 20) + (12 + 16) + (16 + 24) + (16 + 24))
    assert f"{trained} of {model.count_params():,} parameters" in capsys.readouterr().out


def test_patterns():
    model = _model()
    mlp = {f"text/block_{block}/mlp/{name}" for block in (0, 1) for name in ("gate", "up", "down")}
    model.enable_lora()
    assert set(model.lora_layers()) == ATTENTION
    assert {layer.lora.rank for layer in model.lora_layers().values()} == {8}
    for pattern, paths in (("attention", ATTENTION), ("all-linear", ATTENTION | mlp)):
        model.drop_lora()
        model.enable_lora(2, pattern=pattern)
        assert set(model.lora_layers()) == paths


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param("bfloat16", marks=pytest.mark.slow_if_compiled),
        pytest.param("mixed_float16", marks=pytest.mark.slow_if_compiled),
    ],
)
def test_merged_equals_unmerged(batch, dtype):
    model = _model(dtype, rank=2, pattern="")
    weights, expected = _weights(model), _numpy(model(batch))
    model.merge_lora()
    merged = _numpy(model(batch))
    tolerance = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.2}[model.compute_dtype]
    rms = np.sqrt(np.mean((merged - expected) ** 2) / np.mean(expected**2))
    assert rms < tolerance
    assert model.trainable_variables == []
    model.unmerge_lora()
    for path, value in _weights(model).items():
        np.testing.assert_array_equal(value, weights[path], err_msg=path)
    np.testing.assert_array_equal(_numpy(model(batch)), expected)


def test_dropping(batch):
    model = _model()
    expected, paths = _numpy(model(batch)), list(model.variables_by_path())
    trainable = [v.path for v in model.trainable_variables]
    model.enable_lora(2, dropout=0.1)
    _fill(model)
    adapted = _numpy(model(batch))
    assert _error(adapted, expected) > 0.05
    model.drop_lora()
    assert list(model.variables_by_path()) == paths
    assert [v.path for v in model.trainable_variables] == trainable
    np.testing.assert_array_equal(_numpy(model(batch)), expected)
    model.enable_lora(2)
    _fill(model)
    adapted = _numpy(model(batch))
    model.merge_lora()
    model.drop_lora()
    assert list(model.variables_by_path()) == paths
    assert _error(_numpy(model(batch)), adapted) < 1e-5
    assert "lora" not in model.get_config()


def _log_probs(model, batch):
    inputs = {name: batch[name][:1] for name in ("images", "token_ids")}
    return model.generate(inputs, max_new_tokens=2)[0].log_probs


@pytest.mark.slow
def test_programs_are_renewed(batch):
    model = _model()
    base = _log_probs(model, batch)
    model.enable_lora(2)
    _fill(model)
    adapted = _log_probs(model, batch)
    assert np.abs(adapted - base).max() > 1e-3
    model.merge_lora()
    np.testing.assert_allclose(_log_probs(model, batch), adapted, atol=1e-4)
    for layer in model.lora_layers().values():  # not by the model
        layer.unmerge_lora()
    np.testing.assert_allclose(_log_probs(model, batch), adapted, atol=1e-4)
    model.merge_lora()
    kernels = [weakref.ref(layer.lora_kernel_a) for layer in model.lora_layers().values()]
    model.drop_lora()
    gc.collect()
    assert all(kernel() is None for kernel in kernels)
    model.quantize("int8", filters="projector")
    assert model.projector.quantization_mode == "int8"
    assert 0 < np.abs(_log_probs(model, batch) - base).max() < 0.5


def _fit(model, batch, epochs):
    y = np.roll(batch["token_ids"], -1, axis=1)
    weight = np.roll(batch["suffix_mask"], -1, axis=1) * np.array([1.0] * 5 + [0.0])
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )
    model.compile(optimizer=keras.optimizers.Adam(0.05), loss=loss)
    return model.fit(batch, y, sample_weight=weight, epochs=epochs, verbose=0).history["loss"]


@pytest.mark.parametrize("is_quantized", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fit_trains_a_and_b_alone(batch, is_quantized):
    model = _model()
    if not is_quantized:
        _fit(model, batch, 1)  # Keras' functions and torch's parameters are of the model before
    else:
        model.quantize("int8")
        assert len(model.variables_by_path()) == len(model.variables)
        assert model.text.blocks[0].mlp.up.quantization_mode == "int8"
    model.enable_lora(4, alpha=8, dropout=0.1)
    before = _weights(model)
    losses = _fit(model, batch, 8)
    assert losses[-1] < 0.95 * losses[0]
    changed = {path for path, value in _weights(model).items() if (value != before[path]).any()}
    assert {path for path in changed if "seed" not in path} == {
        f"{path}/lora_kernel_{x}" for path in model.lora_layers() for x in "ab"
    }


@pytest.mark.parametrize("scope", ["run_1", "my_paligemma2", "paligemma2"])
def test_a_name_scope_around_the_model(batch, tmp_path, scope):
    """As in a layer that makes the model in its `build`."""
    with keras.name_scope(scope):
        model = _model(rank=2, pattern="attention")
    assert len(model.lora_layers()) == 8
    for layer in model.lora_layers().values():
        layer.lora_kernel_b.assign(np.full(layer.lora_kernel_b.shape, 0.1))
    expected = _numpy(model(batch))
    model.save_to_preset(tmp_path / "preset")
    exported = PaliGemma2.from_preset(tmp_path / "preset", dtype="float32")
    np.testing.assert_allclose(
        _numpy(exported(batch)), expected, atol=1e-5 * np.abs(expected).max()
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(_numpy(loaded(batch)), expected)


def test_model_errors():
    model = _model()
    with pytest.raises(
        ValueError, match=r"`pattern` must match .*vision/.*\['attention', 'all-lin"
    ):
        model.enable_lora(pattern="txt/")
    with pytest.raises(ValueError, match=r"`pattern` must be a regular expression.*'\*/query'"):
        model.enable_lora(pattern=["attention", "*/query"])
    for options in ({"rank": 0}, {"rank": 2.5}, {"dropout": 1}, {"alpha": -1}):
        with pytest.raises(ValueError, match="Received: "):
            model.enable_lora(**options)
    options = LoraOptions(rank=4, alpha=8)
    with pytest.raises(ValueError, match=r"no linear layers with the paths \['text/nothing'\]"):
        model.enable_lora_on({"text/nothing": options})
    for wrong in ({}, {"projector": {"rank": 4}}):
        with pytest.raises(ValueError, match="of at least one layer path to "):
            model.enable_lora_on(wrong)
    assert model.lora_layers() == {}
    assert model.projector.kernel.trainable  # nothing was frozen
    for method in (model.merge_lora, model.unmerge_lora, model.drop_lora):
        with pytest.raises(ValueError, match="The model has no LoRA"):
            method()
    with pytest.raises(ValueError, match="no LoRA to save"):
        model.save_adapter("nowhere")
    model.enable_lora(2)
    with pytest.raises(ValueError, match=r"enabled on 8 layers already. `drop_lora\(\)`"):
        model.enable_lora(2, pattern="projector")
    with pytest.raises(ValueError, match="is not merged"):
        model.unmerge_lora()


def test_partly_quantized_models_are_not_half_merged():
    model = _model(rank=2)
    model.text.blocks[1].attention.value.quantize("int8")
    before = _weights(model)
    with pytest.raises(ValueError, match="text/block_1/attention/value' is quantized to int8"):
        model.merge_lora()
    assert all((value == before[path]).all() for path, value in _weights(model).items())
    assert not any(layer.is_merged for layer in model.lora_layers().values())


def test_merged_layers_are_not_trained(batch):
    """Neither `save` nor `unmerge_lora` would keep what they learn."""
    model = _model(rank=2, pattern="query")
    model.merge_lora()
    model.unfreeze("query")
    assert not any("lora" in v.path for v in model.trainable_variables)
    model.compile(keras.optimizers.SGD(0.1))
    data = {**batch, "suffix_mask": np.ones(batch["token_ids"].shape, bool)}
    for train in (model.fit, model.train_on_batch):
        with pytest.raises(ValueError, match=r"query' is merged.*Call `drop_lora\(\)` first"):
            train(data)


def test_an_interrupted_merge_is_undone(batch, monkeypatch):
    model = _model(rank=2, pattern="query|key")
    _fill(model)
    expected, merge = _weights(model), Linear.merge_lora
    last = [*model.lora_layers().values()][-1]

    def interrupted(layer):
        if layer is last:
            raise KeyboardInterrupt
        merge(layer)

    monkeypatch.setattr(Linear, "merge_lora", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.merge_lora()
    assert not any(layer.is_merged for layer in model.lora_layers().values())
    assert all((value == expected[path]).all() for path, value in _weights(model).items())
    monkeypatch.undo()
    model.merge_lora()
    with pytest.raises(ValueError, match="is merged"):
        model.merge_lora()
    assert all(layer.is_merged for layer in model.lora_layers().values())


def test_weights_of_a_merged_model(batch):
    """They are those of an unmerged one, so that no copy counts LoRA twice."""
    model = _model(rank=2, pattern="query")
    _fill(model)
    weights, expected = model.get_weights(), _numpy(model(batch))
    model.merge_lora()
    for array, other in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(array, other)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(_numpy(clone(batch)), expected)
    merged = _weights(model)
    with pytest.raises(ValueError, match=r"expected \(\d+,\), found \(7,\)"):
        model.set_weights([*(array * 2 for array in weights[:-1]), np.zeros(7)])
    for array, other in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(array, other)
    model.set_weights([array * 0 for array in weights])
    assert not model.text.blocks[1].attention.query.kernel.numpy().any()
    with pytest.raises(ValueError, match="shape"):
        model.set_weights([np.zeros((2, 2))] * len(weights))
    model.set_weights(weights)
    assert model.text.blocks[1].attention.query.is_merged
    assert all((value == merged[path]).all() for path, value in _weights(model).items())
    model.unmerge_lora()
    np.testing.assert_array_equal(_numpy(model(batch)), expected)


def test_what_is_frozen_stays_so_through_merging(tmp_path):
    model = _model(rank=2, pattern="query|value")
    model.freeze(["query.*lora", "block_1.*lora_kernel_a"])
    trainable = [v.path for v in model.trainable_variables]
    assert len(trainable) == 6
    model.merge_lora()
    assert not any("lora" in v.path for v in model.trainable_variables)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert len(loaded.trainable_variables) == len(trainable)
    model.unmerge_lora()
    assert [v.path for v in model.trainable_variables] == trainable


def test_merged_layers_are_not_quantized():
    model = _model(rank=2, pattern="text/block_1/attention/value")
    model.merge_lora()
    with pytest.raises(ValueError, match=r"Call `drop_lora\(\)`.*before `quantize`"):
        model.quantize("int8")
    assert model._quantized_layers() == {}  # not half of them
    model.drop_lora()
    model.quantize("int8")
    assert model.text.blocks[1].attention.value.quantization_mode == "int8"


# Files of Keras


@pytest.mark.parametrize("is_merged", [False, True])
def test_keras_file(batch, tmp_path, is_merged):
    model = _model("mixed_bfloat16", rank=2, alpha=3, dropout=0.1, pattern="projector|query|down")
    expected, weights = _numpy(model(batch)), _weights(model)
    if is_merged:
        model.merge_lora()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert {path: layer.lora for path, layer in loaded.lora_layers().items()} == {
        path: layer.lora for path, layer in model.lora_layers().items()
    }
    np.testing.assert_array_equal(_numpy(loaded(batch)), expected)
    for path, value in _weights(loaded).items():
        if "seed" not in path:
            np.testing.assert_array_equal(value, weights[path], err_msg=path)
    assert len(loaded.trainable_variables) == 2 * len(loaded.lora_layers())
    assert not loaded.projector.is_merged
    loaded.freeze("lora_kernel_a")
    loaded.save(tmp_path / "frozen.keras")
    frozen = keras.saving.load_model(tmp_path / "frozen.keras")
    assert len(frozen.trainable_variables) == len(loaded.lora_layers())


def test_weights_file(batch, tmp_path):
    model = _model(rank=2)
    plain, path = _model(), tmp_path / "model.weights.h5"
    model.save_weights(path)
    with pytest.raises(
        ValueError, match=r"does not fit the layer .* which has no LoRA and is not q"
    ):
        plain.load_weights(path)
    plain.enable_lora(2)
    plain.load_weights(path)
    np.testing.assert_array_equal(_numpy(plain(batch)), _numpy(model(batch)))
    plain.merge_lora()
    with pytest.raises(ValueError, match=r"is merged. Call `unmerge_lora\(\)` first"):
        plain.load_weights(path)
    plain.drop_lora()
    plain.save_weights(path)
    with pytest.raises(ValueError, match=r"does not fit the layer .* which has LoRA and is not q"):
        model.load_weights(path)
    text = dataclasses.replace(model.config.text, mlp_dim=8)
    small = PaliGemma2(dataclasses.replace(model.config, text=text))
    with pytest.raises(ValueError, match=r"of 8 inputs and \d+ units.*into a model of its config"):
        small.load_weights(path)


def test_quantized_weights_file(x, tmp_path):
    layers = []
    for seed in (0, 1):
        model = keras.Sequential([keras.Input((6,)), _layer(rank=2)])
        model.layers[0].kernel.assign(np.random.default_rng(seed).normal(size=(6, 5)))
        model.layers[0].quantize("int8")
        layers.append(model)
    layers[0].save_weights(tmp_path / "model.weights.h5")
    layers[1].load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(_numpy(layers[1](x)), _numpy(layers[0](x)))


# Adapters

# `peft_tiny` was made by PEFT 0.21.2 on `hf_tiny_paligemma2` in transformers 5.23 (torch 2.13,
# CPU, float32, eager attention, token_type_ids and attention_mask given):
#   LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, task_type="CAUSAL_LM",
#     target_modules=all of the decoder, out_proj and fc1 of the tower, patch_embedding, projector,
#     rank_pattern={"down_proj": 2}, alpha_pattern={r"layers\.1\.self_attn\.q_proj": 9})
#   torch.manual_seed(0); each A and B is randn, divided by the root of the size of its row, B also
#   times 0.005; saved by `save_pretrained`. `expected.npz` has the logits of the examples
#   `train_{i}` of `hf_tiny_paligemma2/expected.npz`; PEFT moves them by up to 6 of 20.
# In the same setting PEFT loaded what `save_adapter` wrote, and its logits were ours.
# The tiny model amplifies rounding: 6e-8 of every weight move PEFT's own logits by up to 3.2e-5 of
# the largest, and those of the model without LoRA by 2.6e-5.
TOLERANCE = 5e-5  # of the largest logit


def _base(data, dtype="float32"):
    return PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype=dtype)


def _golden_error(model, data, expected):
    golden = np.load(data / "hf_tiny_paligemma2" / "expected.npz")
    errors = []
    for i in range(3):
        inputs = {
            "images": golden["pixel_values"][i : i + 1].transpose(0, 2, 3, 1),
            "token_ids": golden[f"train_{i}_input_ids"][:, 9:],
            "suffix_mask": golden[f"train_{i}_token_type_ids"][:, 9:],
        }
        logits = expected[f"train_{i}_logits_from_last_prefix"][:, :1664]
        errors.append(_error(logits_of(model, inputs)[0, -len(logits) :], logits))
    return max(errors)


@pytest.mark.slow_if_compiled
def test_peft(data, tmp_path):
    expected = np.load(data / "peft_tiny" / "expected.npz")
    model = _base(data)
    assert _golden_error(model, data, expected) > 0.1
    model.load_adapter(data / "peft_tiny")
    assert len(model.lora_layers()) == 4 * 7 + 2 * 2 + 2
    text = model.text.blocks
    assert text[0].mlp.down.lora.rank == 2
    assert (text[0].attention.query.lora.alpha, text[1].attention.query.lora.alpha) == (5, 9)
    assert text[0].mlp.up.lora.dropout == 0.1
    assert _golden_error(model, data, expected) < TOLERANCE
    model.save_adapter(tmp_path / "adapter")
    model.merge_lora()
    assert _golden_error(model, data, expected) < 2 * TOLERANCE  # rounds every weight once more
    # And back: our file holds PEFT's tensors, in names that all releases of transformers read.
    ours, theirs = (
        safetensors.numpy.load_file(folder / adapters.TENSOR_FILE)
        for folder in (tmp_path / "adapter", data / "peft_tiny")
    )
    assert {adapters._read_name(key)[0] for key in ours} == {
        adapters._read_name(key)[0] for key in theirs
    }
    assert "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight" in ours
    by_name = {adapters._read_name(key)[0]: value for key, value in theirs.items()}
    for key, value in ours.items():
        np.testing.assert_array_equal(value, by_name[adapters._read_name(key)[0]], err_msg=key)


def test_an_adapter_of_a_hub(data, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    def download(repository, revision, allow_patterns):
        calls.append((repository, revision, allow_patterns))
        return str(data / "peft_tiny")

    monkeypatch.setattr(hub, "snapshot_download", download)
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32")
    model.load_adapter("hf://me/adapter@v1")
    assert model.lora_layers()
    assert calls == [("me/adapter", "v1", [adapters.CONFIG_FILE, adapters.TENSOR_FILE])]


LAYOUTS = {  # towers as 4.49, 4.57 and 5.23 of transformers name them; 5.23 is PEFT's golden
    "4.49": ("language_model.model", "vision_tower.vision_model", "multi_modal_projector"),
    "4.57": (
        "model.language_model",
        "model.vision_tower.vision_model",
        "model.multi_modal_projector",
    ),
}


@pytest.fixture
def folder(data, tmp_path):
    """A copy of PEFT's adapter to change."""
    return shutil.copytree(data / "peft_tiny", tmp_path / "peft")


def _change(folder, function):
    path = folder / adapters.TENSOR_FILE
    tensors = function(safetensors.numpy.load_file(path))
    safetensors.numpy.save_file(tensors, path)


def _change_config(folder, **changes):
    path = folder / adapters.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".weight", ".default.weight"])
def test_layouts_of_transformers(data, folder, layout, suffix):
    towers = ("model.language_model", "model.vision_tower", "model.multi_modal_projector")

    def rename(tensors):
        renamed = {}
        for key, value in tensors.items():
            for old, new in zip(towers, LAYOUTS[layout]):
                key = key.replace(f"base_model.model.{old}.", f"base_model.model.{new}.")
            renamed[key.replace(".weight", suffix)] = value
        return renamed

    _change(folder, rename)
    model = _base(data)
    model.load_adapter(folder)
    assert _golden_error(model, data, np.load(data / "peft_tiny" / "expected.npz")) < TOLERANCE


def test_rank_stabilised_scale(data, folder):
    _change_config(folder, use_rslora=True)
    model = _base(data)
    model.load_adapter(folder)
    np.testing.assert_allclose(model.projector.lora.scale, 5 / 3**0.5)
    np.testing.assert_allclose(model.text.blocks[2].mlp.down.lora.scale, 5 / 2**0.5)


def test_adapter_round_trip(batch, tmp_path):
    model = _model(rank=2, alpha=3, dropout=0.1, pattern="vision/patch|projector|text/block_1")
    expected = _numpy(model(batch))
    model.save_adapter(tmp_path / "new" / "adapter", base_model="tiny")
    assert sorted(path.name for path in (tmp_path / "new" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with pytest.raises(FileExistsError, match=r"adapter_config\.json.*overwrite=True"):
        model.save_adapter(tmp_path / "new" / "adapter")
    with pytest.raises(FileExistsError, match="is a file, where a folder is to be"):
        model.save_adapter(tmp_path / "new" / "adapter" / "adapter_config.json", overwrite=True)
    model.save_adapter(tmp_path / "new" / "adapter", base_model="tiny", overwrite=True)
    modes = {path.stat().st_mode for path in (tmp_path / "new" / "adapter").iterdir()}
    assert len(modes) == 1  # both readable by the same users
    config = json.loads((tmp_path / "new" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 3, 0.1)
    assert config["base_model_name_or_path"] == "tiny"
    tensors = safetensors.numpy.load_file(
        tmp_path / "new" / "adapter" / "adapter_model.safetensors"
    )
    name = "vision_tower.vision_model.embeddings.patch_embedding"
    assert tensors[f"base_model.model.{name}.lora_A.weight"].shape == (2, 3, 14, 14)
    assert tensors[f"base_model.model.{name}.lora_B.weight"].shape == (12, 2, 1, 1)
    other = _model()
    other.load_adapter(tmp_path / "new" / "adapter")
    assert {path: layer.lora for path, layer in other.lora_layers().items()} == {
        path: layer.lora for path, layer in model.lora_layers().items()
    }
    np.testing.assert_array_equal(_numpy(other(batch)), expected)


def test_an_adapter_is_replaced_as_a_whole(tmp_path, monkeypatch):
    model = _model(rank=2)
    model.save_adapter(tmp_path)
    tensors, config = tmp_path / adapters.TENSOR_FILE, tmp_path / adapters.CONFIG_FILE
    config.unlink()
    before = tensors.read_bytes()
    with pytest.raises(FileExistsError, match=r"adapter_model\.safetensors' exists already"):
        model.save_adapter(tmp_path)
    assert tensors.read_bytes() == before
    model.save_adapter(tmp_path, overwrite=True)
    replace = os.replace

    def interrupted(source, destination):
        if destination.endswith(adapters.CONFIG_FILE):
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_adapter(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [tensors.name]


def test_target_modules_match_in_every_layout(data, folder):
    """PEFT matches the whole name of a module."""
    model = _model(rank=2, pattern="text/block_1/.*(query|up)|vision/block_0/.*query|projector")
    model.save_adapter(folder, overwrite=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    layers = {"language_model": "layers.1", "vision_tower": "encoder.layers.0"}
    for towers in (*LAYOUTS.values(), ("model.language_model", "model.vision_tower", "x")):
        for tower in towers[:2]:
            layer = next(layer for name, layer in layers.items() if name in tower)
            other = layer[:-1] + str(1 - int(layer[-1]))
            for name, is_target in ((layer, True), (other, False), (layer + "2", False)):
                module = f"{tower}.{name}.self_attn.q_proj"
                assert bool(re.fullmatch(config["target_modules"], module)) == is_target, module
            assert not re.fullmatch(config["target_modules"], f"{tower}.{layer}.self_attn.k_proj")
    assert re.fullmatch(config["target_modules"], "model.multi_modal_projector.linear")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["embed_tokens"]),
        ("init_lora_weights", "pissa_niter_16"),
        ("trainable_token_indices", [1]),
    ],
)
def test_adapters_of_other_kinds(data, folder, model, field, value):
    _change_config(folder, **{field: value})
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}, which is not")):
        model.load_adapter(folder)
    assert model.lora_layers() == {}


def test_adapters_that_do_not_fit(folder, model):
    tower = "base_model.model.model.language_model.layers.0"

    def damage(tensors):
        del tensors[f"{tower}.mlp.up_proj.lora_A.weight"]
        tensors[f"{tower}.mlp.upp_proj.lora_A.weight"] = np.zeros((3, 40), "float32")
        name = f"{tower}.mlp.gate_proj.lora_B.weight"
        tensors[name] = tensors[name][:-1]
        return tensors

    _change(folder, damage)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        model.load_adapter(folder)
    message = str(caught.value)
    tower = "language_model.model.layers.0"
    assert f"Missing tensors (1): {tower}.mlp.up_proj.lora_A.weight" in message
    assert f"Unknown tensors (1): {tower}.mlp.upp_proj.lora_A.weight" in message
    name = f"{tower}.mlp.gate_proj.lora_B.weight"
    assert f"Wrong tensors (1): {name}: expected (56, 3), found (55, 3)" in message
    assert model.lora_layers() == {}
    assert len(model.trainable_variables) == len(model.variables)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda x: x.astype("int64"), "must have floats. Received: int64"),
        (lambda x: np.where(x == x.max(), np.nan, x), "has values that are no finite numbers"),
        (lambda x: np.full_like(x, np.inf, ml_dtypes.bfloat16), "has values that are no finite"),
    ],
)
def test_adapters_without_finite_floats(folder, model, damage, message):
    name = "base_model.model.model.multi_modal_projector.linear.lora_A.weight"
    _change(folder, lambda tensors: tensors | {name: damage(tensors[name])})
    with pytest.raises(ValueError, match=rf"'{name}' of .*adapter_model\.safetensors' {message}"):
        model.load_adapter(folder)
    assert not model.lora_layers()


def test_damaged_adapters(folder, model, tmp_path):
    path = folder / adapters.TENSOR_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors' is damaged"):
        model.load_adapter(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"A pickled `adapter_model\.bin` is not read"):
        model.load_adapter(folder)
    (folder / adapters.CONFIG_FILE).write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config\.json' must hold a JSON object"):
        model.load_adapter(folder)
    (folder / adapters.CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json' is no JSON"):
        model.load_adapter(folder)
    (folder / adapters.CONFIG_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks the file .*adapter_config\.json"):
        model.load_adapter(folder)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        model.load_adapter(tmp_path / "nowhere")


def test_an_adapter_under_the_home_folder(tmp_path, monkeypatch, batch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = _model()
    model.enable_lora(2, alpha=np.float32(4))
    model.save_adapter("~/adapter", base_model=tmp_path / "base")
    assert sorted(x.name for x in (tmp_path / "adapter").iterdir()) == [
        adapters.CONFIG_FILE,
        adapters.TENSOR_FILE,
    ]
    config = json.loads((tmp_path / "adapter" / adapters.CONFIG_FILE).read_text())
    assert (config["lora_alpha"], config["base_model_name_or_path"]) == (4, str(tmp_path / "base"))
    other = _model()
    other.load_adapter("~/adapter")
    np.testing.assert_array_equal(_numpy(other(batch)), _numpy(model(batch)))
    with pytest.raises(ValueError, match="`upload_adapter` write to hubs"):
        model.save_adapter("hf://me/adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha_pattern": {"(": 4}}, "`alpha_pattern` is damaged"),
        ({"alpha_pattern": ["query"]}, "`alpha_pattern` is damaged"),
        ({"lora_alpha": "four"}, "alpha='four'"),
        ({"lora_alpha": None, "use_rslora": True}, "NoneType"),
        ({"lora_dropout": 2}, "dropout=2"),
    ],
)
def test_bad_fields_of_a_config(folder, model, changes, message):
    config = json.loads((folder / adapters.CONFIG_FILE).read_text())
    (folder / adapters.CONFIG_FILE).write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=f"{adapters.CONFIG_FILE}' has a bad field: .*{message}"):
        model.load_adapter(folder)
    assert not model.lora_layers()


def test_load_adapter_when_lora_is_enabled(data, batch):
    model = _base(data)
    model.enable_lora(2)
    with pytest.raises(ValueError, match="enabled on 16 layers already"):
        model.load_adapter(data / "peft_tiny")
    assert model.text.blocks[0].attention.query.lora.rank == 2


def test_exports_have_lora_folded_in(data, tmp_path, inputs):
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32")
    plain = ops.convert_to_numpy(model(inputs))
    model.enable_lora(rank=2, dropout=0.1, pattern="all-linear")
    rng = np.random.default_rng(0)
    for layer in model.lora_layers().values():
        layer.lora_kernel_b.assign(0.1 * rng.normal(size=layer.lora_kernel_b.shape))
    expected = ops.convert_to_numpy(model(inputs))
    model.save_hf(tmp_path / "hf")
    exported = PaliGemma2.from_preset(tmp_path / "hf", dtype="float32")
    assert not exported.lora_layers()
    scale = np.abs(expected).max()
    assert np.abs(ops.convert_to_numpy(exported(inputs)) - expected).max() < 2e-5 * scale
    assert np.abs(plain - expected).max() > 1e-2 * scale
    assert model.lora_layers()  # still there, unmerged


def test_quantized_models_are_not_exported(data, tmp_path):
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32")
    model.projector.quantize("int8")
    with pytest.raises(ValueError, match="Save it before `quantize`"):
        model.save_hf(tmp_path / "hf")
    assert not list(tmp_path.iterdir())
