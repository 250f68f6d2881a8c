"""Trains and answers on two CPU devices with TensorFlow and on one, and asserts the same results.

Run by a test.
"""

import contextlib
import os

os.environ.update(KERAS_BACKEND="tensorflow")

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_pg2
from keras_pg2.config import GemmaConfig, SiglipConfig


def examples():
    rng = np.random.default_rng(0)
    return {
        "images": rng.uniform(-1, 1, (9, 28, 28, 3)).astype("float32"),
        "token_ids": rng.integers(3, 64, (9, 12)).astype("int32"),
        "padding_mask": np.ones((9, 12), bool),
        "suffix_mask": np.arange(12) > rng.integers(4, 8, (9, 1)),
    }


def train(config, strategy, mode):
    """Losses of two epochs, of validation, and log-probabilities of answers."""
    keras.utils.set_random_seed(0)
    scope = strategy.scope if strategy else contextlib.nullcontext
    with scope():
        model = keras_pg2.PaliGemma2(config)
    if mode:
        model.quantize(mode)
    model.enable_lora(2)
    with scope():
        model.compile(keras.optimizers.SGD(5.0))
    data = examples()
    # The last batch has one example, so that one device has none that counts.
    history = model.fit(data, validation_data=data, batch_size=4, epochs=2, verbose=0).history
    prompt = {name: data[name][:2] for name in ("images", "token_ids")}
    answers = model.generate(prompt, max_new_tokens=4)
    log_probs = np.concatenate([answer.log_probs for answer in answers])
    return history["loss"], history["val_loss"], history["val_token_accuracy"], log_probs


def main():
    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    config = keras_pg2.PaliGemmaConfig(
        SiglipConfig(width=16, depth=1, mlp_dim=32, num_heads=4, image_size=28),
        GemmaConfig(
            **{"width": 16, "depth": 2, "mlp_dim": 32, "num_heads": 4, "num_kv_heads": 2},
            **{"head_dim": 8, "query_pre_attn_scalar": 8, "vocab_size": 64},
        ),
    )
    for mode in (None, "int8", "int4"):
        expected = train(config, None, mode)
        for found, wanted in zip(train(config, strategy, mode), expected):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
        assert expected[0][1] < expected[0][0]
    with strategy.scope():
        model = keras_pg2.PaliGemma2(config)
        model.compile(keras.optimizers.SGD(gradient_accumulation_steps=2))
    with pytest.raises(ValueError, match=r"does not work with several replicas .* Received: 2$"):
        model.fit(examples())


if __name__ == "__main__":
    main()
