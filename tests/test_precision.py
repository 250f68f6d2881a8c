"""bfloat16 stays near float32; float16 does not overflow where a naive forward pass does."""

import contextlib
import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_pg2 import PaliGemma2, _backend
from keras_pg2.attention import attention
from keras_pg2.linear import Linear, activation_dtype
from keras_pg2.siglip import LayerNorm
from tests.conftest import logits_of

# Root mean square of the error of the logits, relative to that of the logits. The tiny weights are
# random and amplify rounding: transformers' own bfloat16 has 0.06 on one example of theirs.
BOUNDS = {"bfloat16": 0.3, "mixed_bfloat16": 0.3, "float16": 0.02, "mixed_float16": 0.02}


def _rms(x):
    return np.sqrt(np.mean(np.square(x, dtype="float64")))


def _logits(model, inputs):
    logits = logits_of(model, inputs)
    assert logits.dtype == "float32"
    return logits[inputs["padding_mask"]]


@pytest.mark.parametrize("checkpoint", ["hf_tiny_paligemma1", "hf_tiny_paligemma2"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_error_bounds(data, inputs, checkpoint, dtype):
    expected = _logits(PaliGemma2.from_preset(data / checkpoint, dtype="float32"), inputs)
    model = PaliGemma2.from_preset(data / checkpoint, dtype=dtype)
    is_mixed = dtype.startswith("mixed")
    assert {v.dtype for v in model.variables} == {"float32" if is_mixed else dtype}
    assert _rms(_logits(model, inputs) - expected) < BOUNDS[dtype] * _rms(expected)


def test_bfloat16_is_about_as_close_as_transformers(data):
    golden = data / "hf_tiny_paligemma2_bf16"
    exact = np.load(golden / "expected_float32_compute.npz")
    theirs = np.load(golden / "expected_bfloat16_compute.npz")["logits_from_last_prefix"][:, :1664]
    expected = exact["logits_from_last_prefix"][:, :1664]
    model = PaliGemma2.from_preset(golden, dtype="bfloat16")
    inputs = {
        "images": exact["pixel_values"].transpose(0, 2, 3, 1),
        "token_ids": exact["input_ids"][:, 9:],
        "suffix_mask": exact["token_type_ids"][:, 9:],
    }
    logits = logits_of(model, inputs)[0, -len(expected) :]
    # One example, and rounding is luck: other orders of summation give 0.7 to 1.6.
    assert _rms(logits - expected) < 2 * _rms(theirs - expected)


@pytest.mark.parametrize("policy", ["float32", *BOUNDS])
def test_layer_norms_are_computed_in_float32(policy, run_in_program):
    layer = LayerNorm(epsilon=1e-6, dtype=policy, autocast=False)
    layer.build((None, None, 64))
    rng = np.random.default_rng(0)
    for variable in layer.weights:
        variable.assign(rng.normal(size=64))
    gamma, beta = (ops.convert_to_numpy(ops.cast(v, "float32")) for v in layer.weights)
    dtype = activation_dtype(layer.compute_dtype)
    x = ops.cast(300 + rng.normal(size=(2, 5, 64)), dtype)  # in 16 bits the mean would swallow it
    exact = ops.convert_to_numpy(ops.cast(x, "float32")).astype("float64")
    centered = exact - exact.mean(axis=-1, keepdims=True)
    normalized = centered / np.sqrt(exact.var(axis=-1, keepdims=True) + 1e-6)
    output = run_in_program(layer.__call__)(x)
    # Rounded once, as what the policy computes in.
    epsilon = {"float32": 2**-12, "bfloat16": 2**-8, "float16": 2**-11}[layer.compute_dtype]
    expected = normalized * gamma + beta
    output = ops.convert_to_numpy(ops.cast(output, "float32"))
    assert np.all(np.abs(output - expected) <= 1e-3 + epsilon * np.abs(expected))


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="torch alone takes parts")
@pytest.mark.parametrize("shape", [(3, 7, 8), (21, 8), (3, 1, 8)])
def test_rms_norms_of_parts_are_those_of_the_whole(monkeypatch, shape):
    x = ops.cast(np.random.default_rng(0).normal(size=shape), "bfloat16")
    scale = ops.cast(np.linspace(-1, 1, 8), "bfloat16")
    expected = _backend.rms_normalize(x, scale, 1e-6)
    parts, normalize = [], _backend._torch_rms_normalize

    def recorded(scale, eps, x):
        parts.append(x.shape)
        return normalize(scale, eps, x)

    monkeypatch.setattr(_backend, "_torch_rms_normalize", recorded)
    monkeypatch.setattr(_backend, "_MAX_NORMALIZED", 3 * 2 * 8)
    output = _backend.rms_normalize(x, scale, 1e-6)
    assert len(parts) == (4 if shape == (3, 7, 8) else 1)
    np.testing.assert_array_equal(output.float().numpy(), expected.float().numpy())


def _scale(model, path, factor):
    variable = model.variables_by_path()[path]
    variable.assign(ops.cast(variable, "float32") * factor)


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16"])
def test_wide_gates_in_float16(data, inputs, dtype):
    """The norm after the MLP cancels a factor, but the gate times it exceeds 65,504."""
    expected = _logits(PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32"), inputs)
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype=dtype)
    for block in range(4):
        _scale(model, f"text/block_{block}/mlp/up/kernel", 3e4)
    assert _rms(_logits(model, inputs) - expected) < BOUNDS[dtype] * _rms(expected)


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16"])
@pytest.mark.parametrize(
    ("checkpoint", "path", "factor"),
    [
        ("hf_tiny_paligemma2", "text/block_0/post_mlp_norm/scale", 4e4),
        ("hf_tiny_paligemma1", "text/block_0/mlp/down/kernel", 2e4),
        ("hf_tiny_paligemma2", "vision/block_0/mlp/down/kernel", 2e4),
    ],
)
def test_wide_residual_stream_in_float16(data, inputs, dtype, checkpoint, path, factor):
    """The residual stream exceeds 65,504, as in the published models."""
    exact = PaliGemma2.from_preset(data / checkpoint, dtype="float32")
    _scale(exact, path, factor)
    # The float16 file of such a model holds what the float32 one does.
    value = ops.convert_to_numpy(exact.variables_by_path()[path])
    exact.variables_by_path()[path].assign(value.astype("float16").astype("float32"))
    assert np.abs(_stream(exact, inputs, path.split("/")[0])).max() > 65_504
    model = PaliGemma2.from_preset(data / checkpoint, dtype=dtype)
    model.variables_by_path()[path].assign(value.astype("float16"))
    logits, expected = _logits(model, inputs), _logits(exact, inputs)
    assert np.isfinite(logits).all()
    assert _rms(logits - expected) < 2 * BOUNDS[dtype] * _rms(expected)


def _stream(model, inputs, tower):
    """The residual stream after the first block."""
    seen = []
    block = getattr(model, tower).blocks[0]
    call = block.call

    def spy(*args, **kwargs):
        outputs = call(*args, **kwargs)
        seen.append(outputs[0] if tower == "text" else outputs)
        return outputs

    block.call = spy
    model(inputs)
    block.call = call
    return ops.convert_to_numpy(seen[0])


@pytest.mark.parametrize(
    ("default", "pattern", "dtype"),
    [
        ("float32", "paligemma2/text/block_1/.*", "bfloat16"),
        ("float32", "paligemma2/vision/block_1/.*", "bfloat16"),
        ("float32", ".*/up", "bfloat16"),
        ("bfloat16", "paligemma2/text/embedding", "float32"),
    ],
)
def test_dtypes_of_single_layers(data, inputs, default, pattern, dtype):
    policy = keras.dtype_policies.DTypePolicyMap(default_policy=default)
    policy[pattern] = keras.DTypePolicy(dtype)
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype=policy)
    values = {ops.dtype(v.value) for v in model.variables}
    assert values == {v.dtype for v in model.variables} == {"float32", "bfloat16"}
    expected = _logits(PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32"), inputs)
    error = _rms(_logits(model, inputs) - expected)
    assert 0 < error < BOUNDS["bfloat16"] * _rms(expected)
    dtypes = {path: layer.compute_dtype for path, layer in model._quantizable_layers().items()}
    model.quantize("int8")
    for path, layer in model._quantizable_layers().items():
        assert layer.quantized.compute_dtype == layer.compute_dtype == dtypes[path]


def test_a_cache_of_another_dtype(run_in_program):
    def function(buffer, values):
        return _backend.write_cache(buffer, values, 3)

    buffer, values = np.zeros((1, 2, 5, 4), "float32"), np.full((1, 2, 1, 4), 0.5, "float16")
    written = run_in_program(function, in_parts=True)(*map(ops.convert_to_tensor, (buffer, values)))
    buffer[:, :, 3] = 0.5
    np.testing.assert_array_equal(ops.convert_to_numpy(written), buffer)


@pytest.mark.skipif(_backend.BACKEND == "tensorflow", reason="it has no default device per thread")
def test_threads_use_the_device_of_their_caller():
    name = {"torch": "meta", "jax": "cpu:0"}[_backend.BACKEND]

    def default_device():
        if _backend.BACKEND == "torch":
            return ops.zeros(1).device.type
        import jax

        return jax.config.jax_default_device

    with keras.device(name):
        expected = default_device()
        places = list(_backend.prefetch(default_device, [()] * 4, threads=2))
    assert expected is not None
    assert places == [expected] * 4


def test_linear_in_float16():
    """Rows of any size, each scaled by its own power of two."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4, 64)).astype("float32") * np.array([[1e-3], [1.0], [1e5], [1e9]])
    layer = Linear(32, dtype="float16")
    layer.build((None, 64))
    kernel = ops.convert_to_numpy(layer.kernel).astype("float32")
    outputs = layer(ops.convert_to_tensor(rows.astype("float32")))
    assert ops.dtype(outputs) == "float32"
    outputs, expected = ops.convert_to_numpy(outputs), rows @ kernel
    error = np.abs(outputs - expected).max(axis=1) / np.abs(expected).max(axis=1)
    assert (error < 5e-3).all()
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(np.zeros((1, 64)))), 0)


@pytest.mark.slow_if_compiled
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_generation_in_low_precision(data, model, image, dtype):
    """The cache is in the compute dtype; cached and uncached still agree."""
    low = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype=dtype)
    answer = low.generate(image, "ocr", max_new_tokens=5, details=True)
    x = low.preprocessor.for_generation([[image]], ["ocr"])
    length = x["token_ids"].shape[1]
    x["token_ids"] = np.append(x["token_ids"], [answer.token_ids], axis=1)
    x["suffix_mask"] = np.arange(length + 5)[None] >= length
    del x["padding_mask"]
    log_probs = ops.convert_to_numpy(ops.log_softmax(low(x), axis=-1))[0]
    expected = [log_probs[length - 1 + i, token] for i, token in enumerate(answer.token_ids)]
    np.testing.assert_allclose(answer.log_probs, expected, atol=0.5 if dtype == "bfloat16" else 0.1)


@contextlib.contextmanager
def _floatx(name):
    before = keras.config.floatx()
    keras.config.set_floatx(name)
    try:
        yield
    finally:
        keras.config.set_floatx(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "backend", "dtype"),
    [
        ("floatx", _backend.BACKEND, "float32"),
        ("x64", "jax", "float32"),
        ("autocast", "torch", "bfloat16"),
    ],
)
def test_settings_of_a_process(data, image, setting, backend, dtype):
    if backend != _backend.BACKEND:
        pytest.skip(f"a setting of {backend}")

    def answers():
        model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype=dtype)
        options = {"max_new_tokens": 4, "seed": 1}
        found = model.detect(image, "cat", constrained=True, sampler="beam", **options)
        sampled = model.generate(image, "ocr", sampler="top_p", **options)
        return [found.text, sampled], model.score(image, "ocr", ["a", "b"])

    expected, scores = answers()
    contexts = {
        "floatx": lambda: _floatx("bfloat16"),
        "x64": lambda: pytest.importorskip("jax").enable_x64(True),
        "autocast": lambda: pytest.importorskip("torch").autocast("cpu"),
    }
    with contexts[setting]():
        texts, others = answers()
    assert texts == expected
    np.testing.assert_allclose(others, scores, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "backend", "dtype"),
    [
        ("bfloat16", _backend.BACKEND, "float32"),
        ("float16", _backend.BACKEND, "float32"),
        ("autocast", "torch", "float32"),
        ("autocast", "torch", "mixed_bfloat16"),
        ("autocast", "torch", "mixed_float16"),
    ],
)
def test_settings_of_training(data, image, setting, backend, dtype):
    if backend != _backend.BACKEND:
        pytest.skip(f"a setting of {backend}")
    examples = [{"image": image, "prefix": "ocr", "suffix": "a b"}] * 1600

    def losses():
        model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype=dtype)
        model.preprocessor.sequence_length = 8
        model.compile(keras.optimizers.SGD(0.0))
        history = model.fit(examples, batch_size=16, verbose=0).history
        return [*history["loss"], *model.evaluate(examples[:32], verbose=0)]

    def context():
        if setting == "autocast":
            torch = pytest.importorskip("torch")
            other = {"mixed_bfloat16": torch.float16}.get(dtype, torch.bfloat16)
            return torch.autocast("cpu", other)
        return _floatx(setting)

    expected = losses()
    with context():
        np.testing.assert_allclose(losses(), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("num_rows", [1, 3, 16])
def test_logits_are_not_rounded(dtype, num_rows):
    """A bfloat16 near 10 is off by up to 0.03."""
    rng = np.random.default_rng(0)
    x = ops.cast(rng.normal(size=(num_rows, 64)) * 3, dtype)
    matrix = ops.cast(rng.normal(size=(300, 64)), dtype)
    x64, matrix64 = (ops.convert_to_numpy(ops.cast(t, "float32")) for t in (x, matrix))
    logits = _backend.to_numpy(_program(_backend.matmul_transposed_float32, x, matrix))
    assert logits.dtype == "float32"
    np.testing.assert_allclose(logits, x64 @ matrix64.T, atol=1e-3)


def test_all_logits_may_be_exact():
    rng = np.random.default_rng(0)
    x = ops.cast(rng.normal(size=(1, 64)) * 3, "bfloat16")
    matrix = ops.cast(rng.normal(size=(2000, 64)), "bfloat16")
    product = functools.partial(_backend.matmul_transposed_float32, all_exact=True)
    logits = _program(product, x, matrix)
    expected = ops.matmul(ops.cast(x, "float32"), ops.transpose(ops.cast(matrix, "float32")))
    np.testing.assert_allclose(*map(ops.convert_to_numpy, (logits, expected)), atol=1e-3)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_the_largest_of_many_logits_are_not_rounded(num_rows):
    """A vocabulary so large that torch looks for the largest block by block."""
    rng = np.random.default_rng(0)
    x = ops.cast(rng.normal(size=(num_rows, 16)) * 3, "bfloat16")
    matrix = ops.cast(rng.normal(size=(128 * 600, 16)), "bfloat16")
    logits = _backend.to_numpy(_program(_backend.matmul_transposed_float32, x, matrix))
    x64, matrix64 = (ops.convert_to_numpy(ops.cast(t, "float32")) for t in (x, matrix))
    expected = x64 @ matrix64.T
    for row, products in zip(logits, expected):
        largest = np.argsort(products)[-250:]  # of 512 that were so before
        np.testing.assert_allclose(row[largest], products[largest], atol=1e-3)
    np.testing.assert_allclose(logits, expected, atol=0.2)


@pytest.mark.parametrize("num_rows", [1, 2, 8, 9])
def test_logits_of_a_few_rows(run_in_program, num_rows):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_rows, 1, 64)).astype("float32")
    matrix = rng.normal(size=(300, 64)).astype("float32")
    product = run_in_program(_backend.matmul_transposed_float32)
    logits = ops.convert_to_numpy(product(*map(ops.convert_to_tensor, (x, matrix))))
    np.testing.assert_allclose(logits, x @ matrix.T, atol=1e-4)


@pytest.fixture(params=["avx2", "avx512_bf16", "amx"])
def cpu(request, monkeypatch):
    """The ways of torch to multiply in bfloat16 on each kind of CPU; all of them run on any."""
    if _backend.BACKEND == "torch":
        dtypes = ["float32"] if request.param == "avx2" else ["float32", "bfloat16"]
        dtypes = {ops.zeros((), dtype).dtype for dtype in dtypes}
        monkeypatch.setattr(_backend, "_CPU_DTYPES", dtypes)
        monkeypatch.setattr(_backend, "_HAS_AMX", request.param == "amx")
    return request.param


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="torch alone changes layouts")
@pytest.mark.parametrize("cpu", ["avx512_bf16"], indirect=True)
def test_a_kernel_may_be_laid_out_while_it_is_read(cpu, monkeypatch):
    """As by another thread, which decodes its first token: the memory that is read stays."""
    kernel = keras.Variable(np.eye(64), dtype="bfloat16")
    product = _backend.torch.matmul

    def matmul(x, matrix):
        place = matrix.data_ptr()
        _backend._lay_out(kernel)
        assert kernel.value.data_ptr() != place
        assert matrix.data_ptr() == place
        return product(x, matrix)

    monkeypatch.setattr(_backend.torch, "matmul", matmul)
    x = ops.convert_to_tensor(np.ones((300, 64)), "bfloat16")
    with _backend.torch.inference_mode():
        output = _backend.matmul(x, kernel)
    assert ops.convert_to_numpy(ops.cast(output, "float32")).tolist() == [[1.0] * 64] * 300


@pytest.mark.parametrize("num_rows", [1, 3, 9])
def test_few_rows(cpu, num_rows):
    """Their product is the same, and the kernel, which may change its layout, trains on.

    TensorFlow without oneDNN rounds towards zero: a result is off by up to 2**-7 of itself.
    """
    layer = Linear(48, use_bias=False, dtype="bfloat16")
    layer.build((None, 64))
    before = ops.convert_to_numpy(ops.cast(layer.kernel, "float32"))
    x = ops.cast(np.random.default_rng(0).normal(size=(num_rows, 1, 64)), "bfloat16")
    output = ops.cast(_program(layer, x), "float32")
    expected = ops.convert_to_numpy(ops.cast(x, "float32")) @ before
    np.testing.assert_allclose(ops.convert_to_numpy(output), expected, rtol=2**-7, atol=1e-5)
    assert (ops.convert_to_numpy(ops.cast(layer.kernel, "float32")) == before).all()
    layer.kernel.assign(before * 2)
    doubled = ops.convert_to_numpy(ops.cast(layer(x), "float32"))
    np.testing.assert_allclose(doubled, expected * 2, rtol=2**-7, atol=1e-5)
    if _backend.BACKEND == "torch":
        x.requires_grad = True
        layer(x).float().sum().backward()
        gradient = x.detach().float().sum(dim=(0, 1))[:, None].expand(64, 48)
        np.testing.assert_allclose(layer.kernel.value.grad.float(), gradient, rtol=0.01)
        gradient = layer.kernel.value.detach().float().sum(dim=1).expand(x.shape)
        np.testing.assert_allclose(x.grad.float(), gradient, rtol=0.01)
        for variable in layer.trainable_variables:
            variable.trainable = False
        layer.kernel.value.grad = None
        layer(x).float().sum().backward()
        assert layer.kernel.value.grad is None


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="a function of torch")
@pytest.mark.parametrize("length", [1, 10])
def test_attention_of_torch(cpu, length, monkeypatch):
    monkeypatch.setattr(_backend, "_KEYS_CAST", 4)  # so that there are three parts
    rng = np.random.default_rng(0)
    shapes = (2, length, 4, 16), (2, 2, 10, 16), (2, 2, 10, 16)  # two queries share a key
    query, key, value = (ops.cast(rng.normal(size=shape), "bfloat16") for shape in shapes)
    mask = np.broadcast_to(np.arange(10) < np.array([[[10]], [[7]]]), (2, length, 10))
    output = _program(
        _backend.torch_attention, query, key, value, ops.convert_to_tensor(mask), None
    )
    query, key, value = (x.float().numpy() for x in (query, key, value))
    logits = np.einsum("btkgh,bksh->bkgts", query.reshape(2, length, 2, 2, 16), key)
    probs = np.exp(np.where(mask[:, None, None], logits, -np.inf))
    probs /= probs.sum(axis=-1, keepdims=True)
    expected = np.einsum("bkgts,bksh->btkgh", probs, value).reshape(2, length, 4, 16)
    assert ops.dtype(output) == "bfloat16"
    np.testing.assert_allclose(output.float().numpy(), expected, atol=0.05)


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="a way of torch")
def test_attention_in_training(cpu):
    """Outputs and gradients in bfloat16 are those in float32, but for rounding."""
    rng = np.random.default_rng(0)
    shapes = (2, 6, 4, 16), (2, 2, 6, 16), (2, 2, 6, 16)
    arrays = [rng.normal(scale=0.5, size=shape) for shape in shapes]

    def gradients(dtype):
        variables = [keras.Variable(array, dtype=dtype) for array in arrays]
        output = attention(*(variable.value for variable in variables))
        output.float().square().sum().backward()
        return [output.detach(), *(variable.value.grad for variable in variables)]

    for low, exact in zip(gradients("bfloat16"), gradients("float32")):
        assert ops.dtype(low) == "bfloat16"
        low, exact = (ops.convert_to_numpy(ops.cast(x, "float32")) for x in (low, exact))
        np.testing.assert_allclose(low, exact, atol=0.02 * np.abs(exact).max())


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="a way of torch")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_product_in_float32(monkeypatch, dtype):
    """A CPU without products of a dtype casts weights in parts; the result is rounded once."""
    float32 = ops.zeros(()).dtype
    monkeypatch.setattr(_backend, "_CPU_DTYPES", {float32})
    rng = np.random.default_rng(0)
    x, matrix = ops.cast(rng.normal(size=(2, 5, 2048)), dtype), rng.normal(size=(2048, 1030))
    matrix = ops.cast(matrix, dtype)  # in three parts
    expected = x.double() @ matrix.double()
    product = _program(_backend.matmul, x, matrix)
    assert product.dtype == x.dtype
    np.testing.assert_array_less(
        (product.double() - expected).abs().numpy(),
        expected.abs().numpy() * 2**-8 + 1e-3,
    )
    logits = _program(_backend.matmul_transposed_float32, x, matrix.t())
    assert logits.dtype == float32
    np.testing.assert_allclose(logits.numpy(), expected.numpy(), atol=1e-3)


@pytest.mark.skipif(
    _backend.BACKEND != "torch" or not _backend.torch.backends.mkldnn.is_available(),
    reason="a way of torch with oneDNN",
)
@pytest.mark.parametrize("num_rows", [1, 40])
@pytest.mark.parametrize("has_avx512", [True, False])
def test_float32_by_onednn(has_avx512, num_rows, monkeypatch):
    """As on a CPU of AMD; without AVX-512 many rows need weights that lie well."""
    monkeypatch.setattr(_backend, "_PREFERS_ONEDNN", True)
    monkeypatch.setattr(_backend, "_CPU", {"avx512_f": has_avx512})
    is_by_onednn, ways = _backend._is_by_onednn, []

    def recorded(rows, columns):
        ways.append(is_by_onednn(rows, columns))
        return ways[-1]

    monkeypatch.setattr(_backend, "_is_by_onednn", recorded)
    rng = np.random.default_rng(0)
    arrays = x64, kernel64 = rng.normal(size=(num_rows, 1, 64)), rng.normal(size=(64, 48))
    x, kernel = (keras.Variable(array, dtype="float32") for array in arrays)
    expected = x64 @ kernel64
    output = _program(_backend.matmul, x.value, kernel)
    np.testing.assert_allclose(output, expected, atol=1e-4)
    assert ways == [has_avx512 or num_rows == 1]
    logits = _program(_backend.matmul_transposed_float32, x.value, kernel.value.t())
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    logits = _program(_backend.matmul_transposed_float32, x.value, kernel.value.t().contiguous())
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert ways[1:] == [*ways[:1], True]
    part = _program(_backend.matmul, x.value, kernel.value[:, :40])
    np.testing.assert_allclose(part, expected[..., :40], atol=1e-4)
    assert ways[3:] == [False]  # for a part of a matrix oneDNN has no fast code
    upstream, kept = rng.normal(size=expected.shape), []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with _backend.torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _backend.matmul(x.value, kernel.value.detach())
        output = _backend.matmul(x.value, kernel)
    assert kept.count((num_rows, 1, 64)) + kept.count((num_rows, 64)) == 1  # for the trained one
    output.backward(ops.convert_to_tensor(upstream, "float32"))
    np.testing.assert_allclose(output.detach(), expected, atol=1e-4)
    np.testing.assert_allclose(x.value.grad, upstream @ kernel64.T, atol=1e-4)
    gradient = x64[:, 0].T @ upstream[:, 0]
    np.testing.assert_allclose(kernel.value.grad, gradient, atol=1e-4)
    if ways[0]:
        loss = _backend.matmul(x.value, kernel).square().sum()
        (slope,) = _backend.torch.autograd.grad(loss, x.value, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()
    with _backend.torch.backends.mkldnn.flags(enabled=False):
        _program(_backend.matmul, x.value, kernel)
    assert not ways[-1]


def _program(function, *args):
    """What the function returns without gradients, as in generation."""
    if _backend.BACKEND != "torch":
        return function(*args)
    import torch

    with torch.inference_mode():
        return function(*args)


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16"])
def test_wide_values_in_parts_in_float16(data, inputs, dtype, monkeypatch, run_in_program):
    """Parts of a long sequence are put together in the dtype of the residual stream."""
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype=dtype)
    mlp = model.vision.blocks[0].mlp
    _scale(model, "vision/block_0/mlp/down/kernel", 2e4)
    x = np.random.default_rng(0).normal(size=(1, 9, model.config.vision.width)).astype("float16")
    whole = ops.convert_to_numpy(run_in_program(lambda x: mlp(x))(ops.convert_to_tensor(x)))
    monkeypatch.setattr(_backend, "MAX_TOKENS", 4)
    parts = ops.convert_to_numpy(run_in_program(lambda x: mlp(x))(ops.convert_to_tensor(x)))
    assert whole.dtype == parts.dtype == "float32"
    assert np.isfinite(parts).all()
    np.testing.assert_allclose(parts, whole, rtol=2e-3, atol=np.abs(whole).max() * 2e-3)
