"""Runs each kind of work on an accelerator that torch imitates, and asserts that none fails.

Its tensors have shapes and dtypes but no values, and torch refuses to mix them with those of a
CPU, as it does on a GPU. What they hold where the library looks is made up. Run by a test.
"""

import itertools
import os

os.environ.update(KERAS_BACKEND="torch", KERAS_TORCH_DEVICE="imitated:0")

import keras
import numpy as np
import PIL.Image
import torch
from torch._subclasses import fake_impls, fake_tensor
from torch.utils import backend_registration

import keras_pg2
from keras_pg2 import _backend

_NUMBERS = itertools.cycle(range(12))  # so that a loop until a count of tokens ends
_steps = []  # of decoding, while one runs


class Device(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


def made_up_array(x, dtype=None, copy=None):
    numpy_dtype = str(x.dtype).removeprefix("torch.")
    value = False if x.dtype == torch.bool else next(_NUMBERS)
    return np.full(tuple(x.shape), value, numpy_dtype)


def made_up_scalar(mode, operation, x):
    assert not _steps, "a step of decoding waits for the device"
    return {torch.bool: False, torch.int32: 3, torch.int64: 3}.get(x.dtype, 1.0)


def imitate():
    backend_registration._setup_privateuseone_for_python_backend("imitated", Device())
    fake_tensor.FakeTensor.__array__ = made_up_array
    fake_tensor.CONSTANT_NUMEL_LIMIT = -1  # numbers have no value either
    as_tensor = torch.as_tensor

    def moved(x, dtype=None, device=None):  # numbers in earnest
        assert not _steps or torch.is_tensor(x), f"a step of decoding moves {x} to the device"
        return as_tensor(x, dtype=dtype).to(device)

    torch.as_tensor = moved
    scalar = torch.ops.aten._local_scalar_dense.default
    fake_impls.op_implementations_dict[scalar] = made_up_scalar
    keras.src.backend.torch.random.torch_seed_generator = lambda seed: None
    _backend.loop = with_checked_steps(_backend.loop)
    # Threads cannot share the imitation: what one computes fails within an operation of another.
    keras.callbacks.CallbackList._async_dispatch = lambda self, function, *args: function(*args)
    _backend.prefetch = lambda function, batches, threads=1: itertools.starmap(function, batches)


def with_checked_steps(loop):
    """The loop, whose steps must neither wait nor copy: a CUDA graph cannot hold that."""

    def checked_loop(step, *args):
        def checked_step(state):
            _steps.append(step)
            try:
                return step(state)
            finally:
                _steps.pop()

        return loop(checked_step, *args)

    return checked_loop


def answer(model, image):
    model.generate([image] * 2, "cap en", sampler=keras_pg2.Sample(0.8, 5, 0.9), max_new_tokens=8)
    model.generate(image, "cap en", sampler=keras_pg2.Beam(3), max_new_tokens=8)
    model.caption([model.encode(image)] * 10, batch_size=10, max_new_tokens=8)
    model.segment([image] * 2, "square", constrained=True, max_new_tokens=8)
    model.score(image, "ocr", ["1", "2 3 4"])
    list(model.stream(image, "ocr", max_new_tokens=8))


def train(model, image):
    model.compile("adamw")
    examples = [{"image": image, "prompt": "cap en", "response": "a cat"}] * 4
    model.fit(examples, validation_data=examples, batch_size=2, verbose=0)


def main():
    pixels = np.random.default_rng(0).integers(0, 256, (100, 120, 3))
    image = PIL.Image.fromarray(pixels.astype("uint8"))
    kinds = [("mixed_float16", None), ("bfloat16", "int8"), ("float32", "int4")]
    for dtype, quantize in kinds:
        model = keras_pg2.PaliGemma2.from_preset(
            "paligemma2-tiny-digits-112", dtype=dtype, quantize=quantize
        )
        devices = {variable.value.device.type for variable in model.variables}
        assert devices == {"imitated"}, devices
        answer(model, image)
        model.enable_lora(2)
        model.enable_remat()
        train(model, image)
        if quantize is None:
            model.merge_lora()
            answer(model, image)
        model.get_codec()(np.zeros((2, 64, 64), "float32"))


if __name__ == "__main__":
    imitate()
    with torch.autograd.set_multithreading_enabled(False), fake_tensor.FakeTensorMode():
        main()
