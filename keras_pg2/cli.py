"""The `keras-pg2` command."""

import argparse
import os
import sys


def main(argv=None):
    """Runs the command. Returns the exit code: 0, or 1 after an error that was printed."""
    parser = argparse.ArgumentParser(
        prog="keras-pg2",
        description="PaliGemma 2 on JAX, TensorFlow or PyTorch (set KERAS_BACKEND).",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser(
        "generate",
        help="answer a prompt about a picture",
        epilog='example: keras-pg2 generate cat.jpg "caption en" --preset paligemma2-3b-mix-224/',
    )
    generate.add_argument("image", help="path of a picture")
    generate.add_argument("prompt", help='such as "caption en", "detect cat" or "ocr"')
    generate.add_argument(
        "--preset", required=True, help="path of a Hugging Face, keras_hub or big_vision checkpoint"
    )
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    options = parser.parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

    import keras_pg2  # after the arguments are checked: importing a backend takes seconds

    try:
        model = keras_pg2.PaliGemma2.from_preset(options.preset)
        pieces = model.stream(options.image, options.prompt, max_new_tokens=options.max_new_tokens)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    except (ValueError, OSError) as error:
        print(f"keras-pg2: {error}", file=sys.stderr)
        return 1
    return 0
