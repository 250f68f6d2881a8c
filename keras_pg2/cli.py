"""The `keras-pg2` command."""

import argparse
import collections
import json
import math
import os
import sys

_EPILOG = """examples:
  keras-pg2 generate cat.jpg "caption en" --preset paligemma2-3b-mix-224
  keras-pg2 info paligemma2-3b
  keras-pg2 convert my_preset/ my_model_hf/ --to hf --dtype bfloat16
"""
_CHECKPOINT = (
    "official name, hf://org/repo, kaggle://owner/model/framework/variation, or path of a "
    "checkpoint (our own, Hugging Face, keras_hub, big_vision .npz)"
)
_FORMATS = ("preset", "hf", "keras-hub", "big-vision")
_DTYPES = ("float32", "bfloat16", "float16")


def main(argv=None):
    """Runs the command. Returns the exit code: 0, or 1 after an error that was printed."""
    options = _parser().parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"keras-pg2: {error}", file=sys.stderr)
        return 1
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="keras-pg2",
        description="PaliGemma 2 on JAX, TensorFlow or PyTorch (set KERAS_BACKEND).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    generate = commands.add_parser("generate", help="answer a prompt about a picture")
    generate.add_argument("image", help="path of a picture")
    generate.add_argument("prompt", help='such as "caption en", "detect cat" or "ocr"')
    generate.add_argument("--preset", required=True, help=_CHECKPOINT)
    generate.add_argument(
        "--tokenizer", help="path of a tokenizer.model, for a .npz, which has none"
    )
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    generate.set_defaults(run=_generate)

    info = commands.add_parser("info", help="show what a checkpoint is and needs")
    info.add_argument(
        "checkpoint",
        help=f"{_CHECKPOINT}; or an architecture such as paligemma2-3b, with --image-size",
    )
    info.add_argument("--image-size", type=int, default=224, metavar="PIXELS")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    convert = commands.add_parser("convert", help="write a checkpoint in another format")
    convert.add_argument("source", help=_CHECKPOINT)
    convert.add_argument("destination", help="path of a new folder, or of a .npz file")
    convert.add_argument("--to", required=True, choices=_FORMATS, help="format to write")
    convert.add_argument("--dtype", choices=_DTYPES, help="dtype to store; default: the source's")
    convert.add_argument("--tokenizer", help="path of a tokenizer.model, if the source has none")
    convert.add_argument("--force", action="store_true", help="replace the destination")
    convert.set_defaults(run=_convert)
    return parser


# The package is imported inside: a backend takes seconds, and errors of usage should not.


def _generate(options):
    import keras_pg2

    model = keras_pg2.PaliGemma2.from_preset(options.preset, tokenizer=options.tokenizer)
    pieces = model.stream(options.image, options.prompt, max_new_tokens=options.max_new_tokens)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _info(options):
    from keras_pg2.checkpoints import names, presets
    from keras_pg2.config import VARIANTS, PaliGemmaConfig

    stored = {}
    if options.checkpoint in VARIANTS:
        kind = "architecture"
        config = PaliGemmaConfig.from_variant(options.checkpoint, options.image_size)
    else:
        checkpoint = presets.find_checkpoint(options.checkpoint)
        kind, config = f"{checkpoint.format} checkpoint", checkpoint.config
        stored = collections.Counter()
        for tensor in checkpoint.weights().values():
            stored[tensor.dtype] += math.prod(tensor.shape)
    parameters = collections.Counter()
    for spec in names.tensor_specs("preset", config):
        parameters[spec.path.split("/")[0]] += math.prod(spec.shape)
    total = sum(parameters.values())
    text = config.text
    # Key and value of each token in each block; weights and cache are all but all of the need.
    cache_values = 2 * text.depth * text.num_kv_heads * text.head_dim
    tokens = config.vision.num_tokens + 128
    info = {
        "kind": kind,
        "config": config.to_dict(),
        "parameters": {**parameters, "total": total},
        "stored_parameters": dict(stored),
        "weight_bytes": {"float32": 4 * total, "bfloat16": 2 * total, "float16": 2 * total},
        "generate_bytes": {
            "bfloat16": 2 * (total + cache_values * tokens),
            "float32": 4 * (total + cache_values * tokens),
        },
    }
    if options.json:
        print(json.dumps(info, indent=2))
        return
    print(f"{options.checkpoint}: {kind}")
    for tower, fields in info["config"].items():
        print(f"  {tower:10}" + ", ".join(f"{name}={value}" for name, value in fields.items()))
    print("parameters")
    for part, count in info["parameters"].items():
        print(f"  {part:10}{count:>16,}")
    for dtype, count in stored.items():
        print(f"stored as {dtype}: {count:,} parameters")
    print("bytes of weights")
    for dtype, size in info["weight_bytes"].items():
        print(f"  {dtype:10}{size / 1e9:>12.2f} GB")
    print("to generate with 1 image and 128 tokens of text, batch 1 (weights and cache)")
    for dtype, size in info["generate_bytes"].items():
        print(f"  {dtype:10}{size / 1e9:>12.2f} GB")


def _convert(options):
    from keras_pg2.checkpoints import presets
    from keras_pg2.preprocessing import Preprocessor
    from keras_pg2.tokenizer import Tokenizer

    if os.path.lexists(options.destination) and not options.force:
        raise FileExistsError(
            f"{options.destination!r} exists already. Pass --force to replace it."
        )
    checkpoint = presets.find_checkpoint(options.source)
    tokenizer = options.tokenizer or checkpoint.tokenizer
    preprocessor = None
    if tokenizer is not None:
        size = checkpoint.config.vision.image_size
        preprocessor = Preprocessor(
            Tokenizer.from_file(tokenizer), size, **checkpoint.preprocessing
        )
    elif options.to != "big-vision":
        print(
            "keras-pg2: the source has no tokenizer; pass --tokenizer to write one too",
            file=sys.stderr,
        )
    codec = None
    if checkpoint.codec is not None:
        with open(checkpoint.codec, "rb") as file:
            codec = file.read()
    presets.save_checkpoint(
        *(options.destination, options.to, checkpoint.config, checkpoint.weights(), preprocessor),
        dtype=options.dtype,
        overwrite=options.force,
        codec=codec,
    )
