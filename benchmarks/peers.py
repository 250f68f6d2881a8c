"""The models that benchmarks compare, and how they are run: one at a time, turn by turn.

Each builder makes the same architecture with random weights: ours, keras_hub's, transformers'.
"""

import json
import os
import statistics
import subprocess
import sys

VOCAB_SIZE = 257_152
_SHARED = {"use_post_norms": True, "attn_logit_softcap": 50.0, "final_logit_softcap": 30.0}
SIZES = {  # the real vocabulary in each
    "mid": (
        {"width": 384, "depth": 6, "mlp_dim": 1536, "num_heads": 6},
        {
            **{"width": 1024, "depth": 8, "mlp_dim": 4096, "num_heads": 8, "num_kv_heads": 4},
            **{"head_dim": 128, "query_pre_attn_scalar": 128, **_SHARED},
        },
    ),
    "3b": (
        {"width": 1152, "depth": 27, "mlp_dim": 4304, "num_heads": 16},
        {
            **{"width": 2304, "depth": 26, "mlp_dim": 9216, "num_heads": 8, "num_kv_heads": 4},
            **{"head_dim": 256, "query_pre_attn_scalar": 256, **_SHARED},
        },
    ),
}


def keras_pg2_model(size, dtype, image_size=224):
    import keras_pg2
    from keras_pg2.config import GemmaConfig, SiglipConfig

    vision, text = SIZES[size]
    config = keras_pg2.PaliGemmaConfig(
        SiglipConfig(image_size=image_size, **vision), GemmaConfig(**text)
    )
    return keras_pg2.PaliGemma2(config, dtype=dtype)


def keras_hub_model(size, dtype, image_size=224):
    import keras_hub

    vision, text = SIZES[size]
    backbone = keras_hub.models.PaliGemmaBackbone(
        vocabulary_size=VOCAB_SIZE,
        image_size=image_size,
        num_layers=text["depth"],
        num_query_heads=text["num_heads"],
        num_key_value_heads=text["num_kv_heads"],
        hidden_dim=text["width"],
        intermediate_dim=2 * text["mlp_dim"],
        head_dim=text["head_dim"],
        vit_patch_size=14,
        vit_num_heads=vision["num_heads"],
        vit_hidden_dim=vision["width"],
        vit_num_layers=vision["depth"],
        vit_intermediate_dim=vision["mlp_dim"],
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=50,
        final_logit_soft_cap=30,
        dtype=dtype,
    )
    return keras_hub.models.PaliGemmaCausalLM(backbone=backbone, preprocessor=None)


def transformers_model(size, dtype, image_size=224):
    import torch
    import transformers
    from transformers import initialization

    vision, text = SIZES[size]
    text = {
        "model_type": "gemma2",
        "vocab_size": VOCAB_SIZE + 64,
        "hidden_size": text["width"],
        "intermediate_size": text["mlp_dim"],
        "num_hidden_layers": text["depth"],
        "num_attention_heads": text["num_heads"],
        "num_key_value_heads": text["num_kv_heads"],
        "head_dim": text["head_dim"],
        "query_pre_attn_scalar": text["query_pre_attn_scalar"],
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": vision["width"],
        "intermediate_size": vision["mlp_dim"],
        "num_hidden_layers": vision["depth"],
        "num_attention_heads": vision["num_heads"],
        "image_size": image_size,
        "patch_size": 14,
        "vision_use_head": False,
    }
    config = transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=VOCAB_SIZE,
        projection_dim=text["hidden_size"],
        hidden_size=text["hidden_size"],
    )
    config._attn_implementation = "eager"  # soft caps allow no other
    device = "cuda" if torch.cuda.is_available() else "cpu"  # as Keras chooses
    with initialization.no_init_weights(), torch.device(device):
        torch.set_default_dtype(getattr(torch, dtype))
        model = transformers.PaliGemmaForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02)
    return model


def run_in_turns(script, contestants, arguments, repeat):
    """Runs each contestant in a process of its own, all of them `repeat` times in turn.

    Args:
        script: path of a script that prints one line of JSON last, given `--measure CONTESTANT`.
        contestants: list of str, "package/backend".
        arguments: list of str, for the script.
        repeat: int.

    Returns:
        dict of contestant to the list of what it printed.
    """
    results = {contestant: [] for contestant in contestants}
    for _ in range(repeat):
        for contestant in contestants:
            run = subprocess.run(
                [sys.executable, script, "--measure", contestant, *arguments],
                env={
                    **os.environ,
                    "KERAS_BACKEND": contestant.partition("/")[2],
                    "TF_CPP_MIN_LOG_LEVEL": "3",
                },
                capture_output=True,
                text=True,
            )
            if run.returncode:
                last = run.stderr.strip().splitlines()[-1:]
                print(f"{contestant} failed with {run.returncode}: {last}")
            else:
                results[contestant].append(json.loads(run.stdout.strip().splitlines()[-1]))
    return {name: runs for name, runs in results.items() if runs}


def spread(runs, name):
    """Median, least and most of one measured number."""
    values = sorted(run[name] for run in runs)
    return statistics.median(values), values[0], values[-1]
