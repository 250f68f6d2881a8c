"""Trains in two processes of two CPU devices each and in one, and asserts that they do the same.

Run by a test, once for each process, with the number of a free port and that of the process.
"""

import os
import sys
import tempfile

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import keras
import numpy as np
import pytest

import keras_pg2
from keras_pg2.config import GemmaConfig, SiglipConfig

ADDRESS, PROCESS = f"127.0.0.1:{sys.argv[1]}", int(sys.argv[2])


def training_data():
    rng = np.random.default_rng(0)
    return {
        "images": rng.uniform(-1, 1, (8, 28, 28, 3)).astype("float32"),
        "token_ids": rng.integers(3, 64, (8, 12)).astype("int32"),
        "padding_mask": np.ones((8, 12), bool),
        "suffix_mask": np.arange(12) > rng.integers(4, 8, (8, 1)),
    }


def train(config, distribution, rows, batch_size):
    """A model trained on `rows` of the data, in that order, and its losses."""
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    model = keras_pg2.PaliGemma2(config)
    model.enable_lora(2)
    model.compile(keras.optimizers.SGD(5.0))
    data = {name: array[rows] for name, array in training_data().items()}
    history = model.fit(data, batch_size=batch_size, epochs=2, shuffle=False, verbose=0).history
    return model, history["loss"]


def main():
    keras.distribution.initialize(f"{ADDRESS},{ADDRESS}", 2, PROCESS)
    assert len(keras.distribution.list_devices()) == 4
    config = keras_pg2.PaliGemmaConfig(
        SiglipConfig(width=16, depth=1, mlp_dim=32, num_heads=4, image_size=28),
        GemmaConfig(
            **{"width": 16, "depth": 2, "mlp_dim": 32, "num_heads": 4, "num_kv_heads": 2},
            **{"head_dim": 8, "query_pre_attn_scalar": 8, "vocab_size": 64},
        ),
    )
    one_process, expected = train(config, None, np.arange(8), 4)

    mesh = keras.distribution.DeviceMesh((4, 1), ("data", "model"))
    layouts = keras_pg2.layout_map(config, mesh)
    parallel = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="data")
    # Of each batch of four the first process has the first half.
    rows = np.arange(8).reshape(2, 2, 2)[:, PROCESS].reshape(-1)
    two_processes, losses = train(config, parallel, rows, 2)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert not two_processes.text.embedding.embeddings.value.is_fully_addressable
    for found, wanted in zip(two_processes.get_weights(), one_process.get_weights(), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)

    rng = np.random.default_rng(1)
    inputs = {
        "images": rng.uniform(-1, 1, (2, 1, 28, 28, 3)).astype("float32"),
        "token_ids": rng.integers(3, 64, (2, 1, 5)),
    }
    alike, other = ({name: x[row] for name, x in inputs.items()} for row in (0, PROCESS))
    (found,) = two_processes.generate(alike, max_new_tokens=4)
    assert found.token_ids.shape == (4,)
    with pytest.raises(ValueError, match="All processes must ask the same"):
        two_processes.generate(other, max_new_tokens=4)
    rows = slice(0, 2 - PROCESS)
    uneven = {name: x[rows] for name, x in training_data().items()}
    with pytest.raises(ValueError, match=r"same number of batches. Received: \[2, 1\], by process"):
        two_processes.fit(uneven, batch_size=1, verbose=0)

    with tempfile.TemporaryDirectory() as folder:
        two_processes.save_to_preset(f"{folder}/preset")
        keras.distribution.set_distribution(None)
        read = keras_pg2.PaliGemma2.from_preset(f"{folder}/preset", dtype="float32")
    read = read.weights_by_path()
    for path, wanted in one_process.weights_by_path().items():
        np.testing.assert_allclose(read[path].read(), wanted.read(), rtol=1e-3, atol=1e-5)

    keras.distribution.set_distribution(parallel)
    two_processes.drop_lora()
    two_processes.quantize("int8")
    (found,) = two_processes.generate(alike, max_new_tokens=4)
    assert found.token_ids.shape == (4,)


if __name__ == "__main__":
    main()
