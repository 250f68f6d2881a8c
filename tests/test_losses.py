import keras
import numpy as np
import pytest
from keras import ops

from keras_pg2 import PaliGemma2, _backend, losses, quantization
from keras_pg2.checkpoints import names
from keras_pg2.quantization import QuantizedMatrix


def gradients(function, variables):
    """The value of a loss, and its gradient for each variable, on the current backend."""
    if _backend.BACKEND == "jax":
        import jax

        def stateless(values):
            with keras.StatelessScope(state_mapping=list(zip(variables, values))):
                return function()

        value, found = jax.jit(jax.value_and_grad(stateless))([v.value for v in variables])
    elif _backend.BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = function()
        found = tape.gradient(value, [v.value for v in variables])
        found = [tf.convert_to_tensor(g) for g in found]  # from slices
    else:
        for variable in variables:
            variable.value.grad = None
        value = function()
        value.backward()
        found = [v.value.grad for v in variables]
    return float(ops.convert_to_numpy(value)), [ops.convert_to_numpy(g) for g in found]


def plain_loss(hidden, embeddings, targets, weights, softcap=None, label_smoothing=0.0):
    """The textbook formula over full logits."""
    logits = ops.matmul(hidden, ops.transpose(embeddings))
    if softcap is not None:
        logits = ops.tanh(logits / softcap) * softcap
    size = embeddings.shape[0]
    probabilities = ops.one_hot(targets, size)
    other = label_smoothing / (size - 1)
    probabilities = probabilities * (1 - label_smoothing) + (1 - probabilities) * other
    return -ops.sum(weights * ops.sum(probabilities * ops.log_softmax(logits), axis=-1))


@pytest.mark.parametrize("max_logits", [2**25, 400])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_chunks_equal_the_plain_loss(monkeypatch, max_logits, label_smoothing, softcap):
    """Values and gradients, with 400 logits at a time 2 positions a chunk."""
    monkeypatch.setattr(losses, "_MAX_LOGITS", max_logits)
    rng = np.random.default_rng(0)
    hidden = keras.Variable(rng.normal(size=(2, 9, 8)).astype("float32"))
    embeddings = keras.Variable(rng.normal(size=(100, 8)).astype("float32"))
    targets = rng.integers(0, 100, (2, 9)).astype("int32")
    weights = (rng.uniform(0.1, 1, (2, 9)) * (np.arange(9) < [[7], [4]])).astype("float32")
    options = {"softcap": softcap, "label_smoothing": label_smoothing}
    targets, weights = ops.convert_to_tensor(targets), ops.convert_to_tensor(weights)

    def chunked():
        return losses.token_losses(hidden.value, embeddings.value, targets, weights, **options)[0]

    def plain():
        return plain_loss(hidden.value, embeddings.value, targets, weights, **options)

    value, found = gradients(chunked, [hidden, embeddings])
    expected_value, expected = gradients(plain, [hidden, embeddings])
    assert value == pytest.approx(expected_value, rel=1e-5)
    for actual, wanted in zip(found, expected):
        np.testing.assert_allclose(actual, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("factor", [0.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_of_single_losses(monkeypatch, factor, softcap):
    """Of sums of losses with weights of a user's own, of both signs, and with the loss itself."""
    monkeypatch.setattr(losses, "_MAX_LOGITS", 400)
    rng = np.random.default_rng(0)
    hidden = keras.Variable(rng.normal(size=(2, 9, 8)).astype("float32"))
    embeddings = keras.Variable(rng.normal(size=(100, 8)).astype("float32"))
    targets = ops.convert_to_tensor(rng.integers(0, 100, (2, 9)).astype("int32"))
    weights = np.array([[0.1] * 9, [0.5] * 4 + [0.0] * 5], "float32")
    own = rng.normal(size=(2, 9)).astype("float32")
    combined = ops.convert_to_tensor(factor * weights + own * (weights > 0))
    weights, own = ops.convert_to_tensor(weights), ops.convert_to_tensor(own)

    def single():
        arguments = (hidden.value, embeddings.value, targets, weights)
        loss, found, _ = losses.token_losses(*arguments, softcap=softcap)
        return ops.sum(own * found) + (factor * loss if factor else 0.0)

    def plain():
        return plain_loss(hidden.value, embeddings.value, targets, combined, softcap=softcap)

    value, found = gradients(single, [hidden, embeddings])
    expected_value, expected = gradients(plain, [hidden, embeddings])
    assert value == pytest.approx(expected_value, rel=1e-5)
    for actual, wanted in zip(found, expected):
        np.testing.assert_allclose(actual, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="others have no graph that they keep")
def test_a_second_gradient_of_one_graph():
    import torch

    hidden = torch.randn((2, 3, 8), requires_grad=True)
    embeddings = torch.randn((20, 8), requires_grad=True)
    targets, weights = torch.ones((2, 3), dtype=torch.int32), torch.full((2, 3), 0.5)
    loss = losses.token_losses(hidden, embeddings, targets, weights)[0]
    first = torch.autograd.grad(loss, [hidden, embeddings], retain_graph=True)
    for again, expected in zip(torch.autograd.grad(loss, [hidden, embeddings]), first):
        torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("max_decoded", [2**25, 12_800])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_embeddings_in_parts(monkeypatch, mode, max_decoded):
    """As the matrix that they stand for, of 300 rows and 2 groups of 64 columns."""
    for name in ("_MAX_DECODED", "_MAX_DECODED_BACK"):
        monkeypatch.setattr(quantization, name, max_decoded)
    rng = np.random.default_rng(0)
    matrix = QuantizedMatrix(300, 128, mode, 64, dtype="float32")
    matrix.build()
    matrix.assign(*matrix.encode(rng.normal(size=(300, 128))))
    hidden = keras.Variable(rng.normal(size=(2, 9, 128)).astype("float32"))
    targets = ops.convert_to_tensor(rng.integers(0, 300, (2, 9)).astype("int32"))
    weights = ops.convert_to_tensor(np.full((2, 9), 1 / 18, "float32"))

    def loss_of(embeddings):
        return losses.token_losses(hidden.value, embeddings, targets, weights, softcap=20.0)[0]

    value, (found,) = gradients(lambda: loss_of(matrix), [hidden])
    expected, (wanted,) = gradients(lambda: loss_of(matrix.values("float32")), [hidden])
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_losses_and_hits():
    hidden = np.eye(4, dtype="float32")[None] * 9
    embeddings = np.eye(4, dtype="float32")
    weights = np.array([[1, 0.5, 0.25, 0]], "float32")
    arrays = [hidden, embeddings, np.array([[0, 1, 0, 3]], "int32"), weights]
    variables = [keras.Variable(x) for x in arrays[:2]]
    tensors = [*(v.value for v in variables), *map(ops.convert_to_tensor, arrays[2:])]
    loss, found, hits = losses.token_losses(*tensors)
    assert not getattr(hits, "requires_grad", False)
    right = np.log(np.exp(9) + 3) - 9
    np.testing.assert_allclose(
        ops.convert_to_numpy(found), [[right, right, 9 + right, 0]], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(ops.convert_to_numpy(hits), [[1, 1, 0, 0]])
    assert float(loss) == pytest.approx(1.75 * right + 0.25 * 9, rel=1e-5)


@pytest.mark.parametrize("length", [0, 1])
def test_short_rows(length):
    arrays = [np.ones((2, length, 4)), np.eye(4), np.ones((2, length)), np.ones((2, length))]
    dtypes = ["float32", "float32", "int32", "float32"]
    tensors = [ops.convert_to_tensor(x, dtype) for x, dtype in zip(arrays, dtypes)]
    loss, found, _ = losses.token_losses(*tensors)
    assert found.shape == (2, length)
    assert float(loss) == pytest.approx(2 * length * np.log(4))


def test_full_logits_never_exist():
    """3B with 4 × 128 tokens of text would have 520 MB of logits; a chunk has 128 MiB at most."""
    length = losses.chunk_length(4, 127, 257_152)
    assert length == 32
    assert 4 * length * 257_152 <= losses._MAX_LOGITS
    assert losses.chunk_length(64, 127, 257_152) == 2
    assert losses.chunk_length(10**6, 127, 257_152) == 1
    assert losses.chunk_length(4, 127, 1664) == 32  # a quarter: most answers are short


def golden_inputs(golden):
    return {
        "images": golden["image"],
        "token_ids": golden["text"].astype("int32"),
        "padding_mask": golden["text"] != 0,
        "suffix_mask": (golden["mask_ar"] > 0) & (golden["text"] != 0),
        "loss_mask": golden["mask_loss"] > 0,
    }


@pytest.mark.parametrize(("version", "kind"), [(1, "bigvision"), (2, "bigvision"), (2, "capped")])
def test_big_vision_loss_and_gradients(data, version, kind):
    """Every weight's gradient, with and without the soft cap of the logits."""
    changes = {"query_pre_attn_scalar": 10} if version == 2 else {}
    changes |= {} if kind == "capped" else {"final_logit_softcap": None}
    model = PaliGemma2.from_preset(
        data / f"bv_tiny_paligemma{version}.npz", dtype="float32", **changes
    )
    golden = np.load(data / f"bv_tiny_paligemma{version}_grads.npz")
    inputs = {name: ops.convert_to_tensor(x) for name, x in golden_inputs(golden).items()}
    variables = model.variables_by_path()
    loss, found = gradients(lambda: model(inputs, training=True)["loss"], list(variables.values()))
    assert loss == pytest.approx(float(golden[f"loss_{kind}"]), rel=2e-6)

    found = dict(zip(variables, found))
    errors = []
    for spec in names.tensor_specs("big-vision", model.config):
        if f"grad_{kind}/{spec.name}" not in golden:  # with a cap, those of the vision tower alone
            continue
        expected = golden[f"grad_{kind}/{spec.name}"]
        expected = spec.to_ours(expected[spec.index] if spec.index else expected)
        largest = max(np.abs(expected).max(), 1e-2)  # biases of keys have none but rounding
        errors.append(np.abs(found[spec.path] - expected).max() / largest)
    # These weights amplify rounding: with JAX, as big_vision itself, the errors are below 1e-5.
    assert max(errors) < 3e-4
