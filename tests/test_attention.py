import keras
import numpy as np
import pytest
from keras import ops

from keras_pg2 import _backend
from keras_pg2.attention import (
    attention,
    attention_mask,
    block_ids,
    rotary_angles,
    sliding_window_mask,
    token_positions,
)


def _mask(valid, suffix):
    blocks = block_ids(np.array([suffix], bool))
    mask = attention_mask(blocks, blocks, ops.convert_to_tensor(np.array([valid], bool)))
    return ops.convert_to_numpy(mask)[0].astype(int).tolist()


def test_prefix_is_bidirectional():
    assert _mask([1, 1, 1], [0, 0, 0]) == [[1, 1, 1], [1, 1, 1], [1, 1, 1]]


def test_suffix_is_causal():
    assert _mask([1, 1, 1], [1, 1, 1]) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_prefix_then_suffix():
    assert _mask([1, 1, 1, 1, 1], [0, 0, 0, 1, 1]) == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


def test_padding_is_invisible_wherever_it_is():
    assert _mask([1, 0, 1, 1, 0], [0, 0, 0, 1, 0]) == [
        [1, 0, 1, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 1, 1, 0],
    ]


def test_mask_agrees_with_a_loop():
    rng = np.random.default_rng(0)
    valid, suffix = rng.random((3, 9)) < 0.8, rng.random((3, 9)) < 0.4
    blocks = block_ids(suffix)
    mask = ops.convert_to_numpy(attention_mask(blocks, blocks, ops.convert_to_tensor(valid)))
    for row in range(3):
        for query in range(9):
            for key in range(9):
                visible = suffix[row, : key + 1].sum() <= suffix[row, : query + 1].sum()
                assert mask[row, query, key] == (valid[row, key] and visible)


def test_positions_count_real_tokens():
    valid = np.array([[1, 1, 0, 0, 1], [0, 0, 1, 1, 1]], bool)
    assert ops.convert_to_numpy(token_positions(valid)).tolist() == [
        [0, 1, 1, 1, 2],
        [0, 0, 0, 1, 2],
    ]


def test_sliding_window_spares_the_prefix():
    suffix = np.array([[0, 0, 0, 1, 1]], bool)
    blocks, positions = block_ids(suffix), token_positions(np.ones_like(suffix))
    mask = attention_mask(blocks, blocks, ops.ones((1, 5), "bool"))
    mask = sliding_window_mask(mask, blocks, positions, positions, window=2)
    assert ops.convert_to_numpy(mask)[0].astype(int).tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_rotary_embedding_by_hand():
    # One head of size 4: the pairs (0, 2) and (1, 3) turn by position · (1, 1 / 100).
    x = np.array([1.0, 2.0, 3.0, 4.0], "float32").reshape(1, 1, 1, 4)
    cos, sin = rotary_angles(np.array([[5]]), head_dim=4, base=10_000.0)
    angles = np.array([5.0, 0.05])
    first, second = x[0, 0, 0, :2], x[0, 0, 0, 2:]
    expected = np.concatenate(
        [
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        ]
    )
    rotated = _backend.rotate(ops.convert_to_tensor(x), cos, sin)
    rotated = ops.convert_to_numpy(rotated)[0, 0, 0]
    np.testing.assert_allclose(rotated, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rotary_angles_are_float32(dtype):
    cos, _ = rotary_angles(np.array([[257, 258]]), head_dim=4, base=10_000.0)
    assert ops.dtype(cos) == "float32"
    x = ops.ones((1, 2, 1, 4), dtype)
    assert ops.dtype(_backend.rotate(x, cos, cos)) == "float32"


def _reference(query, key, value, mask, softcap):
    """Head by head, row by row, in float64."""
    batch, _, heads, _ = query.shape
    output = np.zeros(query.shape)
    group = heads // key.shape[2]
    for b in range(batch):
        for n in range(heads):
            logits = query[b, :, n] @ key[b, :, n // group].T
            logits = softcap * np.tanh(logits / softcap) if softcap else logits
            logits = np.where(mask[b], logits, -np.inf)
            probs = np.exp(logits - logits.max(-1, keepdims=True))
            output[b, :, n] = probs / probs.sum(-1, keepdims=True) @ value[b, :, n // group]
    return output


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("max_logits", [1024 * 1024, 22])  # 22: chunks of 2 queries
@pytest.mark.parametrize(("length", "kv_heads"), [(1, 3), (5, 3), (6, 3), (1, 1), (6, 1), (6, 6)])
@pytest.mark.parametrize("in_program", [False, True])
@pytest.mark.parametrize("has_gpu", [False, True] if _backend.BACKEND == "jax" else [False])
def test_attention_agrees_with_a_loop(
    monkeypatch, softcap, max_logits, length, kv_heads, in_program, has_gpu, run_in_program
):
    monkeypatch.setattr(_backend, "_MAX_ATTENTION_LOGITS", max_logits)
    monkeypatch.setattr(_backend, "has_jax_gpu", lambda: has_gpu)
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, length, 6, 4)).astype("float32")
    key = rng.normal(size=(2, 11, kv_heads, 4)).astype("float32")
    value = rng.normal(size=(2, 11, kv_heads, 4)).astype("float32")
    mask = rng.random((2, length, 11)) < 0.6
    mask[:, :, 0] = True
    heads_first = (key.swapaxes(1, 2), value.swapaxes(1, 2))

    def attend(query, key, value, mask):
        return attention(query, key, value, mask, softcap)

    attend = run_in_program(attend) if in_program else attend
    output = attend(*map(ops.convert_to_tensor, (query, *heads_first, mask)))
    expected = _reference(query, key, value, mask, softcap)
    np.testing.assert_allclose(ops.convert_to_numpy(output), expected, atol=1e-6)


@pytest.mark.skipif(not _backend.IS_COMPILED, reason="torch takes parts of any length")
def test_lengths_without_a_divisor_are_padded(run_in_program):
    lengths = []

    def function(x, y):
        lengths.append(x.shape[1])
        return x + 2 * y

    x = np.random.default_rng(0).normal(size=(2, 2633, 3)).astype("float32")  # a prime
    chunked = run_in_program(lambda x, y: _backend.in_chunks(function, [x, y], 2048))
    output = chunked(*map(ops.convert_to_tensor, (x, x[..., :1])))
    np.testing.assert_allclose(ops.convert_to_numpy(output), x + 2 * x[..., :1], atol=1e-6)
    assert set(lengths) == {1317}


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="a function of torch")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("is_slow", [False, True])
def test_without_soft_cap_torch_keeps_no_logits(monkeypatch, dtype, is_training, is_slow):
    import torch

    calls, fused = [], torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(args)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(_backend, "_is_slow", lambda x: is_slow)
    monkeypatch.setattr(_backend, "_MAX_ATTENTION_LOGITS", 1)  # of no effect
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in ((2, 5, 6, 8), (2, 1, 7, 8), (2, 1, 7, 8))]
    mask = np.arange(7) < np.array([[[7]] * 5, [[4]] * 5])
    query, key, value = (torch.tensor(x).to(getattr(torch, dtype)) for x in arrays)
    query.requires_grad = key.requires_grad = is_training
    with torch.set_grad_enabled(is_training):
        output = attention(query, key, value, torch.tensor(mask))
    assert len(calls) == (not (is_training and is_slow))
    query, key, value = (x.detach().double().numpy() for x in (query, key, value))
    expected = _reference(query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask, None)
    assert ops.dtype(output) == dtype
    tolerance = {"float32": 1e-6, "bfloat16": 0.02, "float16": 0.003}[dtype]
    np.testing.assert_allclose(ops.convert_to_numpy(output.float()), expected, atol=tolerance)


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="a limit of torch")
def test_torch_keeps_few_logits_on_a_cpu(monkeypatch):
    lengths, attend = [], _backend.torch_attention

    def counted(query, *args):
        lengths.append(query.shape[1])
        return attend(query, *args)

    monkeypatch.setattr(_backend, "torch_attention", counted)
    monkeypatch.setattr(_backend, "_MAX_CPU_LOGITS", 2 * 4 * 10 * 3)
    key = ops.ones((2, 2, 10, 8))
    with _backend.torch.inference_mode():
        attention(ops.ones((2, 7, 4, 8)), key, key, logit_softcap=50.0)
    assert lengths == [3, 3, 1]


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="looks at what torch copies")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_training", [False, True])
def test_parts_of_a_sequence_copy_no_kernel(dtype, is_training):
    import torch
    from torch.profiler import profile

    kernel = keras.Variable(np.ones((48, 96)), dtype=dtype)
    x = ops.ones((1, 40, 48), dtype)
    with profile(record_shapes=True) as profiled, torch.set_grad_enabled(is_training):
        output = _backend.in_chunks(lambda x: _backend.matmul(x, kernel), [x], 16)
    assert output.shape == (1, 40, 96)
    shapes = [shape for event in profiled.events() for shape in event.input_shapes or ()]
    assert [14, 48] in shapes  # equal parts: 14, 14 and 12
    assert [1, 48, 96] not in shapes  # the kernel, copied for a product of batches


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="looks at what torch copies")
def test_keys_are_laid_out_once_for_all_parts():
    seen = []

    def function(key, x):
        seen.append(key)
        return x + key.sum()

    key = ops.swapaxes(ops.ones((1, 7, 2, 4)), 1, 2)
    _backend.in_chunks(function, [ops.ones((1, 5, 3))], 2, shared=[key])
    assert len(seen) == 3
    assert all(x is seen[0] for x in seen)
    assert seen[0].is_contiguous()
    _backend.in_chunks(function, [ops.ones((1, 5, 3))], 5, shared=[key])
    assert seen[3] is key  # of a single part a copy would take longer than it saves


@pytest.mark.skipif(_backend.BACKEND != "jax", reason="looks at what jax compiles")
def test_one_chunk_of_logits_is_in_memory_at_a_time(monkeypatch):
    import jax

    def attend_twice(query, key):
        for _ in range(2):
            query = attention(query, key, key)
        return query

    monkeypatch.setattr(_backend._state, "in_program", True, raising=False)
    shapes = ((1, 4096, 2, 8), (1, 2, 4096, 8))  # two heads have 128 MiB of logits
    args = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    compiled = jax.jit(attend_twice).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 24 * 2**20  # a chunk: 8 MiB, twice


def test_a_query_without_keys_is_finite():
    x = ops.ones((1, 2, 1, 4))
    mask = ops.zeros((1, 2, 2), "bool")
    key = ops.swapaxes(x, 1, 2)
    assert np.isfinite(ops.convert_to_numpy(attention(x, key, key, mask))).all()
