import dataclasses
import json

import numpy as np
import pytest
from keras import ops

from keras_pg2 import GemmaConfig, PaliGemma2, PaliGemmaConfig, SiglipConfig, _backend
from keras_pg2.config import VARIANTS

# big_vision by `jax.eval_shape`; at 448 and 896 px 768 and 3,840 more position embeddings of 1,152.
PARAMETERS_224 = {
    "paligemma-3b": 2_923_335_408,
    "paligemma2-3b": 3_032_094_960,
    "paligemma2-10b": 9_662_409_456,
    "paligemma2-28b": 27_650_192_112,
}


@pytest.mark.parametrize("image_size", [224, 448, 896])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_parameter_counts_without_memory(variant, image_size):
    config = PaliGemmaConfig.from_variant(variant, image_size)
    with _backend.variables_without_values():
        model = PaliGemma2(config, dtype="bfloat16")
    added = {224: 0, 448: 768, 896: 3_840}[image_size] * 1_152
    assert model.count_params() == PARAMETERS_224[variant] + added
    assert all(variable._value is None for variable in model.variables)


def test_variables_without_values_leave_keras_clean():
    with _backend.variables_without_values():
        PaliGemma2(PaliGemmaConfig(SiglipConfig(28, 1, 28, 2, 28), GemmaConfig(**_gemma())))
    # Keras initialises what is left over at the end of its next stateless scope.
    import keras

    with keras.StatelessScope():
        pass
    layer = keras.layers.Dense(1)
    layer.build((1, 1))
    assert layer.kernel.shape == (1, 1)


def test_round_trip():
    config = PaliGemmaConfig.from_variant("paligemma2-28b", 896)
    assert PaliGemmaConfig.from_dict(config.to_dict()) == config
    assert config.text.query_pre_attn_scalar == 144


def test_replace():
    config = PaliGemmaConfig.from_variant("paligemma2-3b")
    changed = config.replace(image_size=448, final_logit_softcap=None)
    assert changed.vision.image_size == 448
    assert changed.text.final_logit_softcap is None
    text = dataclasses.replace(config.text, depth=2)
    assert config.replace(text=text, sliding_window=5).text.depth == 2
    with pytest.raises(ValueError, match="both towers"):
        config.replace(width=3)
    with pytest.raises(ValueError, match="`windows`: it is none of"):
        config.replace(windows=3)


def _gemma(**changes):
    return {
        **dict(width=8, depth=1, mlp_dim=8, num_heads=2, num_kv_heads=1, head_dim=4),
        **dict(query_pre_attn_scalar=4, vocab_size=2000),
        **changes,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 0},
        {"depth": 1.5},
        {"mlp_dim": -1},
        {"num_heads": 3, "num_kv_heads": 2},
        {"head_dim": 5},
        {"query_pre_attn_scalar": 0},
        {"attn_logit_softcap": -1.0},
        {"final_logit_softcap": float("nan")},
        {"sliding_window": 0},
        {"use_post_norms": 1},
        {"vocab_size": True},
        {"rope_base": "10000"},
        {"norm_eps": 0.0},
    ],
)
def test_gemma_config_rejects(changes):
    with pytest.raises(ValueError, match=f"`{next(iter(changes))}` must be .* Received: "):
        GemmaConfig(**_gemma(**changes))


@pytest.mark.parametrize(
    "changes", [{"width": 10, "num_heads": 3}, {"image_size": 225}, {"patch_size": 0}]
)
def test_siglip_config_rejects(changes):
    with pytest.raises(ValueError, match="must be"):
        SiglipConfig(**changes)


def test_config_rejects_unknown_names():
    with pytest.raises(ValueError, match="paligemma2-3b"):
        PaliGemmaConfig.from_variant("paligemma3-4b")
    with pytest.raises(ValueError, match="vision"):
        PaliGemmaConfig.from_dict({"text": {}})
    with pytest.raises(ValueError, match="unknown field"):
        PaliGemmaConfig.from_dict({"vision": {"height": 3}, "text": {}})


# Every field of a config changes the output, or raises where the weights no longer fit.

_CHANGES = {
    "vision": {
        "width": 48,
        "depth": 1,
        "mlp_dim": 51,
        "num_heads": 2,
        "image_size": 56,
        "patch_size": 7,
        "norm_eps": 1e-2,
    },
    "text": {
        "width": 44,
        "depth": 3,
        "mlp_dim": 57,
        "num_heads": 2,
        "num_kv_heads": 4,
        "head_dim": 24,
        "query_pre_attn_scalar": 12.0,
        "use_post_norms": False,
        "attn_logit_softcap": None,
        "final_logit_softcap": None,
        "sliding_window": 2,
        "vocab_size": 1800,
        "max_positions": 10,
        "rope_base": 5_000.0,
        "norm_eps": 1e-2,
        "dropout": 0.5,
    },
}
_NOT_IN_THE_FORWARD_PASS = {"max_positions"}


@pytest.mark.parametrize(
    ("tower", "field"),
    [(tower, field) for tower, changes in _CHANGES.items() for field in changes],
)
def test_every_field_changes_the_output_or_raises(data, model, inputs, tower, field):
    fields = {f.name for f in dataclasses.fields(getattr(model.config, tower))}
    assert fields == set(_CHANGES[tower])
    value = _CHANGES[tower][field]
    assert value != getattr(getattr(model.config, tower), field)
    part = dataclasses.replace(getattr(model.config, tower), **{field: value})
    if field in _NOT_IN_THE_FORWARD_PASS:
        changed = PaliGemma2(model.config.replace(**{tower: part}))
        with pytest.raises(ValueError, match="max_positions"):
            changed.generate(inputs, max_new_tokens=1)
        return
    try:
        changed = PaliGemma2.from_preset(
            data / "hf_tiny_paligemma2", dtype="float32", **{tower: part}
        )
        logits = changed(inputs, training=field == "dropout")
    except ValueError:
        return
    difference = ops.convert_to_numpy(logits) - ops.convert_to_numpy(model(inputs))
    assert np.abs(difference[inputs["padding_mask"]]).max() > 1e-3


def test_numbers_of_numpy():
    config = PaliGemmaConfig.from_variant("paligemma2-3b", np.int64(448))
    config = config.replace(dropout=np.float32(0.5), sliding_window=np.int32(8))
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert (config.vision.image_size, config.text.dropout) == (448, 0.5)
