"""Fixtures: a tiny model of fixed random weights, its tokenizer, and images."""

import gc
import os
import pathlib
import tempfile
import types
from importlib.metadata import version

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# A GPU adds up in another order than the CPUs for which the bounds are. `test_gpu.py` needs one.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests make the same tiny models again and again: jax compiles each program once a session.
_CACHE = tempfile.TemporaryDirectory()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Most of the time goes into compiling tiny programs, which XLA does twice as fast unoptimized.
# XLA ends a process that sets a flag it does not know, so only versions seen to know them get them.
for _BACKEND, _PACKAGE, _KNOWN in [
    ("jax", "jaxlib", "0.10."),
    ("tensorflow", "tensorflow", "2.21."),
]:
    if os.environ.get("KERAS_BACKEND") == _BACKEND and version(_PACKAGE).startswith(_KNOWN):
        os.environ.setdefault(
            "XLA_FLAGS",
            "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
            "--xla_cpu_parallel_codegen_split_count=1",
        )
gc.set_threshold(100_000, 20, 100)  # graphs are many objects, and few are garbage

import keras
import numpy as np
import pytest

import keras_pg2
from keras_pg2 import _backend

DATA = pathlib.Path(__file__).parent / "parity" / "data"


def logits_of(model, inputs):
    """NumPy logits. jax compiles the model at once, which is faster than each operation alone."""
    call = model.predict_on_batch if keras.config.backend() == "jax" else model
    return keras.ops.convert_to_numpy(call(inputs))


@pytest.fixture(autouse=True)
def _seed():
    """Layers that a test makes have the same weights in each run."""
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def data():
    """Folder of the goldens: inputs and outputs of other libraries on tiny random weights."""
    return DATA


@pytest.fixture
def run_in_program():
    """Gives the compiled form of a function of tensors, as generation uses it."""
    no_model = types.SimpleNamespace(
        variables=[], jax_state_sync=lambda: None, _flatten_layers=lambda: []
    )
    return lambda function, **options: _backend.Programs().get(
        no_model, function.__name__, function, **options
    )


@pytest.fixture(scope="session")
def tokenizer():
    return keras_pg2.Tokenizer.from_file(DATA / "tok" / "tokenizer.model")


@pytest.fixture(scope="session")
def model():
    """Tiny PaliGemma 2 (42 px, 9 image tokens) in float32. Tests must not change it."""
    return keras_pg2.PaliGemma2.from_preset(DATA / "hf_tiny_paligemma2", dtype="float32")


@pytest.fixture(scope="session")
def paligemma1():
    """Tiny PaliGemma 1 in float32. Tests must not change it."""
    return keras_pg2.PaliGemma2.from_preset(DATA / "hf_tiny_paligemma1", dtype="float32")


@pytest.fixture
def image():
    """uint8 (50, 60, 3)."""
    return np.random.default_rng(0).integers(0, 256, (50, 60, 3), "uint8")


@pytest.fixture
def inputs():
    """A ragged batch of 2 for the tiny models: right-padded, with suffixes."""
    rng = np.random.default_rng(1)
    padding = np.arange(10) < np.array([[10], [7]])
    return {
        "images": rng.uniform(-1, 1, (2, 42, 42, 3)).astype("float32"),
        "token_ids": np.where(padding, rng.integers(3, 1600, (2, 10)), 0).astype("int32"),
        "padding_mask": padding,
        "suffix_mask": padding & (np.arange(10) >= np.array([[6], [4]])),
    }


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    # First, since pytest's own hook leaves slow tests out.
    for item in items:
        if _backend.IS_COMPILED and item.get_closest_marker("slow_if_compiled"):
            item.add_marker("slow")


def pytest_report_header():
    return f"Keras backend: {keras.config.backend()}"
