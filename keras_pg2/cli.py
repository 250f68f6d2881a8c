"""The `keras-pg2` command."""

import argparse
import collections
import contextlib
import glob
import itertools
import json
import math
import os
import sys

import tqdm
from PIL import Image

from keras_pg2 import PaliGemma2, PaliGemmaConfig, __version__, draw, tasks
from keras_pg2.checkpoints import io, presets
from keras_pg2.checkpoints.names import tensor_specs
from keras_pg2.config import VARIANTS
from keras_pg2.preprocessing import checked_preprocessor, image_pixels

_EPILOG = """examples:
  keras-pg2 caption cat.jpg --preset paligemma2-3b-mix-224
  keras-pg2 detect photos/ "cat ; dog" --preset paligemma2-3b-mix-448 --draw drawn/
  keras-pg2 answer "photos/*.jpg" "how many people are there?" --json > answers.jsonl
  keras-pg2 generate cat.jpg "describe en" --stream
  keras-pg2 info paligemma2-3b
  keras-pg2 convert my_preset/ my_model_hf/ --to hf --dtype bfloat16
"""
_CHECKPOINT = (
    "official name, hf://org/repo, kaggle://owner/model/framework/variation, or path of a "
    "checkpoint (our own, Hugging Face, keras_hub, big_vision .npz)"
)
_IMAGE_ENDINGS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg"),
    *(".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
_DTYPES = ("float32", "bfloat16", "float16")


def run():
    """Runs the command, and ends the process."""
    code = main()
    if code == 130:  # at once: jax may crash if Python ends while it compiles
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def main(argv=None):
    """Runs the command.

    Returns:
        int, 0; 1 after errors that were printed; 130 after Ctrl+C; 141 after `| head`.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    options = _parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # no letter ends a run, whatever the terminal knows
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = options.run(options) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as by `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError) as error:
        _report(error)
        return 1
    except KeyboardInterrupt:  # as a shell reports it
        return 130


def _report(message):
    print(f"keras-pg2: {message}", file=sys.stderr)


def _parser():
    parser = argparse.ArgumentParser(
        prog="keras-pg2",
        description="PaliGemma 2 on JAX, TensorFlow or PyTorch (set KERAS_BACKEND).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"keras-pg2 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    generate = _add_task(commands, "generate", "answer a prompt about images")
    generate.add_argument("prompt", help='such as "caption en", "detect cat" or "ocr"')
    caption = _add_task(commands, "caption", "say what images show")
    caption.add_argument(
        "--style", default="coco", choices=tuple(tasks.CAPTION_STYLES), help="default: coco"
    )
    answer = _add_task(commands, "answer", "answer a question about images")
    answer.add_argument("question")
    for task in (caption, answer):
        task.add_argument("--lang", default="en", help="code of a language; default: en")
    ocr = _add_task(commands, "ocr", "read the text in images")
    for task in (generate, caption, answer, ocr):
        task.add_argument(
            "--stream", action="store_true", help="show the answer while it is made; one image"
        )
    for name, help in (
        ("detect", "find things, with boxes"),
        ("segment", "find things, with boxes and masks"),
    ):
        task = _add_task(commands, name, help)
        task.add_argument("things", help='names of what to find, such as "cat ; dog"')
        task.add_argument(
            "--draw",
            metavar="OUT",
            help="write images with boxes and masks: a .png file for one image, else a folder",
        )
        task.add_argument(
            "--constrained", action="store_true", help="let the model say well-formed things only"
        )
        if name == "segment":
            _add_codec(task)

    demo = commands.add_parser("demo", help="serve a web page to try a model on")
    _add_model(demo)
    _add_codec(demo)
    demo.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    demo.add_argument("--port", type=int, default=7860, help="default: 7860; 0: any free")
    demo.add_argument(
        "--share",
        action="store_true",
        help="also serve it for three days at a public address that Gradio gives, as a hosted "
        "notebook needs",
    )
    demo.set_defaults(run=_demo)

    info = commands.add_parser(
        "info",
        help="show what a checkpoint is and needs; weights are not downloaded, but for a .npz",
    )
    info.add_argument(
        "checkpoint",
        help=f"{_CHECKPOINT}; or an architecture such as paligemma2-3b, with --image-size",
    )
    info.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="default: the checkpoint's, or 224"
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    convert = commands.add_parser("convert", help="write a checkpoint in another format")
    convert.add_argument("source", help=_CHECKPOINT)
    convert.add_argument("destination", help="path of a new folder, or of a .npz file")
    convert.add_argument("--to", required=True, choices=presets.FORMATS, help="format to write")
    convert.add_argument("--dtype", choices=_DTYPES, help="dtype to store; default: the source's")
    convert.add_argument("--tokenizer", help="path of a tokenizer.model, if the source has none")
    convert.add_argument("--force", action="store_true", help="replace the destination")
    convert.set_defaults(run=_convert)
    return parser


def _add_task(commands, name, help):
    task = commands.add_parser(
        name, help=help, description=f"{help[0].upper()}{help[1:]}. Options go last."
    )
    task.add_argument("images", nargs="+", metavar="image", help="an image, a folder or a pattern")
    _add_model(task)
    task.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens of an answer")
    task.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: 8")
    task.add_argument("--json", action="store_true", help="print a line of JSON for each image")
    task.set_defaults(run=_run_task)
    return task


def _add_model(command):
    command.add_argument("--preset", help=f"{_CHECKPOINT}; default: {presets.TINY}")
    command.add_argument(
        "--tokenizer", help="path of a tokenizer.model, for a .npz, which has none"
    )
    command.add_argument(
        "--dtype", default="auto", choices=("auto", *_DTYPES), help="default: the fastest here"
    )
    command.add_argument(
        "--quantize", choices=("int8", "int4"), help="weights of 8 or 4 bits, for less memory"
    )


def _add_codec(command):
    command.add_argument("--codec", metavar="FILE", help="vae-oid.npz, if not to be downloaded")


def _load(options):
    """The model of a command."""
    if options.preset is None:
        _report(f"the preset is {presets.TINY}, which knows digits and shapes alone; see --preset")
    model = PaliGemma2.from_preset(
        options.preset or presets.TINY,
        dtype=options.dtype,
        quantize=options.quantize,
        tokenizer=options.tokenizer,
    )
    if model.preprocessor is None:
        raise ValueError(
            f"The checkpoint {options.preset!r} has no tokenizer: pass the path of "
            "paligemma_tokenizer.model as --tokenizer."
        )
    if getattr(options, "codec", None):
        model.use_codec(options.codec)
    return model


def _run_task(options):
    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be positive. Received: {options.batch_size}")
    paths = _image_paths(options.images)
    drawn_paths = _drawn_paths(options.images, paths, getattr(options, "draw", None))
    if getattr(options, "stream", False) and (len(paths) > 1 or options.json):
        raise ValueError("--stream goes with one image, and not with --json.")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be positive. Received: {options.max_new_tokens}")
    codec = getattr(options, "codec", None)
    if codec and not os.path.isfile(os.path.expanduser(codec)):
        raise FileNotFoundError(f"No such file for --codec: {codec!r}")
    prompt = _prompt(options)  # all that can be wrong is found before a model is loaded
    model = _load(options)
    num_failures = 0
    # Not on a terminal there is no bar.
    with tqdm.tqdm(total=len(paths), unit="image", disable=len(paths) == 1 or None) as bar:
        for start in range(0, len(paths), options.batch_size):
            images = {}
            for path in paths[start : start + options.batch_size]:
                try:
                    images[path] = Image.fromarray(image_pixels(path))
                except (ValueError, OSError) as error:
                    if len(paths) == 1:
                        raise
                    num_failures += 1
                    tqdm.tqdm.write(f"keras-pg2: {error}", file=sys.stderr)
            answers = _answers(model, options, prompt, list(images.values())) if images else []
            for (path, image), answer in zip(images.items(), answers):
                line = _line(path, answer, options.json, len(paths) > 1)
                if line is not None:
                    tqdm.tqdm.write(line, file=sys.stdout)
                if drawn_paths:
                    with io.replace_when_done(drawn_paths[path]) as new, open(new, "wb") as file:
                        draw(image, answer).save(file, "PNG")
            bar.update(len(paths[start : start + options.batch_size]))
    if num_failures:
        _report(f"{num_failures} of {len(paths)} images could not be read")
    return int(num_failures > 0)


def _demo(options):
    try:
        from keras_pg2 import demo
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ImportError("`keras-pg2 demo` needs `pip install gradio`.") from error
    title = options.preset or presets.TINY
    page = demo.launch(_load(options), title, options.host, options.port, options.share)
    addresses = " and ".join(filter(None, [page.local_url, page.share_url]))
    _report(f"{title} is served at {addresses}; Ctrl+C ends it")
    page.block_thread()


def _image_paths(names):
    """Paths of images from files, folders and patterns."""
    paths = []
    for name in names:
        if os.path.isdir(name):
            found = sorted(
                os.path.join(name, entry)
                for entry in os.listdir(name)
                if entry.lower().endswith(_IMAGE_ENDINGS)
                and not os.path.isdir(os.path.join(name, entry))
            )
            if not found:
                raise FileNotFoundError(f"The folder {name!r} has no images.")
        elif os.path.exists(name):
            found = [name]
        elif "://" in name:
            raise FileNotFoundError(f"Addresses are not fetched: download {name!r} first.")
        elif not glob.has_magic(name):
            raise FileNotFoundError(f"No such image file: {name!r}")
        else:
            found = sorted(itertools.filterfalse(os.path.isdir, glob.glob(name, recursive=True)))
            if not found:
                raise FileNotFoundError(f"No file is like {name!r}.")
        paths += found
    return list(dict.fromkeys(paths))


def _drawn_paths(names, paths, out):
    """dict of path to the path of its drawn image; empty without `out`."""
    if out is None:
        return {}
    out = os.path.expanduser(out)
    drawn = {paths[0]: out}
    is_png = out.lower().endswith(".png") and not os.path.isdir(out)
    is_folder = os.path.isdir(out) or out.endswith(os.sep) or names != paths or len(paths) > 1
    if (is_png and len(paths) > 1) or (not is_png and is_folder and os.path.isfile(out)):
        raise ValueError(f"--draw needs a folder for several images. Received: {out!r}")
    if is_folder and not is_png:
        names = [os.path.splitext(os.path.basename(path))[0] for path in paths]
        drawn = {path: os.path.join(out, f"{name}.png") for path, name in zip(paths, names)}
    if len(set(drawn.values())) < len(paths):
        raise ValueError("--draw needs images with different names, since it writes one folder.")
    for path in drawn.values():
        if not path.lower().endswith(".png"):
            raise ValueError(f"--draw writes PNG files. Received: {path!r}")
        if os.path.lexists(path):
            raise FileExistsError(f"{path!r} exists already. Choose another path for --draw.")
        folder = os.path.dirname(os.path.abspath(path))
        while not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        if not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
            raise OSError(f"--draw cannot write {path!r}: {folder!r} takes no files.")
    return drawn


def _prompt(options):
    """The prompt of a command that has one for all images."""
    if options.command == "caption":
        return tasks.caption_prompt(options.lang, options.style)
    if options.command == "answer":
        return tasks.answer_prompt(options.question, options.lang)
    if options.command in ("detect", "segment"):
        return f"{options.command} {' ; '.join(tasks.list_of_things(options.things))}"
    return "ocr" if options.command == "ocr" else options.prompt


def _answers(model, options, prompt, images):
    """list of str or Detections."""
    settings = {**tasks.longest_answer(prompt), "batch_size": options.batch_size}
    if options.max_new_tokens is not None:
        settings["max_new_tokens"] = options.max_new_tokens
    if options.command in ("detect", "segment"):
        find = getattr(model, options.command)
        return find(images, options.things, constrained=options.constrained, **settings)
    if not options.stream:
        return model.generate(images, prompt, **settings)
    del settings["batch_size"]
    for piece in model.stream(images[0], prompt, **settings):
        print(piece, end="", flush=True)
    print()
    return [None]


def _line(path, answer, is_json, has_path):
    """What is printed for an image."""
    if answer is None:
        return None
    is_text = isinstance(answer, str)
    if is_json:
        values = {"text": answer} if is_text else answer.to_dict()
        return json.dumps({"image": path, **values})
    if is_text:
        return f"{path}\t{answer}" if has_path else answer
    lines = []
    for found in answer:
        box = " ".join(f"{place:.1f}" for place in found.box)
        lines.append(f"{found.label}\t{found.score:.2f}\t{box}")
        if found.mask is not None:
            lines[-1] += f"\t{found.mask.sum()} pixels"
    lines = lines or ["nothing found"]
    return "\n".join(f"{path}\t{line}" if has_path else line for line in lines)


def _info(options):
    stored = {}
    if options.checkpoint in VARIANTS:
        kind = "architecture"
        size = 224 if options.image_size is None else options.image_size
        config = PaliGemmaConfig.from_variant(options.checkpoint, size)
    else:
        checkpoint = presets.find_checkpoint(options.checkpoint, only_config=True)
        kind, config = f"{checkpoint.format} checkpoint", checkpoint.config
        if options.image_size is not None:
            config = config.replace(image_size=options.image_size)
        stored = collections.Counter()
        is_here = os.path.exists(os.path.expanduser(options.checkpoint))
        if is_here or options.checkpoint == presets.TINY:
            for tensor in checkpoint.weights().values():
                stored[tensor.dtype] += math.prod(tensor.shape)
    parameters = collections.Counter()
    for spec in tensor_specs("preset", config):
        parameters[spec.path.split("/")[0]] += math.prod(spec.shape)
    total = sum(parameters.values())
    text = config.text
    # Key and value of each token in each block; weights and cache are all but all of the need.
    cache_values = 2 * text.depth * text.num_kv_heads * text.head_dim
    tokens = config.vision.num_tokens + 128
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    info = {
        "kind": kind,
        "config": config.to_dict(),
        "parameters": {**parameters, "total": total},
        "stored_parameters": dict(stored),
        "weight_bytes": {dtype: size * total for dtype, size in sizes.items()},
        "generate_bytes": {
            dtype: size * (total + cache_values * tokens) for dtype, size in sizes.items()
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
    if os.path.lexists(options.destination) and not options.force:
        raise FileExistsError(
            f"{options.destination!r} exists already. Pass --force to replace it."
        )
    io.path_to_write(options.destination)
    checkpoint = presets.find_checkpoint(options.source)
    size = checkpoint.config.vision.image_size
    preprocessor = checked_preprocessor(
        checkpoint.make_preprocessor(size, options.tokenizer), checkpoint.config
    )
    if preprocessor is None and options.to != "big-vision":
        _report("the source has no tokenizer; pass --tokenizer to write one too")
    codec = None
    if checkpoint.codec is not None:
        with open(checkpoint.codec, "rb") as file:
            codec = file.read()
    presets.save_checkpoint(
        options.destination,
        options.to,
        checkpoint.config,
        checkpoint.weights(),
        preprocessor,
        dtype=options.dtype,
        overwrite=options.force,
        codec=codec,
    )
