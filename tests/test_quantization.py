"""Quantized matrices against NumPy; a quantized model answers, trains and is restored."""

import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import keras_pg2
from keras_pg2 import _backend, quantization
from keras_pg2.linear import Linear, TokenEmbedding
from tests.conftest import logits_of

TINY = "paligemma2-tiny-digits-112"
DTYPES = ["float32", "bfloat16", "float16", "mixed_bfloat16"]
# 588 inputs are not whole groups, 200 outputs not whole tiles.
SHAPES = [(160, 96), (588, 200), (64, 64)]


def _int4(block_size):
    return {"config": keras.quantizers.Int4QuantizationConfig(block_size=block_size)}


SCHEMES = {"int8": {"mode": "int8"}, "int4": {"mode": "int4"}, "int4/32": _int4(32)}


def _numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def _in_program(function, *args):
    return _numpy(_without_gradients(function)(*args))


def _without_gradients(function):
    if _backend.BACKEND != "torch":
        return function
    import torch

    return torch.inference_mode()(function)


def _linear(shape, dtype, **scheme):
    rng = np.random.default_rng(0)
    layer = Linear(shape[1], dtype=dtype, name="layer")
    layer.build((None, shape[0]))
    layer.kernel.assign(rng.normal(size=shape) * 0.05 + 0.02)
    layer.bias.assign(rng.normal(size=shape[1]))
    kernel = _numpy(layer.kernel)
    if scheme:
        layer.quantize(**scheme)
    return layer, kernel


def _group_steps(kernel, size):
    """The distance between two codes, for each element of a kernel (in, out)."""
    groups = np.pad(kernel, ((0, -len(kernel) % size), (0, 0))).reshape(-1, size, kernel.shape[1])
    steps = (groups.max(axis=1) - groups.min(axis=1)) / 15
    return np.repeat(steps, size, axis=0)[: len(kernel)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_off_by_half_a_step(shape, scheme):
    layer, kernel = _linear(shape, "float32", **SCHEMES[scheme])
    steps = np.abs(kernel).max(axis=0) / 127
    if scheme != "int8":
        steps = _group_steps(kernel, 32 if scheme == "int4/32" else 128)
    # Scales are rounded to bfloat16, by at most 1 / 256: of 127 steps, or of 15.
    slack = 0.5 if scheme == "int8" else 0.15
    assert (np.abs(_numpy(layer.kernel) - kernel) <= (0.5 + slack) * steps).all()
    assert layer.quantization_mode == scheme[:4]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 40, 80])
def test_products(shape, scheme, dtype, num_rows):
    layer, _ = _linear(shape, dtype, **SCHEMES[scheme])
    x = np.random.default_rng(1).normal(size=(num_rows, shape[0])).astype("float32")
    if dtype != "float32":
        x = _numpy(ops.cast(x, "bfloat16"))
    expected = x @ _numpy(layer.kernel) + _numpy(layer.bias)
    bound = {"float32": 1e-5, "float16": 2e-3}.get(dtype, 0.01) * np.abs(expected).max()
    outputs = layer(x)
    np.testing.assert_allclose(_numpy(outputs), expected, atol=bound)
    # In programs torch has products of its own.
    np.testing.assert_allclose(_in_program(layer, x), expected, atol=bound)


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_products_with_wide_rows(num_rows, mode):
    """On a CPU XLA fuses these otherwise than narrow ones."""
    layer, _ = _linear((4112, 24), "float32", mode=mode)
    x = np.random.default_rng(1).normal(size=(num_rows, 4112)).astype("float32")
    expected = x @ _numpy(layer.kernel) + _numpy(layer.bias)
    np.testing.assert_allclose(_in_program(layer, x), expected, atol=1e-4)


@pytest.mark.skipif(not _backend.IS_COMPILED, reason="torch has no compiler's platforms")
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("num_rows", [1, 3, 64, 65])
def test_products_of_other_platforms(num_rows, scheme, platform, monkeypatch):
    monkeypatch.setattr(
        _backend,
        "by_platform",
        lambda functions, default, *args: functions.get(platform, default)(*args),
    )
    layer, _ = _linear((588, 200), "float32", **SCHEMES[scheme])
    x = np.random.default_rng(1).normal(size=(num_rows, 588)).astype("float32")
    expected = x @ _numpy(layer.kernel) + _numpy(layer.bias)
    np.testing.assert_allclose(_numpy(layer(x)), expected, atol=1e-4)


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="a way of torch")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("num_rows", [1, 8])
def test_products_that_torch_compiles_for_a_gpu(num_rows, scheme, monkeypatch):
    monkeypatch.setattr(_backend, "int4_tile", lambda codes, dtype: None)
    layer, _ = _linear((588, 200), "float32", **SCHEMES[scheme])
    x = np.random.default_rng(1).normal(size=(num_rows, 588)).astype("float32")
    expected = x @ _numpy(layer.kernel) + _numpy(layer.bias)
    monkeypatch.setattr(_backend, "is_compiled_for_cuda", lambda x: True)
    monkeypatch.setattr(layer.quantized, "_multiply_decoded", None)  # another way
    np.testing.assert_allclose(_in_program(layer, x), expected, atol=1e-4)


@pytest.fixture
def int4_of_a_gpu(monkeypatch):
    """torch's product of int4 on a GPU, imitated, with its half bytes in some order."""
    import torch

    order = torch.randperm(8 * 128, generator=torch.Generator().manual_seed(1))

    def pack(codes, inner_tiles):
        codes = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1)
        tiles = codes.view(len(codes) // 8, 8, -1, 128).transpose(1, 2).flatten(2)[..., order]
        packed = (tiles[..., ::2] | tiles[..., 1::2] << 4).contiguous()
        return packed.view(torch.int32).view(*packed.shape[:2], 32, inner_tiles // 2)

    def multiply(x, packed, group_size, scales):
        packed = packed.contiguous().view(torch.uint8).flatten(2)
        tiles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(2)[..., order.argsort()]
        codes = tiles.view(*tiles.shape[:2], 8, 128).transpose(1, 2).flatten(2).flatten(0, 1)
        scale, offset = scales.float().permute(2, 1, 0)[..., None]
        matrix = (codes.view(len(codes), -1, group_size).float() - 8) * scale + offset
        return (x.float() @ matrix.flatten(1).t()).to(x.dtype)

    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", pack)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", multiply)
    _backend._cuda_int4_tile.cache_clear()
    yield monkeypatch
    _backend._cuda_int4_tile.cache_clear()


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="a way of torch")
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(100, 96), (256, 256), (70, 380)])
def test_the_layout_of_int4_on_a_gpu(int4_of_a_gpu, shape, group_size):
    import torch

    tile = _backend._cuda_int4_tile(torch.device("cpu"))
    assert tile.shape == (8, 128)
    plain, tiled = (
        quantization.QuantizedMatrix(*shape, "int4", group_size, dtype="bfloat16") for _ in "ab"
    )
    values = np.random.default_rng(0).normal(size=shape).astype("float32")
    for matrix, layout in ((plain, None), (tiled, tile)):
        int4_of_a_gpu.setattr(_backend, "int4_tile", lambda codes, dtype, layout=layout: layout)
        matrix.build()
        matrix.assign(*matrix.encode(values))
        assert matrix._tile is layout
    plain.assign(*plain.encode(values))  # in the layout that it has
    assert torch.equal(tiled.values("float32"), plain.values("float32"))
    rows = torch.tensor([[3, 9, shape[0] - 1]])
    assert torch.equal(tiled.take(rows), plain.take(rows))
    stores = {}, {}
    plain.save_own_variables(stores[0])
    tiled.save_own_variables(stores[1])
    np.testing.assert_array_equal(stores[0]["codes"], stores[1]["codes"])
    for num_rows in (1, 3, 65):
        x = torch.randn(num_rows, shape[1], dtype=torch.bfloat16)
        with torch.inference_mode():
            product = tiled.multiply(x, in_float32=True)
        expected = x.float() @ plain.values("float32").t()
        assert (product - expected).norm() < (0.01 if num_rows > 64 else 1e-5) * expected.norm()


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="a way of torch")
def test_a_gpu_whose_int4_is_not_as_expected(int4_of_a_gpu):
    import torch

    cpu = torch.device("cpu")
    int4_of_a_gpu.setattr(torch, "_weight_int4pack_mm", lambda x, packed, *_: x @ x.t())
    assert _backend._cuda_int4_tile(cpu) is None

    def refuse(*_):
        raise RuntimeError("needs compute capability 8.0")

    _backend._cuda_int4_tile.cache_clear()
    int4_of_a_gpu.setattr(torch, "_convert_weight_to_int4pack", refuse)
    assert _backend._cuda_int4_tile(cpu) is None


@pytest.mark.slow  # with XLA's optimizations alone
@pytest.mark.parametrize("num_rows", [1, 64, 65])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_memory_of_decoded_parts(num_rows, mode):
    """Of six matrices, 96 MiB in float32, with which XLA multiplies on a CPU."""
    if _backend.BACKEND != "jax":
        pytest.skip("jax only: it tells what a program needs")
    import jax

    shapes = [(1024, 4096), (4096, 1024)] * 3
    layers = [_linear(shape, "float32", mode=mode)[0] for shape in shapes]

    def program(x):
        for layer in layers:
            x = layer(x)
        return x

    with jax.default_device(jax.devices("cpu")[0]):
        compiled = jax.jit(program).lower(np.ones((num_rows, 1024), "float32")).compile()
    is_few = num_rows <= _backend.MAX_QUANTIZED_ROWS[mode]
    part = 4 * min(quantization._MAX_DECODED_ON_CPU[is_few], 1024 * 4096)
    activations = 8 * 4 * num_rows * 4096
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * part + activations


def test_a_large_matrix_is_decoded_in_parts():
    rng = np.random.default_rng(0)
    layer = Linear(3000, use_bias=False, dtype="float32")
    layer.build((None, 1024))
    layer.kernel.assign(rng.normal(size=(1024, 3000)))
    layer.quantize("int4")
    x = rng.normal(size=(20, 1024)).astype("float32")
    np.testing.assert_allclose(_numpy(layer(x)), x @ _numpy(layer.kernel), atol=2e-3)


@pytest.mark.skipif(_backend.BACKEND != "jax", reason="XLA compiles for TPUs with jax alone")
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_tpu_decodes_no_parts(mode, monkeypatch):
    """Of rows that are spread over chips it would gather parts."""
    import jax

    matrix = quantization.QuantizedMatrix(300, 128, mode, 64, dtype="bfloat16")
    matrix.build()

    def there_and_back(x, codes, scales):
        return matrix.multiply_back(matrix.multiply_unrounded(x, codes, scales), codes, scales)

    def program_for(platform):
        variables = (matrix.codes.value, matrix.scales.value)
        program = jax.jit(lambda *args: there_and_back(*args))  # jax keeps traces of a function
        traced = program.trace(np.zeros((65, 128)), *variables)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    platforms = ("tpu", "cuda")
    whole = {platform: program_for(platform) for platform in platforms}
    for name in ("_MAX_DECODED", "_MAX_DECODED_BACK"):
        monkeypatch.setattr(quantization, name, 100 * 128)
    is_same = {platform: program_for(platform) == whole[platform] for platform in platforms}
    assert is_same == {"tpu": True, "cuda": False}


def test_equal_weights():
    """A group without any difference, and one of zeros."""
    layer = Linear(64, use_bias=False, dtype="float32")
    layer.build((None, 64))
    kernel = np.zeros((64, 64))
    kernel[:32] = 0.75
    layer.kernel.assign(kernel)
    layer.quantize(**_int4(32))
    np.testing.assert_array_equal(_numpy(layer.kernel), kernel)


def test_torch_has_its_product_of_int4():
    """Otherwise the tests above say nothing of it."""
    if _backend.BACKEND != "torch":
        pytest.skip("torch only")
    import torch

    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs a CPU with AVX2")
    layer, _ = _linear((256, 128), "bfloat16", mode="int4")
    tile = layer.quantized._tile
    assert tile in (32, 64)
    codes = layer.quantized.codes.value
    values = _backend.unpack_int4(codes, tile)
    halves = values.view(len(values), 2, -1, codes.shape[2])
    plain = (halves[:, 0] | halves[:, 1] << 4).transpose(0, 1).contiguous()
    assert not torch.equal(codes, plain)
    assert torch.equal(_backend.unpack_int4(plain), values)
    assert torch.equal(_backend.tile_int4(plain, tile), codes)
    scales = layer.quantized.scales.value
    scale, offset = scales.float().repeat_interleave(codes.shape[2], 0).unbind(-1)
    decoded = _backend.decode_int4(codes, scales, tile, "float32")
    torch.testing.assert_close(decoded, (values - 8.0) * scale.T + offset.T, atol=0, rtol=1e-6)
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    with torch.inference_mode():
        products = _backend.int4_product(x, codes, scales, tile)
    expected = _numpy(layer.kernel).sum(axis=0)
    np.testing.assert_allclose(_numpy(products), [expected, expected], atol=0.1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(scheme, dtype):
    rng = np.random.default_rng(0)
    layer = TokenEmbedding(700, 96, dtype=dtype, name="embedding")
    layer.build()
    layer.embeddings.assign(rng.normal(size=(700, 96)))
    layer.quantize(**SCHEMES[scheme])
    matrix = layer.quantized.take(ops.arange(700))
    np.testing.assert_allclose(_numpy(layer.matrix()), _numpy(matrix), rtol=0.01, atol=0.01)
    for token_ids in (np.array([[0, 5, 70], [699, 31, 33]]), np.array([[699]])):
        embedded = _in_program(layer, token_ids)
        np.testing.assert_allclose(embedded, _numpy(matrix)[token_ids] * 96**0.5, rtol=0.005)
    x = _numpy(ops.cast(rng.normal(size=(2, 96)), "bfloat16"))
    logits = _in_program(lambda x: layer(x, reverse=True), x)
    expected = x @ _numpy(matrix).T
    np.testing.assert_allclose(logits, expected, atol=0.01 if dtype == "float32" else 0.2)
    best = np.argsort(-expected)[:, :100]
    if _backend.BACKEND == "torch" and dtype == "bfloat16":  # the largest are not rounded
        close = np.take_along_axis(logits - expected, best, axis=1)
        np.testing.assert_allclose(close, 0, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_of_the_input(scheme):
    layer, _ = _linear((588, 200), "float32", **SCHEMES[scheme])
    x = np.random.default_rng(1).normal(size=(4, 588)).astype("float32")
    expected = np.ones((4, 200)) @ _numpy(layer.kernel).T
    if _backend.BACKEND == "torch":
        import torch

        tensor = torch.tensor(x, requires_grad=True)
        layer(tensor).sum().backward()
        gradient = tensor.grad.numpy()
    elif _backend.BACKEND == "jax":
        import jax

        gradient = jax.grad(lambda x: layer(x).sum())(x)
    else:
        import tensorflow as tf

        tensor = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(tensor)
            total = tf.reduce_sum(layer(tensor))
        gradient = tape.gradient(total, tensor)
    np.testing.assert_allclose(_numpy(gradient), expected, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8", "int4/32"])
def test_layer_files(scheme, tmp_path):
    layers = []
    for seed in (0, 1):
        model = keras.Sequential([keras.Input((588,)), Linear(200, dtype="bfloat16")])
        model.layers[0].kernel.assign(np.random.default_rng(seed).normal(size=(588, 200)))
        model.layers[0].quantize(**SCHEMES[scheme])
        layers.append(model)
    layers[0].save_weights(tmp_path / "model.weights.h5")
    layers[1].load_weights(tmp_path / "model.weights.h5")
    x = np.ones((2, 588), "float32")
    np.testing.assert_array_equal(_numpy(layers[1](x)), _numpy(layers[0](x)))
    plain = keras.Sequential([keras.Input((588,)), Linear(200)])
    with pytest.raises(ValueError, match=r"is not quantized\. Load a file into"):
        plain.load_weights(tmp_path / "model.weights.h5")


def test_files_of_another_quantization(tmp_path):
    path = tmp_path / "model.weights.h5"
    models = {}
    for scheme in SCHEMES:
        models[scheme] = keras.Sequential([keras.Input((588,)), Linear(200)])
        models[scheme].layers[0].quantize(**SCHEMES[scheme])
    models["int4"].save_weights(path)
    with pytest.raises(ValueError, match=r"quantized to 'int8'\. Quantize the model as the one"):
        models["int8"].load_weights(path)
    with pytest.raises(ValueError, match=r"quantized to 'int4' with `block_size` 32\. Quantize"):
        models["int4/32"].load_weights(path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_symbolic_pass_changes_nothing(scheme):
    """Keras makes one before `fit` with a loss of one's own; torch's tensors are then nowhere."""
    layer, other = (_linear((588, 200), "bfloat16", **SCHEMES[scheme])[0] for _ in "ab")

    class Outer(keras.layers.Layer):
        def call(self, x):
            return layer(x)

    assert Outer().compute_output_spec(keras.KerasTensor((3, 588))).shape == (3, 200)
    x = np.random.default_rng(1).normal(size=(3, 588)).astype("float32")
    np.testing.assert_array_equal(_numpy(layer(x)), _numpy(other(x)))
    np.testing.assert_array_equal(_numpy(layer.kernel), _numpy(other.kernel))


def test_layer_errors():
    with pytest.raises(ValueError, match="Build the layer 'layer' before `quantize`"):
        Linear(5, name="layer").quantize("int8")
    layer, _ = _linear((64, 64), "float32")
    with pytest.raises(
        ValueError, match=r"`mode` must be 'int8' or 'int4'\. Received: mode='float8'"
    ):
        layer.quantize("float8")
    with pytest.raises(ValueError, match=r"must be one of \(32, 64, 128, 256\). Received: .*=48"):
        layer.quantize(**_int4(48))
    quantizer = keras.quantizers.AbsMaxQuantizer(axis=0)
    config = keras.quantizers.Int8QuantizationConfig(weight_quantizer=quantizer)
    with pytest.raises(ValueError, match="`weight_quantizer` has no effect here"):
        layer.quantize(config=config)
    layer.quantize("int8")
    with pytest.raises(ValueError, match="'layer' is quantized to int8 already"):
        layer.quantize("int4")


@pytest.mark.parametrize(
    ("mode", "config", "message"),
    [
        (None, None, r"`mode` must be 'int8' or 'int4'\. Received: mode=None"),
        ("int8", _int4(64)["config"], r"that of `config`, 'int4', or None\. Received: mode='int8'"),
        ("int8", "int8", r"`config` must be a .*QuantizationConfig.* Received: config='int8'"),
    ],
)
def test_arguments_that_name_no_scheme(mode, config, message):
    with pytest.raises(ValueError, match=message):
        quantization.scheme_of(mode, config)


def test_a_config_names_the_mode():
    assert quantization.scheme_of(None, _int4(64)["config"]) == ("int4", 64)


# The model


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 255, (112, 112, 3), "uint8")


@pytest.fixture
def inputs(image):
    images = image[None].astype("float32") / 127.5 - 1
    return {"images": images, "token_ids": np.array([[2, 300, 500, 700]], "int32")}


@pytest.mark.slow_if_compiled
@pytest.mark.parametrize("scheme", ["int8", pytest.param("int4/32", marks=pytest.mark.slow)])
def test_loading_is_like_quantizing_later(scheme, inputs, tmp_path):
    plain = keras_pg2.PaliGemma2.from_preset(TINY, dtype="float32")
    options = SCHEMES[scheme]
    loaded = keras_pg2.PaliGemma2.from_preset(
        TINY, dtype="float32", quantize=next(iter(options.values()))
    )
    expected = logits_of(plain, inputs)
    plain.quantize(**options)
    later, at_once = logits_of(plain, inputs), logits_of(loaded, inputs)
    np.testing.assert_array_equal(at_once, later)
    assert 0 < np.abs(later - expected).max() < (1 if scheme == "int8" else 6)
    # Everything but norms, biases and positions is quantized.
    left = [v.path for v in loaded.variables if v.dtype == "float32" and len(v.shape) > 1]
    assert [path.rpartition("/")[2] for path in left] == ["position_embedding"]
    loaded.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(logits_of(restored, inputs), at_once)
    assert restored.text.blocks[0].mlp.up.quantized.group_size == (None if scheme == "int8" else 32)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4/32"])
def test_a_batch_answers_as_its_images_alone(scheme):
    """The widths are whole pairs of groups of 32, as those of the published models of 128."""
    options = SCHEMES[scheme]
    model = keras_pg2.PaliGemma2.from_preset(
        TINY,
        dtype="bfloat16" if _backend.BACKEND == "torch" else "float32",
        quantize=options.get("config", options.get("mode")),
    )
    images = list(keras_pg2.tiny.SAMPLES.values())
    alone = [model.generate(image, "caption en", details=True) for image in images]
    for count in (2, 5):
        batch = model.generate(images[:count], "caption en", details=True)
        for answer, expected in zip(batch, alone):
            assert answer.text == expected.text
            np.testing.assert_allclose(answer.log_probs, expected.log_probs, atol=0.05)


@pytest.mark.parametrize("mode", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_clone_and_weights(mode, inputs):
    """Keras' own copies."""
    model = keras_pg2.PaliGemma2.from_preset(TINY, quantize=mode)
    clone = keras.models.clone_model(model)
    weights = model.get_weights()
    clone.set_weights(weights)
    np.testing.assert_array_equal(logits_of(clone, inputs), logits_of(model, inputs))
    # Codes are as in files, whatever their layout in memory, so other backends may take them.
    matrix = clone.text.blocks[0].mlp.up.quantized
    place = next(i for i, v in enumerate(clone.weights) if v is matrix.codes)
    stored = {}
    matrix.save_own_variables(stored)
    np.testing.assert_array_equal(weights[place], stored["codes"])
    with pytest.raises(ValueError, match="shape"):
        clone.set_weights([np.zeros((2, 2))] * len(weights))
    with pytest.raises(ValueError, match="weights"):
        clone.set_weights(weights[:-1])


def test_a_file_is_read_without_unquantized_matrices(tmp_path, monkeypatch):
    model = keras_pg2.PaliGemma2.from_preset(TINY, quantize="int8")
    model.save(tmp_path / "model.keras")
    make_quantized, had_values = quantization.Quantizable.make_quantized, []

    def watched(layer, **options):
        had_values.append(getattr(layer, f"_{layer.matrix_name}")._value is not None)
        make_quantized(layer, **options)

    monkeypatch.setattr(quantization.Quantizable, "make_quantized", watched)
    keras.saving.load_model(tmp_path / "model.keras")
    assert len(had_values) == len(model._quantized_layers())
    assert not any(had_values)


def test_scales_stay_frozen():
    model = keras_pg2.PaliGemma2.from_preset(TINY, quantize="int8")
    model.freeze()
    model.unfreeze("^text/")
    paths = [v.path for v in model.trainable_variables]
    assert paths
    assert not any("/quantized/" in path for path in paths)


def test_the_matrices_are_freed():
    model = keras_pg2.PaliGemma2.from_preset("paligemma2-tiny-digits-112")
    layers = model._quantizable_layers().values()
    matrices = [weakref.ref(getattr(layer, f"_{layer.matrix_name}")) for layer in layers]
    model.quantize("int8")
    gc.collect()
    assert matrices
    assert all(matrix() is None for matrix in matrices)


@pytest.mark.parametrize("quantize", [True, 8, "int3", "INT8"])
def test_other_schemes(quantize):
    """Before a file is looked for."""
    with pytest.raises(ValueError, match=rf"or a `keras.*Received: quantize={quantize!r}"):
        keras_pg2.PaliGemma2.from_preset("nowhere", quantize=quantize)


@pytest.mark.slow_if_compiled
def test_filters_match_paths(image):
    model = keras_pg2.PaliGemma2.from_preset(TINY)
    model.quantize("int8", filters="^vision/.*mlp")
    vision, text = model.vision.blocks[0], model.text.blocks[0]
    assert vision.mlp.up.quantization_mode == "int8"
    assert vision.attention.query.quantization_mode is None
    model.quantize("int4", filters=["^text/", "projector"])
    assert text.mlp.up.quantization_mode == "int4"
    assert model.text.embedding.quantization_mode == "int4"
    model.quantize("int8", filters=lambda layer: layer.name == "query")
    assert vision.attention.query.quantization_mode == "int8"
    assert text.attention.query.quantization_mode == "int4"
    assert isinstance(model.caption(image), str)
    with pytest.raises(ValueError, match="must match a layer that is not quantized yet"):
        model.quantize("int8", filters="^text/")
    with pytest.raises(ValueError, match=r"`filters` must be a regular expression.*'\['"):
        model.quantize("int8", filters=["vision", "["])
    model.quantize("int8")
    with pytest.raises(ValueError, match="All layers that can be quantized are so already"):
        model.quantize("int4")
    with pytest.raises(ValueError, match=r"that can be trained, such as \['vision/.*'codes'"):
        model.freeze("codes")
    with pytest.raises(ValueError, match="cannot be written in this format"):
        model.save_to_preset("nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_lora_on_a_quantized_model(mode, image):
    model = keras_pg2.PaliGemma2.from_preset(TINY, dtype="float32", quantize=mode)
    before = {path: _numpy(v) for path, v in model.variables_by_path().items()}
    model.enable_lora(4)
    model.compile(keras.optimizers.Adam(0.01))
    examples = [{"images": image, "prompts": "answer en what?", "responses": "no"}] * 2
    history = model.fit(examples, batch_size=2, epochs=6, verbose=0)
    losses = history.history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    for path, value in before.items():
        np.testing.assert_array_equal(_numpy(model.variables_by_path()[path]), value, err_msg=path)
    assert model.answer(image, "what?") == "no"


def _micro_model():
    vision = keras_pg2.SiglipConfig(width=12, depth=1, mlp_dim=20, num_heads=3, image_size=28)
    text = dict(width=16, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=6)
    text = keras_pg2.GemmaConfig(**text, query_pre_attn_scalar=6, vocab_size=50)
    return keras_pg2.PaliGemma2(keras_pg2.PaliGemmaConfig(vision, text), dtype="float32")


def _tokenized(count, length):
    rng = np.random.default_rng(0)
    mask = np.ones((count, length), bool)
    return {
        "images": rng.uniform(-1, 1, (count, 28, 28, 3)).astype("float32"),
        "token_ids": rng.integers(3, 50, (count, length)).astype("int32"),
        "padding_mask": mask,
        "suffix_mask": mask & (np.arange(length) > 4),
    }


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_predict_with_a_smaller_last_batch(mode):
    """After it TensorFlow no longer knows the length of a batch."""
    model, inputs = _micro_model(), _tokenized(5, 8)
    model.quantize(mode)
    logits = model.predict(inputs, batch_size=2, verbose=0)
    np.testing.assert_allclose(logits, _numpy(model(inputs)), atol=1e-5)


@pytest.mark.slow_if_compiled
@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_export(tmp_path, mode):
    """What is exported without a signature takes any number of examples, with torch one."""
    model, inputs = _micro_model(), _tokenized(3, 128)
    if mode:
        model.quantize(mode)
    if _backend.BACKEND == "torch":
        import torch

        inputs = {name: array[:1] for name, array in inputs.items()}
        model.export(tmp_path / "model.pt2", format="torch", verbose=False)
        exported = torch.export.load(tmp_path / "model.pt2").module()
        logits = exported({name: torch.as_tensor(array) for name, array in inputs.items()})
        logits = logits.detach()
    else:
        tf = pytest.importorskip("tensorflow")
        model.export(tmp_path / "model", verbose=False)
        exported = tf.saved_model.load(tmp_path / "model")
        logits = exported.serve({name: tf.constant(array) for name, array in inputs.items()})
    np.testing.assert_allclose(logits, _numpy(model(inputs)), atol=1e-4)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_quantization_loses_nothing(monkeypatch, error):
    keras.utils.set_random_seed(0)
    model = _micro_model()
    before = {path: _backend.to_numpy(v) for path, v in model.variables_by_path().items()}
    encode, calls = quantization.QuantizedMatrix.encode, []

    def interrupted(self, values):
        calls.append(self)
        if len(calls) == 3:
            raise error
        return encode(self, values)

    monkeypatch.setattr(quantization.QuantizedMatrix, "encode", interrupted)
    with pytest.raises(error):
        model.quantize("int8")
    layers = model._quantized_layers()
    assert len(layers) == 2
    for path, variable in model.variables_by_path().items():
        if "/quantized/" not in path:
            np.testing.assert_array_equal(_backend.to_numpy(variable), before[path])
    assert len(model.variables) == len(before) + 2  # two codes and scales for two kernels
    model.quantize("int8")
    keras.utils.set_random_seed(0)
    whole = _micro_model()
    whole.quantize("int8")
    expected = {path: _backend.to_numpy(v) for path, v in whole.variables_by_path().items()}
    found = {path: _backend.to_numpy(v) for path, v in model.variables_by_path().items()}
    assert set(found) == set(expected)
    assert all((found[path] == expected[path]).all() for path in expected)
