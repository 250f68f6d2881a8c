"""Trains and answers on eight CPU devices and on one, and asserts that they do the same.

Run by a test.
"""

import dataclasses
import os

os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import keras
import numpy as np
import pytest

import keras_pg2
from keras_pg2.config import GemmaConfig, SiglipConfig


def train(config, distribution, batch_size=8, one_batch=None):
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    model = keras_pg2.PaliGemma2(config)
    model.enable_lora(2, pattern="query")
    model.unfreeze("text/.*(kernel|embeddings)$")
    model.enable_remat()
    model.compile(keras.optimizers.SGD(0.5))
    rng = np.random.default_rng(0)
    suffix = np.arange(12) > rng.integers(4, 8, (16, 1))
    data = {
        "images": rng.uniform(-1, 1, (16, 28, 28, 3)).astype("float32"),
        "token_ids": rng.integers(3, 64, (16, 12)).astype("int32"),
        "padding_mask": np.ones((16, 12), bool),
        "suffix_mask": suffix,
    }
    if one_batch:
        model.train_on_batch({name: array[:one_batch] for name, array in data.items()})
    losses = model.fit(data, batch_size=batch_size, epochs=2, verbose=0).history["loss"]
    return losses, num_parts(model)


def num_parts(model):
    """In how many parts each weight is, by path."""
    return {
        path: len({str(shard.index) for shard in variable.value.addressable_shards})
        for path, variable in model.variables_by_path().items()
    }


def check_layouts(mesh):
    """All weights of a block, and those outside of blocks, of a published model."""
    config = keras_pg2.PaliGemmaConfig.from_variant("paligemma2-3b")
    first, second = ("data", "model"), ("model", "data")
    kernels = {
        "vision/patch_embedding": (None, "model"),
        **{f"vision/block_0/attention/{name}": first for name in ("query", "key", "value")},
        "vision/block_0/attention/output": second,
        "vision/block_0/mlp/up": first,
        "vision/block_0/mlp/down": second,
        "projector": first,
        **{f"text/block_0/attention/{name}": first for name in ("query", "key", "value")},
        "text/block_0/attention/output": second,
        "text/block_0/mlp/gate": first,
        "text/block_0/mlp/up": first,
        "text/block_0/mlp/down": second,
    }
    has_bias = ("vision", "projector")
    biases = {f"{k}/bias": v[1:] for k, v in kernels.items() if k.startswith(has_bias)}
    float_layouts = {f"{path}/kernel": axes for path, axes in kernels.items()}
    float_layouts |= {**biases, "text/embedding/embeddings": second}
    # Rows are outputs, and those of the embedding are tokens.
    rows = {path: axes[::-1] for path, axes in kernels.items()} | {"text/embedding": second}
    codes = {f"{path}/quantized/codes": axes for path, axes in rows.items()}
    scales = {f"{path}/quantized/scales": axes[:1] for path, axes in rows.items()}
    expected = {None: float_layouts, "int8": {**codes, **scales, **biases}}
    # Pairs of groups of columns: 2,304 and 1,152 have 9 and 5, which nothing divides.
    whole = {"text/block_0/attention/output": "model", "text/block_0/mlp/down": "model"}
    expected["int4"] = biases | {
        f"{path}/quantized/{name}": (whole.get(path), axes[0], None)
        for path, axes in rows.items()
        for name in ("codes", "scales")
    }
    for mode, wanted in expected.items():
        layouts = keras_pg2.layout_map(config, mesh, quantize=mode)
        found = {path.removeprefix("(.*/)?"): layouts[path].axes for path in layouts}
        others = {path for path in found if "block_" in path and "block_0/" not in path}
        assert {path: found[path] for path in set(found) - others} == wanted
        for path in others:
            tower, _, rest = path.split("/", 2)
            assert found[path] == wanted[f"{tower}/block_0/{rest}"]


def answer(config, distribution, mode):
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(0)
    model = keras_pg2.PaliGemma2(config)
    model.quantize(mode)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 28, 28, 3)).astype("float32")
    token_ids = rng.integers(3, 64, (2, 5)).astype("int32")
    answers = model.generate({"images": images, "token_ids": token_ids}, max_new_tokens=4)
    return np.concatenate([answer.log_probs for answer in answers]), num_parts(model)


def main():
    config = keras_pg2.PaliGemmaConfig(
        SiglipConfig(width=16, depth=1, mlp_dim=32, num_heads=4, image_size=28),
        GemmaConfig(
            **{"width": 16, "depth": 2, "mlp_dim": 32, "num_heads": 4, "num_kv_heads": 2},
            **{"head_dim": 8, "query_pre_attn_scalar": 8, "vocab_size": 64},
        ),
    )
    mesh = keras.distribution.DeviceMesh((2, 4), ("data", "model"))
    layouts = keras_pg2.layout_map(config, mesh)
    parallel = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="data")
    losses, devices = train(config, parallel)
    expected, _ = train(config, None)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[1] < losses[0]
    with pytest.raises(ValueError, match=r"a multiple of 2, since .* Received: 3 examples$"):
        train(config, parallel, batch_size=3)
    with pytest.raises(ValueError, match=r"a multiple of 2, since .* Received: 3 examples$"):
        train(config, parallel, one_batch=3)
    keras.distribution.set_distribution(parallel)
    model = keras_pg2.PaliGemma2(config)
    model.compile("sgd")
    data = {
        "images": np.zeros((5, 28, 28, 3), "float32"),
        "token_ids": np.full((5, 6), 7, "int32"),
        "suffix_mask": np.ones((5, 6), bool),
    }
    logits = model.predict(data, batch_size=4, verbose=0)  # the last batch has one
    assert logits.shape == (5, 6, 64)
    np.testing.assert_allclose(logits, np.repeat(logits[:1], 5, axis=0), rtol=1e-5)
    with pytest.raises(ValueError, match=r"of validation too, .* Received: 3 examples$"):
        model.fit(data, batch_size=4, validation_data=data, validation_batch_size=3, verbose=0)
    assert not model.optimizer.iterations.numpy()
    assert devices["text/block_0/mlp/up/kernel"] == 8
    assert devices["text/block_0/attention/query/kernel"] == 8
    assert devices["text/block_0/attention/key/kernel"] == 2  # two heads, four devices
    assert devices["text/embedding/embeddings"] == 8
    assert devices["vision/block_0/mlp/up/bias"] == 4
    assert devices["text/final_norm/scale"] == 1

    for mode, count in (("int8", 8), ("int4", 4)):
        layouts = keras_pg2.layout_map(config, mesh, quantize=mode)
        parallel = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="data")
        log_probs, devices = answer(config, parallel, mode)
        expected, _ = answer(config, None, mode)
        np.testing.assert_allclose(log_probs, expected, atol=1e-5)
        assert devices["text/block_0/mlp/up/quantized/codes"] == count
        assert devices["text/block_0/mlp/up/quantized/scales"] == 4
    check_layouts(mesh)
    five = keras.distribution.DeviceMesh((1, 5), ("data", "model"), devices=mesh.devices.flat[:5])
    config = config.replace(text=dataclasses.replace(config.text, mlp_dim=40))
    layouts = keras_pg2.layout_map(config, five, quantize="int4")
    # 40 rows are padded to 64, which five do not divide.
    assert layouts["text/block_0/mlp/up/quantized/codes"].axes == ("data", None, None)
    layouts = keras_pg2.layout_map(config, five, quantize="int8")
    assert layouts["text/block_0/mlp/up/quantized/codes"].axes == ("model", "data")


if __name__ == "__main__":
    main()
