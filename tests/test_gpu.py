"""What torch does on a GPU alone: CUDA graphs, and its product of int4.

CUDA_VISIBLE_DEVICES=0 KERAS_BACKEND=torch python -m pytest tests/test_gpu.py
"""

import numpy as np
import pytest
from keras import ops

from keras_pg2 import Beam, Greedy, PaliGemma2, Sample, _backend, quantization

pytestmark = pytest.mark.skipif(
    not _backend.has_torch_gpu(),
    reason="needs torch and a GPU, which CUDA_VISIBLE_DEVICES names",
)


@pytest.fixture
def recorded(monkeypatch):
    """list, to which each call that is recorded adds whether that succeeded."""
    results, record = [], _backend._Graphs.record

    def counted(*args):
        recording = record(*args)
        results.append(recording is not None)
        return recording

    monkeypatch.setattr(_backend._Graphs, "record", counted)
    return results


@pytest.mark.parametrize("sampler", [Greedy(), Sample(0.8, 50, 0.9), Beam(3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_graphs(data, image, recorded, sampler, dtype, quantize):
    """The same answers as without them, with other images in the same shapes, too."""
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype=dtype, quantize=quantize)
    options = {"sampler": sampler, "max_new_tokens": 12, "seed": 1, "details": True}
    prompts = ["caption en", "detect a red ball", "x"]
    images = [image, image[::-1], image[:, ::-1]]
    calls = [images, images, [255 - image for image in images], images[::-1]]
    answers = [model.generate(images, prompts, **options) for images in calls]
    assert recorded == [True, True]
    model.programs.graphs.is_active = False
    for images, answer in zip(calls, answers):
        expected = model.generate(images, prompts, **options)
        for one, other in zip(answer, expected, strict=True):
            np.testing.assert_array_equal(one.token_ids, other.token_ids)
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-3)
    assert len(recorded) == 2


def test_graphs_of_other_programs(data, image, recorded):
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32")

    def results():
        encoded = model.encode([image, 255 - image])
        scores = model.score(image, "ocr", ["a b", "c"])
        text = "".join(model.stream(image, "caption en", max_new_tokens=20))
        return ops.convert_to_numpy(encoded[1].tokens), scores, text

    answers = [results() for _ in range(4)]
    assert recorded == [True] * 4
    model.programs.graphs.is_active = False
    tokens, scores, text = results()
    for answer in answers:
        np.testing.assert_allclose(answer[0], tokens, atol=1e-4)
        np.testing.assert_allclose(answer[1], scores, atol=1e-4)
        assert answer[2] == text


@pytest.mark.parametrize("shape", [(100, 96), (256, 256), (2048, 2304)])
def test_int4(shape):
    """What torch's product takes stands for the same matrix."""
    import torch

    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("an older GPU has no such product")
    matrix = quantization.QuantizedMatrix(*shape, "int4", 64, dtype="bfloat16")
    matrix.build()
    values = np.random.default_rng(0).normal(size=shape).astype("float32")
    codes, scales = matrix.encode(values)
    matrix.assign(codes.copy(), scales.copy())
    assert torch.is_tensor(matrix._tile)
    store = {}
    matrix.save_own_variables(store)
    np.testing.assert_array_equal(store["codes"], codes)
    rows = torch.tensor([[3, 9, shape[0] - 1]], device="cuda")
    assert torch.equal(matrix.take(rows), matrix.values("float32")[rows])
    for num_rows in (1, 3, 65):
        x = torch.randn(num_rows, shape[1], dtype=torch.bfloat16, device="cuda")
        with torch.inference_mode():
            product = matrix.multiply(x)
        expected = x.float() @ matrix.values("float32").t()
        assert (product.float() - expected).norm() < 0.01 * expected.norm()
