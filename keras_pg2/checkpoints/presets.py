"""Finds out what a checkpoint is and where, and writes whole checkpoint folders."""

import dataclasses
import json
import logging
import math
import os
import pathlib
import re
import tempfile

import keras
import tqdm

from keras_pg2.checkpoints import adapters, io, names
from keras_pg2.config import VARIANTS, GemmaConfig, PaliGemmaConfig, SiglipConfig
from keras_pg2.preprocessing import Preprocessor
from keras_pg2.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
FORMATS = ("preset", "hf", "keras-hub", "big-vision")
TINY = "paligemma2-tiny-digits-112"  # comes with the package
CODEC_FILE = "segmentation.safetensors"
_OFFICIAL = re.compile(
    r"paligemma2-(3b|10b|28b)-(pt-(224|448|896)|mix-(224|448))"
    r"|paligemma2-(3b|10b)-ft-docci-448"
    r"|paligemma-3b-(pt-(224|448|896)|mix-(224|448)|ft-[a-z0-9-]+-(224|448|896))"
)
_HUB_FILES = ("*.json", "*.safetensors", "*.npz", "tokenizer.model", "*.weights.h5", "assets/**")
# What makes up a model in a folder of any format, whoever wrote it.
MODEL_FILES = [
    *("config.json", "tokenizer.model", "model.safetensors", "model.safetensors.index.json"),
    *("model-?????-of-?????.safetensors", CODEC_FILE),
    *("preprocessor_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("processor_config.json", "generation_config.json", "added_tokens.json"),
    *("model.weights.h5", "metadata.json", "tokenizer.json", "image_converter.json"),
    *("model.weights.json", "model_?????.weights.h5"),
    *("preprocessor.json", "task.json", "assets/tokenizer/vocabulary.spm"),
]
_PRESET_VERSION = 1
# Of transformers' Gemma2Config. Releases 4.47 to 4.49 left the 3B's `num_attention_heads` out.
_GEMMA2_DEFAULTS = {
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says of itself.

    Attributes:
        format: str, one of `FORMATS`.
        config: PaliGemmaConfig.
        path: str, the folder or file.
        tokenizer: str or None, path of `tokenizer.model` or `tokenizer.json`.
        preprocessing: dict, arguments of `Preprocessor` other than the image size.
        codec: str or None, path of a `<seg>` codec of its own.
    """

    format: str
    config: PaliGemmaConfig
    path: str
    tokenizer: str | None = None
    preprocessing: dict = dataclasses.field(default_factory=dict)
    codec: str | None = None

    def weights(self):
        """The tensors by the paths of our variables, as a dict of LazyTensor.

        Raises:
            ValueError: if files are damaged or do not fit the config.
        """
        if self.format == "keras-hub":
            tensors = {}
            for path in io.shard_paths(self.path, "model.weights.h5", "model.weights.json"):
                tensors |= io.read_h5(path)
        elif self.format == "big-vision":
            tensors = _read_big_vision(self.path)
        else:
            unused = names.HUGGING_FACE_UNUSED if self.format == "hf" else None
            tensors = io.read_safetensors(self.path, unused=unused)
        return io.to_ours(tensors, self.format, self.config, self.path)

    def make_preprocessor(self, image_size, tokenizer=None):
        """The preprocessor that the checkpoint describes.

        Args:
            image_size: int.
            tokenizer: Tokenizer, path of one, or None for the checkpoint's own.

        Returns:
            Preprocessor, or None if there is no tokenizer.

        Raises:
            FileNotFoundError: if a preset has lost its tokenizer, or `tokenizer` is no file.
            ValueError: if a file is damaged.
        """
        tokenizer = tokenizer or self.tokenizer
        if tokenizer is None:
            if self.preprocessing:
                path = os.path.join(self.path, "tokenizer.model")
                raise FileNotFoundError(
                    f"The preset lacks the file {path!r}. Copy it there, or pass `tokenizer`."
                )
            return None
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = Tokenizer.from_file(tokenizer)
        try:
            return Preprocessor(tokenizer, image_size, **self.preprocessing)
        except ValueError as error:
            raise ValueError(f"`preprocessing` of the preset {self.path!r}: {error}") from error


# Where --------------------------------------------------------------------------------------


def find_checkpoint(preset, only_config=False):
    """Fetches a checkpoint if need be, and recognises it by its content.

    Args:
        preset: an official name ("paligemma2-3b-mix-224"), `TINY`, "hf://org/repo" with
            "@revision" if wanted, "kaggle://owner/model/framework/variation", or the path of our
            own, a Hugging Face or a keras_hub folder, or of a big_vision `.npz`.
        only_config: bool, whether nothing but the config need be fetched, so that `weights` may
            fail and `tokenizer` be None.

    Returns:
        Checkpoint.

    Raises:
        ConnectionError: if a download fails.
        FileNotFoundError: if there is nothing of that name.
        ImportError: if the hub's package is missing.
        PermissionError: if a licence must be accepted first.
        ValueError: if it is no PaliGemma checkpoint.
    """
    path = os.path.expanduser(preset)
    if not os.path.exists(path):
        name = f"hf://google/{path}" if _OFFICIAL.fullmatch(path) else path
        path = _fetch_config(name) if only_config else fetch(name)
        if path == TINY:
            path = str(pathlib.Path(__file__).parents[1] / "tiny" / TINY)
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        archives = [name for name in os.listdir(path) if name.endswith(".npz")]
        if len(archives) == 1:
            path = os.path.join(path, archives[0])
    if os.path.isfile(path) and path.endswith(".npz"):
        shapes = {name: tensor.shape for name, tensor in _read_big_vision(path).items()}
        return Checkpoint("big-vision", _big_vision_config(shapes, path), path)
    config_path = os.path.join(path, "config.json")
    if not os.path.exists(config_path):
        raise FileNotFoundError(
            f"`preset` must be an official name such as 'paligemma2-3b-mix-224', {TINY!r}, "
            "hf://org/repo, kaggle://owner/model/framework/variation, or the path of a folder with "
            "a config.json or of a big_vision .npz file. "
            f"Received: preset={os.fspath(preset)!r}{_hint(path)}"
        )
    with open(config_path, encoding="utf-8") as file:
        try:
            values = json.load(file)
        except ValueError as error:
            raise ValueError(f"The file {config_path!r} is no JSON: {error}") from error
    return _recognise(path, config_path, values)


def _hint(path):
    """What may have been meant by a path at which there is no checkpoint."""
    if path.endswith(".keras"):
        return ". `keras.models.load_model` reads .keras files"
    if os.path.exists(os.path.join(path, adapters.CONFIG_FILE)):
        return ". `model.load_adapter` reads adapters"
    if os.path.isdir(path):
        return ", a folder without a config.json"
    if os.path.exists(path) or path.endswith(".npz"):
        return ""
    if path.startswith("pali_gemma"):
        family = "paligemma2" if path.startswith(("pali_gemma2", "pali_gemma_2")) else "paligemma"
        handle = path.replace("mix_28b", "28b_mix")  # keras_hub's name for it
        return f". For keras_hub's preset write 'kaggle://keras/{family}/keras/{handle}'"
    repository = re.fullmatch(r"(?:https://huggingface\.co/)?(\w[\w.-]*/\w[\w.-]*)/?", path)
    return f". On Hugging Face it would be 'hf://{repository[1]}'" if repository else ""


def _recognise(path, config_path, values):
    if not isinstance(values, dict):
        raise ValueError(f"The config {config_path!r} must be a JSON object.")
    try:
        if values.get("format") == "keras_pg2":
            if values["version"] > _PRESET_VERSION:
                raise ValueError(
                    f"it has version {values['version']}, and this release reads up to "
                    f"{_PRESET_VERSION}. Update keras-pg2."
                )
            preprocessing = values.get("preprocessing") or {}
            if not isinstance(preprocessing, dict):
                raise ValueError(f"`preprocessing` must be an object. Received: {preprocessing!r}")
            if unknown := sorted(set(preprocessing) - {"sequence_length", "interpolation"}):
                raise ValueError(
                    f"`preprocessing` has unknown fields: {unknown}. Update keras-pg2, or remove "
                    "them."
                )
            return Checkpoint(
                "preset",
                PaliGemmaConfig.from_dict(values["config"]),
                path,
                _first_file(path, "tokenizer.model"),
                preprocessing,
                _first_file(path, CODEC_FILE),
            )
        if values.get("model_type") == "paligemma":
            tokenizer = _first_file(path, "tokenizer.model", "tokenizer.json")
            return Checkpoint("hf", _hugging_face_config(values), path, tokenizer)
        if values.get("class_name") == "PaliGemmaBackbone":
            tokenizer = _first_file(path, os.path.join("assets", "tokenizer", "vocabulary.spm"))
            return Checkpoint("keras-hub", _keras_hub_config(values["config"]), path, tokenizer)
    except KeyError as error:
        raise ValueError(f"The config {config_path!r} lacks the field {error}.") from error
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"The config {config_path!r} is not as expected: {error}") from error
    raise ValueError(
        f"The config {config_path!r} is of no PaliGemma model. "
        f"Received: model_type={values.get('model_type')!r}, class={values.get('class_name')!r}"
    )


def _first_file(folder, *candidates):
    paths = [os.path.join(folder, name) for name in candidates]
    return next((path for path in paths if os.path.isfile(path)), None)


def fetch(name, files=_HUB_FILES):
    """Downloads what hf:// and kaggle:// name.

    Args:
        name: path, or "hf://org/repo" with "@revision" if wanted, or
            "kaggle://owner/model/framework/variation".
        files: tuple of patterns of file names. Kaggle gives one file or all.

    Returns:
        path of the folder, or `name` if it is of neither hub.

    Raises:
        ConnectionError: if the download fails.
        FileNotFoundError: if there is nothing of that name.
        ImportError: if the hub's package is missing.
        PermissionError: if a licence must be accepted first.
        ValueError: if the hub has no such names.
    """
    hub, is_address, handle = os.fspath(name).partition("://")
    if is_address and hub == "hf":
        return _download_hugging_face(handle, list(files))
    if is_address and hub == "kaggle":
        return _download_kaggle(handle, files[0] if len(files) == 1 else None)
    return name


def _fetch_config(name):
    """`fetch` of the config alone, or of all where there is none, as beside a big_vision file."""
    try:
        path = fetch(name, ("config.json",))
    except (FileNotFoundError, ValueError):  # so Kaggle refuses a file that is not there
        return fetch(name)
    return path if os.path.exists(os.path.join(path, "config.json")) else fetch(name)


def _is_of_the_system(error):
    """Whether an error is of the operating system, such as a full disk, and not of a hub."""
    return getattr(error, "errno", None) is not None


def _download_hugging_face(handle, files):
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError(
            "Downloading from Hugging Face needs `pip install huggingface_hub`."
        ) from error
    repository, _, revision = handle.partition("@")
    page = f"https://huggingface.co/{repository}"
    try:
        return huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=files
        )
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repository} is gated. Accept its licence at {page}, make an access token, and run "
            "`hf auth login` (in a notebook: `huggingface_hub.login()`) or set HF_TOKEN."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"There is no {handle} on Hugging Face, or it is private. Look at {page}, and run "
            "`hf auth login` if it needs an account."
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(f"`hf://{handle}` must be hf://org/repo: {error}") from error
    except Exception as error:  # the HTTP library's are other classes in each release
        if _is_of_the_system(error):
            raise
        raise ConnectionError(
            f"Hugging Face did not give {handle}: {error}. Run it again with a connection: files "
            "that are complete are kept."
        ) from error


def _download_kaggle(handle, file):
    try:
        import kagglehub
        from kagglehub.exceptions import KaggleApiHTTPError
    except ImportError as error:
        raise ImportError("Downloading from Kaggle needs `pip install kagglehub`.") from error
    try:
        path = kagglehub.model_download(handle, file)
        return path if file is None else os.path.dirname(path)
    except KaggleApiHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            page = f"https://www.kaggle.com/models/{'/'.join(handle.split('/')[:2])}"
            raise PermissionError(
                f"Kaggle refused {handle}. Accept the licence at {page}, and log in with "
                "`kagglehub.login()` or the variables KAGGLE_USERNAME and KAGGLE_KEY."
            ) from error
        if status == 404:
            raise FileNotFoundError(f"There is no {handle} on Kaggle: {error}") from error
        raise ConnectionError(f"Kaggle did not give {handle}: {error}") from error
    except ValueError as error:
        raise ValueError(
            f"`kaggle://{handle}` must be kaggle://owner/model/framework/variation: {error}"
        ) from error
    except Exception as error:
        if _is_of_the_system(error):
            raise
        raise ConnectionError(f"Kaggle did not give {handle}: {error}") from error


# Configs of other libraries -----------------------------------------------------------------


def _hugging_face_config(values):
    """transformers' config.json, old and new.

    What published ones leave out has the defaults of its classes.
    """
    vision, text = values["vision_config"], values["text_config"]
    is_gemma2 = text["model_type"] == "gemma2"
    text = {**(_GEMMA2_DEFAULTS if is_gemma2 else {}), **text}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"The rotary embedding of PaliGemma is never scaled. Received: {kind!r}")
    text_activation = text.get("hidden_activation" if is_gemma2 else "hidden_act")
    if text_activation == "gelu" and not is_gemma2:
        text_activation = "gelu_pytorch_tanh"  # what transformers reads old configs of Gemma 1 as
    for activation in (text_activation, vision.get("hidden_act")):
        if activation not in (None, "gelu_pytorch_tanh"):
            raise ValueError(
                f"PaliGemma's activation is 'gelu_pytorch_tanh'. Received: {activation!r}"
            )
    max_positions = text.get("max_position_embeddings", 8_192)
    window = _window(text.get("sliding_window"), max_positions) if is_gemma2 else None
    if layer_types := text.get("layer_types") if window else None:
        default = [("sliding_attention", "full_attention")[i % 2] for i in range(len(layer_types))]
        if "sliding_attention" not in layer_types:
            window = None
        elif layer_types != default:
            raise ValueError(
                "The sliding window is that of the first block and of every other one after it. "
                f"Received: layer_types={layer_types}"
            )
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
            vocab_size=values.get("image_token_index", values.get("image_token_id", 257_152)),
            sliding_window=window,
            max_positions=max_positions,
            rope_base=float(text.get("rope_theta", rope.get("rope_theta", 10_000.0))),
            norm_eps=text.get("rms_norm_eps", 1e-6),
        ),
    )


def _window(size, max_positions=math.inf):
    """The sliding window of another library's config, or None.

    The 4,096 that transformers and keras_hub write is their own: PaliGemma was trained without.
    """
    return None if size in (None, 4_096) or size >= max_positions else size


def _hugging_face_json(config, dtype):
    """The config.json that transformers 4.46 and later read."""
    vision, text = config.vision, config.text
    text_config = {
        "model_type": "gemma2" if text.use_post_norms else "gemma",
        "hidden_size": text.width,
        "num_hidden_layers": text.depth,
        "intermediate_size": text.mlp_dim,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "vocab_size": text.vocab_size + io.HUGGING_FACE_FILLER_ROWS,
        "num_image_tokens": vision.num_tokens,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": text.max_positions,
        "rope_theta": text.rope_base,
        "rms_norm_eps": float(text.norm_eps),
        "torch_dtype": dtype,
    }
    scalar = text.query_pre_attn_scalar
    if text.use_post_norms:
        # transformers 5 checks types: it wants the scalar an integer, and caps no integers.
        if scalar != int(scalar):
            raise ValueError(
                "transformers has integers alone for query_pre_attn_scalar. "
                f"Received: query_pre_attn_scalar={scalar}"
            )
        caps = (text.attn_logit_softcap, text.final_logit_softcap)
        attn_cap, final_cap = (None if cap is None else float(cap) for cap in caps)
        text_config |= {
            "query_pre_attn_scalar": int(scalar),
            "attn_logit_softcapping": attn_cap,
            "final_logit_softcapping": final_cap,
            # transformers has no "off"; no sequence is longer than this.
            "sliding_window": text.sliding_window or text.max_positions,
        }
    elif text.attn_logit_softcap or text.final_logit_softcap or text.sliding_window:
        raise ValueError(
            "transformers has no soft caps for Gemma 1 (`use_post_norms=False`), and no sliding "
            "window."
        )
    elif scalar != text.head_dim:
        raise ValueError(
            "transformers scales the queries of Gemma 1 by head_dim ** -0.5. Received: "
            f"query_pre_attn_scalar={scalar}, head_dim={text.head_dim}"
        )
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "hidden_size": text.width,
        "projection_dim": text.width,
        "image_token_index": text.vocab_size,
        "torch_dtype": dtype,
        "text_config": text_config,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": vision.width,
            "num_hidden_layers": vision.depth,
            "intermediate_size": vision.mlp_dim,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": float(vision.norm_eps),
            "num_image_tokens": vision.num_tokens,
            "projection_dim": text.width,
            "vision_use_head": False,
            "torch_dtype": dtype,
        },
    }


def _keras_hub_config(values):
    """keras_hub's backbone config; `intermediate_dim` is the width of both gates together."""
    is_gemma2 = bool(values.get("use_post_ffw_norm"))
    head_dim, width = values["head_dim"], values["hidden_dim"]
    normalize = values.get("query_head_dim_normalize", True)
    has_window = values.get("use_sliding_window_attention")
    window = _window(values.get("sliding_window_size")) if has_window else None
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
            sliding_window=window,
            vocab_size=values["vocabulary_size"],
            norm_eps=values.get("layer_norm_epsilon", 1e-6),
        ),
    )


def _keras_hub_json(config, dtype):
    """The arguments of keras_hub's PaliGemmaBackbone."""
    vision, text = config.vision, config.text
    scalars = {text.head_dim: True, text.width / text.num_heads: False}
    if text.query_pre_attn_scalar not in scalars:
        raise ValueError(
            f"keras_hub scales queries by one of {sorted(scalars)} ** -0.5. "
            f"Received: query_pre_attn_scalar={text.query_pre_attn_scalar}"
        )
    if text.rope_base != 10_000.0:
        raise ValueError(f"keras_hub has rope_base=10000. Received: rope_base={text.rope_base}")
    if (vision.norm_eps, text.norm_eps) != (1e-6, 1e-6):
        raise ValueError(
            f"keras_hub has norm_eps=1e-6. Received: {vision.norm_eps} in the vision tower, "
            f"{text.norm_eps} in the decoder"
        )
    return {
        "name": "pali_gemma_backbone",
        "trainable": True,
        "dtype": _keras_json("keras", "DTypePolicy", {"name": dtype}),
        "vocabulary_size": text.vocab_size,
        "image_size": vision.image_size,
        "num_layers": text.depth,
        "num_query_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "hidden_dim": text.width,
        "intermediate_dim": 2 * text.mlp_dim,
        "head_dim": text.head_dim,
        "vit_patch_size": vision.patch_size,
        "vit_num_heads": vision.num_heads,
        "vit_hidden_dim": vision.width,
        "vit_num_layers": vision.depth,
        "vit_intermediate_dim": vision.mlp_dim,
        "query_head_dim_normalize": scalars[text.query_pre_attn_scalar],
        "use_post_ffw_norm": text.use_post_norms,
        "use_post_attention_norm": text.use_post_norms,
        "final_logit_soft_cap": text.final_logit_softcap,
        "attention_logit_soft_cap": text.attn_logit_softcap,
        "use_sliding_window_attention": text.sliding_window is not None,
        "sliding_window_size": text.sliding_window or 4096,
        "layer_norm_epsilon": text.norm_eps,
    }


def _keras_json(module, class_name, config):
    """An object of keras or keras_hub, as `keras.saving` serializes it."""
    is_of_hub = module.startswith("keras_hub.")
    return {
        "module": module,
        "class_name": class_name,
        "config": config,
        "registered_name": f"keras_hub>{class_name}" if is_of_hub else None,
    }


def _read_big_vision(path):
    """Tensors by names that begin with "params/", which some files leave out."""
    tensors = io.read_npz(path)
    if not any(name.startswith("params/") for name in tensors):
        tensors = {f"params/{name}": tensor for name, tensor in tensors.items()}
    return tensors


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
        return PaliGemmaConfig(vision, decoder)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"The file {path!r} is no big_vision PaliGemma: {error}") from error


# Writing ------------------------------------------------------------------------------------


def save_checkpoint(
    path,
    format,
    config,
    weights,
    preprocessor=None,
    dtype=None,
    overwrite=False,
    verbose=True,
    codec=None,
):
    """Writes a checkpoint under a temporary name and renames it when it is complete.

    Args:
        path: path of a folder, or of a `.npz` file for "big-vision".
        format: str, one of `FORMATS`.
        config: PaliGemmaConfig.
        weights: dict of path to LazyTensor, in our layout.
        preprocessor: Preprocessor or None.
        dtype: str or None, dtype to store; None keeps that of `weights`.
        overwrite: bool, whether to replace what is there.
        verbose: bool, whether to show progress.
        codec: bytes or None, file of a `<seg>` codec. Only "preset" holds one; without
            it a warning is logged.

    Logs a warning with the arguments that `from_preset` needs if it would not read all of the
    config from the checkpoint.

    Raises:
        FileExistsError: if `path` exists and `overwrite` is False, is a file instead of a folder or
            the other way round, or a folder that holds other things than a checkpoint.
        OSError: if the disk is too full; what was there is left as it was.
        ValueError: if the format cannot express the config or has no place for some weights, or
            `path` does not fit the format.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {FORMATS}. Received: format={format!r}")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(
            f"`dtype` must be 'float32', 'bfloat16', 'float16' or None. Received: dtype={dtype!r}"
        )
    if format == "big-vision" and not os.fspath(path).endswith(".npz"):
        raise ValueError(
            f"A big_vision checkpoint is a file whose name ends in .npz. Received: {path!r}"
        )
    weights = {name: tensor.cast(dtype) for name, tensor in weights.items()}
    stored_dtype = io.common_dtype(weights.values())
    tensors = io.to_source(weights, format, config)
    files, found = {}, config
    if format == "hf":
        files = _hugging_face_files(config, stored_dtype, preprocessor)
        found = _hugging_face_config(files["config.json"])
    elif format == "keras-hub":
        files = _keras_hub_files(config, stored_dtype, preprocessor, weights)
        found = _keras_hub_config(files["config.json"]["config"])
    elif format == "big-vision":
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        found = _big_vision_config(shapes, path)
    else:
        files = _preset_files(config, preprocessor)
    _check_lost_fields(format, config.to_dict(), found.to_dict())
    if codec is not None and format == "preset":
        files[CODEC_FILE] = codec
    elif codec is not None:
        _LOG.warning(
            "A checkpoint of the format %r holds no `<seg>` codec, without which the official one "
            "makes the masks. Keep the model's own: `model.get_codec().save_file(path)`.",
            format,
        )
    total = sum(tensor.num_bytes for tensor in tensors.values())
    with (
        tqdm.tqdm(total=total, unit="B", unit_scale=True, disable=not verbose) as bar,
        io.replace_when_done(path, overwrite, total, is_folder=format != "big-vision") as new,
    ):
        if format == "big-vision":
            io.write_npz(new, tensors, bar.update)
            return
        os.makedirs(new)
        for name, content in files.items():
            os.makedirs(os.path.dirname(os.path.join(new, name)), exist_ok=True)
            if isinstance(content, bytes):
                with open(os.path.join(new, name), "wb") as file:
                    file.write(content)
            else:
                io.write_json(os.path.join(new, name), content)
        if format == "keras-hub":
            io.write_h5(os.path.join(new, "model.weights.h5"), tensors, bar.update)
        else:
            io.write_safetensors(new, tensors, bar.update)


def _check_lost_fields(format, config, found):
    """Compares with `found`, what `from_preset` reads: warns of fields that it must be told.

    Raises:
        ValueError: if a field has another value that it cannot be told.
    """
    lost = []
    for tower, fields in config.items():
        for field, value in fields.items():
            if value == found[tower][field]:
                continue
            if all(field in other for other in config.values()):  # `from_preset` cannot set it
                raise ValueError(
                    f"A checkpoint of the format {format!r} has {field}={found[tower][field]} in "
                    f"the {tower} tower. Received: {field}={value}"
                )
            lost.append(f"{field}={value!r}")
    if lost:
        _LOG.warning(
            "A checkpoint of the format %r does not tell all of this config. Read it by "
            "`from_preset(..., %s)`.",
            format,
            ", ".join(lost),
        )


def upload(target, write, replaced=None):
    """Writes a folder and uploads it to a hub.

    Args:
        target: "hf://org/repo", made if missing, or "kaggle://owner/model/framework/variation".
        write: callable that writes the folder at a path, which may take long.
        replaced: list of patterns of file names, or None. Files of these names that are there and
            are not written now are deleted from Hugging Face. A version on Kaggle has only what is
            written.

    Raises:
        ImportError: if the hub's package is missing.
        ValueError: if `target` is neither.
    """
    hub, _, handle = target.partition("://")
    try:
        if hub == "hf":
            import huggingface_hub

            huggingface_hub.whoami()  # nobody shall wait for `write` who is not logged in
        elif hub == "kaggle":
            import kagglehub
        else:
            raise ValueError(
                "`target` must be hf://org/repo or kaggle://owner/model/framework/variation. "
                f"Received: target={target!r}"
            )
    except ImportError as error:
        package = "huggingface_hub" if hub == "hf" else "kagglehub"
        raise ImportError(f"Uploading needs `pip install {package}`.") from error
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "upload")
        write(path)
        if hub == "hf":
            huggingface_hub.create_repo(handle, exist_ok=True)
            huggingface_hub.upload_folder(
                repo_id=handle, folder_path=path, delete_patterns=replaced
            )
        else:
            kagglehub.model_upload(handle, path)


def _preset_files(config, preprocessor):
    files = {
        "config.json": {
            "format": "keras_pg2",
            "version": _PRESET_VERSION,
            "config": config.to_dict(),
            "preprocessing": preprocessor
            and {k: v for k, v in preprocessor.get_config().items() if k != "image_size"},
        }
    }
    if preprocessor is not None:
        files["tokenizer.model"] = preprocessor.tokenizer.model
    return files


def _hugging_face_files(config, dtype, preprocessor):
    files = {"config.json": _hugging_face_json(config, dtype)}
    if preprocessor is None:
        return files
    size = config.vision.image_size
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    special |= {"unk_token": "<unk>", "additional_special_tokens": ["<image>"]}
    # Without these entries transformers' `AutoTokenizer` would spell `<loc0001>` letter by letter.
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    tokenizer = preprocessor.tokenizer
    added = {
        str(id): {"content": tokenizer.decode([id]), **flags}
        for id in (*tokenizer.location_ids, *tokenizer.segment_ids)
    }
    return files | {
        "preprocessor_config.json": {
            "processor_class": "PaliGemmaProcessor",
            "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": config.vision.num_tokens,
            "size": {"height": size, "width": size},
            "resample": 3,
            "do_convert_rgb": True,
            "do_resize": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        "tokenizer_config.json": {
            "tokenizer_class": "GemmaTokenizer",
            "processor_class": "PaliGemmaProcessor",
            "add_bos_token": True,
            "add_eos_token": False,
            # Else transformers adds one, before <image>, where the vocabulary has none.
            "mask_token": None,
            "added_tokens_decoder": added,
            **special,
        },
        "special_tokens_map.json": special,
        "tokenizer.model": preprocessor.tokenizer.model_with_extra_tokens,
    }


def _keras_hub_files(config, dtype, preprocessor, weights):
    hub = "keras_hub.src.models.pali_gemma."
    backbone = _keras_json(
        f"{hub}pali_gemma_backbone", "PaliGemmaBackbone", _keras_hub_json(config, dtype)
    )
    count = sum(math.prod(tensor.shape) for tensor in weights.values())
    files = {
        "config.json": backbone,
        "metadata.json": {
            "keras_version": keras.__version__,
            "keras_hub_version": "0.32.0",
            "parameter_count": count,
            "tasks": ["CausalLM"],
        },
    }
    if preprocessor is None:
        return files
    shared = {"trainable": True, "dtype": _keras_json("keras", "DTypePolicy", {"name": "float32"})}
    tokenizer = _keras_json(
        f"{hub}pali_gemma_tokenizer",
        "PaliGemmaTokenizer",
        {
            "name": "pali_gemma_tokenizer",
            "trainable": True,
            "dtype": _keras_json("keras", "DTypePolicy", {"name": "int32"}),
            "config_file": "tokenizer.json",
            "proto": None,
            "sequence_length": None,
            "add_bos": False,
            "add_eos": False,
        },
    )
    size = config.vision.image_size
    image_converter = _keras_json(
        f"{hub}pali_gemma_image_converter",
        "PaliGemmaImageConverter",
        {
            "name": "pali_gemma_image_converter",
            **shared,
            "image_size": [size, size],
            "scale": 1 / 127.5,
            "offset": -1,
            "interpolation": preprocessor.interpolation,
            # keras_hub's own presets crop and do not antialias, unlike the training.
            "antialias": True,
            "crop_to_aspect_ratio": False,
        },
    )
    task_preprocessor = _keras_json(
        f"{hub}pali_gemma_causal_lm_preprocessor",
        "PaliGemmaCausalLMPreprocessor",
        {
            "name": "pali_gemma_causal_lm_preprocessor",
            **shared,
            "tokenizer": tokenizer,
            "image_converter": image_converter,
            "config_file": "preprocessor.json",
            "sequence_length": preprocessor.sequence_length,
            "add_start_token": True,
            "add_end_token": True,
        },
    )
    task = {"backbone": backbone, "preprocessor": task_preprocessor, "name": "pali_gemma_causal_lm"}
    return files | {
        "tokenizer.json": tokenizer,
        "image_converter.json": image_converter,
        "preprocessor.json": task_preprocessor,
        "task.json": _keras_json(f"{hub}pali_gemma_causal_lm", "PaliGemmaCausalLM", task),
        os.path.join("assets", "tokenizer", "vocabulary.spm"): (
            preprocessor.tokenizer.model_with_extra_tokens
        ),
    }
