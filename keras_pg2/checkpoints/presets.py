"""Finds out what a checkpoint is, and reads its config, tokenizer and preprocessing."""

import dataclasses
import json
import math
import os

from keras_pg2.checkpoints import io
from keras_pg2.config import VARIANTS, GemmaConfig, PaliGemmaConfig, SiglipConfig


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of itself.

    Attributes:
        format: str, "hf", "keras-hub" or "big-vision".
        config: PaliGemmaConfig.
        tokenizer: str or None, path of `tokenizer.model` or `tokenizer.json`.
        path: str, the folder or file with the tensors.
    """

    format: str
    config: PaliGemmaConfig
    tokenizer: str | None
    path: str

    def open(self):
        """The tensors, as a TensorFile."""
        if self.format == "hf":
            return io.open_safetensors(self.path)
        if self.format == "keras-hub":
            return io.open_h5(os.path.join(self.path, "model.weights.h5"))
        return io.open_npz(self.path)


def find_checkpoint(preset):
    """Recognises a checkpoint by its content.

    Args:
        preset: path of a Hugging Face or keras_hub folder, or of a big_vision `.npz`.

    Returns:
        Checkpoint.

    Raises:
        FileNotFoundError: if there is nothing at that path.
        ValueError: if it is no PaliGemma checkpoint.
    """
    path = os.fspath(preset)
    if os.path.isfile(path) and path.endswith(".npz"):
        with io.open_npz(path) as tensors:
            config = _big_vision_config(tensors.shapes, path)
        return Checkpoint("big-vision", config, None, path)
    config_path = os.path.join(path, "config.json")
    if not os.path.exists(config_path):
        raise FileNotFoundError(
            "`preset` must be the path of a folder with a config.json (Hugging Face or "
            f"keras_hub), or of a big_vision .npz file. Received: preset={preset!r}"
        )
    with open(config_path) as file:
        try:
            values = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"The file {config_path!r} is no JSON: {error}") from error
    try:
        if values.get("model_type") == "paligemma":
            names = ("tokenizer.model", "tokenizer.json")
            found = [name for name in names if os.path.isfile(os.path.join(path, name))]
            tokenizer = os.path.join(path, found[0]) if found else None
            return Checkpoint("hf", _hugging_face_config(values), tokenizer, path)
        if values.get("class_name") == "PaliGemmaBackbone":
            tokenizer = os.path.join(path, "assets", "tokenizer", "vocabulary.spm")
            config = _keras_hub_config(values["config"])
            return Checkpoint("keras-hub", config, _if_file(tokenizer), path)
    except KeyError as error:
        raise ValueError(f"The config {config_path!r} lacks the field {error}.") from error
    raise ValueError(
        f"The config {config_path!r} is of no PaliGemma model. "
        f"Received: model_type={values.get('model_type')!r}, class={values.get('class_name')!r}"
    )


def _if_file(path):
    return path if os.path.isfile(path) else None


def _hugging_face_config(values):
    """transformers' config.json, old and new; missing fields have the defaults of its classes."""
    vision, text = values["vision_config"], values["text_config"]
    is_gemma2 = text["model_type"] == "gemma2"
    rope = text.get("rope_parameters") or {}
    # The window of 4,096 that transformers writes is its own: PaliGemma was trained without.
    return PaliGemmaConfig(
        SiglipConfig(
            width=vision["hidden_size"],
            depth=vision["num_hidden_layers"],
            mlp_dim=vision["intermediate_size"],
            num_heads=vision["num_attention_heads"],
            image_size=vision.get("image_size", 224),
            patch_size=vision.get("patch_size", 14),
            norm_eps=vision.get("layer_norm_eps", 1e-6),
        ),
        GemmaConfig(
            width=text["hidden_size"],
            depth=text["num_hidden_layers"],
            mlp_dim=text["intermediate_size"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim", 256),
            query_pre_attn_scalar=(
                text.get("query_pre_attn_scalar", 256) if is_gemma2 else text.get("head_dim", 256)
            ),
            use_post_norms=is_gemma2,
            attn_logit_softcap=text.get("attn_logit_softcapping", 50.0) if is_gemma2 else None,
            final_logit_softcap=text.get("final_logit_softcapping", 30.0) if is_gemma2 else None,
            # `<image>` is the first row after the real tokens.
            vocab_size=values.get("image_token_index", 257_152),
            rope_base=float(text.get("rope_theta", rope.get("rope_theta", 10_000.0))),
            norm_eps=text.get("rms_norm_eps", 1e-6),
        ),
    )


def _keras_hub_config(values):
    """keras_hub's backbone config; `intermediate_dim` is the width of both gates together."""
    is_gemma2 = bool(values.get("use_post_ffw_norm"))
    head_dim, width = values["head_dim"], values["hidden_dim"]
    normalize = values.get("query_head_dim_normalize", True)
    return PaliGemmaConfig(
        SiglipConfig(
            width=values["vit_hidden_dim"],
            depth=values["vit_num_layers"],
            mlp_dim=values["vit_intermediate_dim"],
            num_heads=values["vit_num_heads"],
            image_size=values["image_size"],
            patch_size=values["vit_patch_size"],
        ),
        GemmaConfig(
            width=width,
            depth=values["num_layers"],
            mlp_dim=values["intermediate_dim"] // 2,
            num_heads=values["num_query_heads"],
            num_kv_heads=values["num_key_value_heads"],
            head_dim=head_dim,
            query_pre_attn_scalar=head_dim if normalize else width / values["num_query_heads"],
            use_post_norms=is_gemma2,
            attn_logit_softcap=values.get("attention_logit_soft_cap"),
            final_logit_softcap=values.get("final_logit_soft_cap"),
            vocab_size=values["vocabulary_size"],
            norm_eps=values.get("layer_norm_epsilon", 1e-6),
        ),
    )


def _big_vision_config(shapes, path):
    """The architecture, read off the shapes; big_vision's files hold no config."""
    try:
        text = "params/llm/layers/"
        depth, num_heads, width, head_dim = shapes[f"{text}attn/q_einsum/w"]
        use_post_norms = f"{text}post_ffw_norm/scale" in shapes
        block = "params/img/Transformer/encoderblock/"
        patch_size, _, _, vision_width = shapes["params/img/embedding/kernel"]
        vision_depth, _, vision_heads, _ = shapes[
            f"{block}MultiHeadDotProductAttention_0/query/kernel"
        ]
        vision = SiglipConfig(
            width=vision_width,
            depth=vision_depth,
            mlp_dim=shapes[f"{block}MlpBlock_0/Dense_0/kernel"][-1],
            num_heads=vision_heads,
            image_size=patch_size * math.isqrt(shapes["params/img/pos_embedding"][1]),
            patch_size=patch_size,
        )
        known = [
            config
            for config in VARIANTS.values()
            if (config.width, config.depth, config.use_post_norms) == (width, depth, use_post_norms)
        ]
        decoder = GemmaConfig(
            width=width,
            depth=depth,
            mlp_dim=shapes[f"{text}mlp/linear"][1],
            num_heads=num_heads,
            num_kv_heads=shapes[f"{text}attn/kv_einsum/w"][2],
            head_dim=head_dim,
            query_pre_attn_scalar=known[0].query_pre_attn_scalar if known else head_dim,
            use_post_norms=use_post_norms,
            attn_logit_softcap=50.0 if use_post_norms else None,
            final_logit_softcap=30.0 if use_post_norms else None,
            vocab_size=shapes["params/llm/embedder/input_embedding"][0],
        )
    except (KeyError, ValueError) as error:
        raise ValueError(f"The file {path!r} is no big_vision PaliGemma: {error}") from error
    return PaliGemmaConfig(vision, decoder)
