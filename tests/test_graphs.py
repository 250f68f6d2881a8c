"""CUDA graphs of torch, imitated on a CPU. On a GPU test_gpu.py tests them."""

import contextlib
import itertools
import types

import keras
import numpy as np
import pytest

from keras_pg2 import Beam, Greedy, PaliGemma2, Sample, _backend

pytestmark = pytest.mark.skipif(_backend.BACKEND != "torch", reason="torch alone has graphs")
WAITING = ("aten::lift_fresh", "aten::item", "aten::_local_scalar_dense", "aten::nonzero")


class Graph:
    """A CUDA graph on a CPU: it does the same operations again, on the same memory."""

    error = None

    def capture_begin(self, pool, capture_error_mode):
        from torch.utils._python_dispatch import TorchDispatchMode

        operations = self.operations = []
        overwritten = self.overwritten = []

        class Record(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), options=None):
                options = options or {}
                if function._schema.is_mutable:
                    overwritten.append((args[0], args[0].clone()))
                outputs = function(*args, **options)
                operations.append((function, args, options, outputs))
                return outputs

        self.taken_over, self.mode = pool, Record()
        self.mode.__enter__()

    def capture_end(self):
        self.mode.__exit__(None, None, None)
        for tensor, values in reversed(self.overwritten):  # a GPU has done nothing yet
            tensor.copy_(values)
        if self.error is not None:
            raise self.error

    def waiting(self):
        """Names of operations that wait for the GPU, which no graph can hold."""
        return {function._schema.name for function, *_ in self.operations} & set(WAITING)

    def replay(self):
        for function, args, options, outputs in self.operations:
            _backend._write(outputs, function(*args, **options))

    def pool(self):
        return self


@pytest.fixture
def graphs(monkeypatch):
    """list, to which each graph is added that is made."""
    import torch

    made = []

    def make():
        made.append(Graph())
        return made[-1]

    class Stream:
        device = torch.device("cpu")

    properties = types.SimpleNamespace(total_memory=2**30)
    monkeypatch.setattr(_backend, "has_torch_gpu", lambda: True)
    monkeypatch.setattr(_backend, "_is_on_cuda", lambda state: True)
    monkeypatch.setattr(_backend, "_graph_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    yield made
    assert not any(graph.waiting() for graph in made)


@pytest.fixture
def tiny(data, graphs):
    return PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32")


def random_images(model, seed, count=2):
    size = (count, model.preprocessor.image_size, model.preprocessor.image_size, 3)
    return list(np.random.default_rng(seed).integers(0, 256, size, "uint8"))


def assert_equal(answers, expected):
    for answer, other in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(answer.token_ids, other.token_ids)
        np.testing.assert_allclose(answer.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("sampler", [Greedy(), Sample(0.8, 50, 0.9), Beam(3)])
def test_answers_are_the_same(data, graphs, sampler, quantize):
    dtype = "bfloat16" if quantize else "float32"
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype=dtype, quantize=quantize)
    # Other images, texts and seeds, in the same shapes.
    calls = [
        (random_images(model, seed), [f"ask {seed}", "detect a red ball"], {"seed": seed})
        for seed in range(4)
    ]
    options = {"sampler": sampler, "max_new_tokens": 12, "details": True}
    answers = [model.generate(*call, **options, **seed) for *call, seed in calls]
    assert len(graphs) == 2  # of decoding in the first answer, of the prefill in the second
    model.programs.graphs.is_active = False
    for answer, (*call, seed) in zip(answers, calls):
        assert_equal(answer, model.generate(*call, **options, **seed))
    assert len(graphs) == 2


def test_other_programs(tiny, graphs):
    def results(seed):
        first, second = random_images(tiny, seed)
        encoded = tiny.encode([first, second])
        scores = tiny.score(first, "ocr", ["a b", "c"])
        pieces = "".join(tiny.stream(second, "caption en", max_new_tokens=9))
        found = tiny.generate(first, "detect a red ball", max_new_tokens=5, details=True)
        return [x.tokens.float().cpu() for x in encoded], scores, pieces, found.log_probs

    answers = [results(seed) for seed in range(3)]
    count = len(graphs)
    answers += [results(seed) for seed in range(3)]
    assert len(graphs) == count
    tiny.programs.graphs.is_active = False
    for i, answer in enumerate(answers):
        for value, expected in zip(answer, results(i % 3), strict=True):
            if isinstance(value, str):
                assert value == expected
            else:
                np.testing.assert_allclose(
                    np.array(value), np.array(expected), atol=1e-5, rtol=1e-5
                )


def test_two_streams_at_once(tiny, graphs):
    """Each keeps its own state, though both are recorded."""
    images = random_images(tiny, 0)
    options = {"max_new_tokens": 10}
    expected = ["".join(tiny.stream(image, "ocr", **options)) for image in images]
    streams = [tiny.stream(image, "ocr", **options) for image in images]
    pieces = zip(*itertools.zip_longest(*streams, fillvalue=""))
    assert list(map("".join, pieces)) == expected


def test_what_was_given_back_is_not_read(tiny, graphs, monkeypatch):
    """Another thread may write over it."""
    keep = _backend._Graphs.keep

    def keep_and_overwrite(self, key, recording):
        keep(self, key, recording)
        for tensor in keras.tree.flatten([recording.inputs, recording.outputs]):
            tensor.zero_()

    options = {"max_new_tokens": 8, "details": True}
    images = random_images(tiny, 0)
    expected = tiny.generate(images, ["ocr", "caption en"], **options)
    monkeypatch.setattr(_backend._Graphs, "keep", keep_and_overwrite)
    for _ in range(3):
        assert_equal(tiny.generate(images, ["ocr", "caption en"], **options), expected)
    assert len(graphs) == 2


def test_few_steps_and_layers_of_a_user_are_not_recorded(tiny, image, graphs):
    class Norm(type(tiny.text.final_norm)):
        pass

    tiny.generate(image, "ocr", max_new_tokens=3)
    assert not graphs
    tiny.generate(image, "ocr", max_new_tokens=4)
    assert len(graphs) == 2
    norm = Norm(1e-6)
    norm.build((None, tiny.config.text.width))
    tiny.text._tracker.unlock()
    tiny.text.final_norm = norm
    for _ in range(3):
        tiny.generate(image, "ocr", max_new_tokens=5)
    assert len(graphs) == 2


def test_what_cannot_be_recorded(tiny, image, graphs, monkeypatch, caplog):
    options = {"max_new_tokens": 8, "details": True}
    tiny.generate(image, "caption en a long text", max_new_tokens=1)  # sets the next line's anew
    tiny.programs.graphs.is_active = False
    expected = tiny.generate(image, "ocr", **options)
    tiny.programs.graphs.is_active = True
    monkeypatch.setattr(Graph, "error", RuntimeError("operation not permitted"))
    monkeypatch.setattr(_backend, "_write", lambda *tensors: None)
    monkeypatch.setattr(_backend, "_broken_graphs", [])
    for _ in range(4):
        assert_equal([tiny.generate(image, "ocr", **options)], [expected])
    assert "decode is slow" in caplog.text
    assert "prefill is slow" in caplog.text
    assert caplog.text.count("operation not permitted") == len(graphs) == 2  # each tried once
    assert _backend._broken_graphs[0] is graphs[0]


def test_a_graph_takes_over_the_memory_of_the_last(tiny, image, graphs):
    for length in (5, 200, 400):
        tiny.generate(image, "ocr", max_new_tokens=length)
    first, *others = graphs
    assert first.taken_over is None
    assert [graph.taken_over for graph in others] == graphs[:-1]


def test_memory_that_graphs_keep(tiny, image, graphs, monkeypatch):
    import torch

    properties = types.SimpleNamespace(total_memory=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    options = {"max_new_tokens": 8, "details": True}
    answers = [tiny.generate(image, "ocr", **options) for _ in range(3)]
    assert_equal(answers[1:], answers[:1] * 2)
    assert len(graphs) == 3  # nothing is kept: each answer records its decoding
    properties.total_memory = 2**30
    tiny.generate(image, "ocr", **options)
    kept = tiny.programs.graphs._recordings
    assert len(kept) == 2
    properties.total_memory = 16 * 3 * max(x.num_bytes for x in kept.values())
    for _ in range(2):
        tiny.generate(random_images(tiny, 0, 1), "ocr", **options | {"max_new_tokens": 200})
    assert len(tiny.programs.graphs._recordings) < 4
    tiny.programs.graphs.clear()
    assert not tiny.programs.graphs._recordings


def test_new_values_of_weights(tiny, image, graphs):
    options = {"max_new_tokens": 6, "details": True}
    for _ in range(2):
        before = tiny.generate(image, "ocr", **options)
    weight = tiny.vision.position_embedding
    values = weight.value.data.clone()
    weight.assign(3 * weight)  # in the same memory
    after = tiny.generate(image, "ocr", **options)
    assert len(graphs) == 2
    kept = tiny.programs.graphs
    taken = [(key, kept.take(key)) for key in [*kept._recordings]]
    weight.value.data = values  # other memory
    assert_equal([tiny.generate(image, "ocr", **options)], [before])
    for key_and_recording in taken:  # by a thread that used them so long
        kept.keep(*key_and_recording)
    assert not kept._recordings.keys() & dict(taken).keys()
    assert_equal([tiny.generate(image, "ocr", **options)], [before])
    assert not np.allclose(after.log_probs, before.log_probs, atol=1e-5)
    tiny.enable_lora(rank=2)
    lora = [v for v in tiny.trainable_variables if "lora" in v.path]
    assert lora
    tiny.generate(image, "ocr", **options)
    for variable in lora:
        variable.assign(keras.random.normal(variable.shape, seed=3))
    changed = tiny.generate(image, "ocr", **options)
    assert not np.allclose(changed.log_probs, before.log_probs, atol=1e-5)
    tiny.programs.graphs.is_active = False
    assert_equal([tiny.generate(image, "ocr", **options)], [changed])
