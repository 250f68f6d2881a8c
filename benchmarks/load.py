"""Loading a full-size checkpoint: time and peak memory, beside transformers and keras_hub.

    python benchmarks/load.py [--backends jax tensorflow torch] [--peers transformers] [--repeat 3]
    python benchmarks/load.py --variant paligemma2-28b --quantize int4 --backends torch

Writes a synthetic PaliGemma 2 3B-224 checkpoint in bfloat16 (6 GB, published names and shapes,
small random values) to a temporary folder, once. Then each loader runs in a process of its own,
interleaved, with the file in the page cache; so does one that reads the tensors and keeps them.
Prints the seconds, their ratio to reading, and the peak resident memory, as a Markdown table of
medians. keras_hub 0.32 reads this folder without an error, but not rightly: it knows no Gemma 2.

With `--quantize` the checkpoint is a sparse file of zeros, which takes no space, and each backend
loads it quantized and generates three tokens.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import ml_dtypes  # noqa: F401  NumPy knows "bfloat16" once this is imported
import safetensors

IMAGE_SIZE = 224


def write_zeros(folder, variant):
    """A checkpoint of zeros that takes no space on the disk."""
    import numpy as np

    from keras_pg2 import PaliGemmaConfig
    from keras_pg2.checkpoints import io, names, presets

    config = PaliGemmaConfig.from_variant(variant, IMAGE_SIZE)
    os.makedirs(folder)
    specs = names.tensor_specs("hf", config)
    header, offset = {}, 0
    for name, shape in {spec.name: names.stacked_shape([spec]) for spec in specs}.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape)}
        header[name]["data_offsets"] = [offset, offset + size]
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(folder, "model.safetensors"), "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    content = presets._hugging_face_files(config, "bfloat16", None)["config.json"]
    io.write_json(os.path.join(folder, "config.json"), content)


def measure_quantized(folder, mode):
    import numpy as np

    import keras_pg2

    start = time.perf_counter()
    model = keras_pg2.PaliGemma2.from_preset(folder, quantize=mode)
    seconds = time.perf_counter() - start
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    images = np.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), "float32")
    inputs = {"images": images, "token_ids": np.array([[2, 4, 5, 6]])}
    (answer,) = model.generate(inputs, max_new_tokens=3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    count = len(answer.token_ids)
    print(json.dumps({"seconds": seconds, "loaded": loaded, "peak_gb": peak, "tokens": count}))


def write_checkpoint(folder, variant):
    import numpy as np

    from keras_pg2 import PaliGemmaConfig
    from keras_pg2.checkpoints import io, names, presets

    config = PaliGemmaConfig.from_variant(variant, IMAGE_SIZE)
    pattern = np.random.default_rng(0).normal(0, 0.02, 2**20 + 7).astype("bfloat16")

    def lazy(spec):
        return io.LazyTensor(spec.shape, "bfloat16", lambda: np.resize(pattern, spec.shape))

    weights = {spec.path: lazy(spec) for spec in names.tensor_specs("preset", config)}
    presets.save_checkpoint(folder, "hf", config, weights, overwrite=True)


def warm_cache(folder):
    """Reads the files without keeping them. Some kernels drop a file's cache within seconds."""
    for entry in os.scandir(folder):
        with open(entry.path, "rb", buffering=0) as file:
            while file.read(2**24):
                pass


def read_tensors(folder):
    """Reads every tensor into memory and keeps it, as any loader must."""
    tensors = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            with safetensors.safe_open(os.path.join(folder, name), "np") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors


def measure(loader, folder):
    if loader == "reading":

        def load():
            return read_tensors(folder)
    elif loader == "transformers":
        import torch
        from transformers import PaliGemmaForConditionalGeneration

        def load():
            return PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    elif loader.startswith("keras_hub"):
        import keras_hub

        def load():
            return keras_hub.models.PaliGemmaBackbone.from_preset(folder, dtype="bfloat16")
    else:
        import keras_pg2

        def load():
            return keras_pg2.PaliGemma2.from_preset(folder, dtype="bfloat16")

    warm_cache(folder)
    start = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    del model
    print(json.dumps({"seconds": seconds, "peak_gb": peak}))


def compare_quantized(options):
    print("| | seconds | peak GB when loaded | peak GB after 3 tokens |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = os.path.join(temporary, "checkpoint")
        write_zeros(folder, options.variant)
        for backend in options.backends:
            command = [sys.executable, __file__, "--measure", backend, "--folder", folder]
            command += ["--quantize", options.quantize]
            environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
            run = subprocess.run(command, env=environment, capture_output=True, text=True)
            if run.returncode:
                print(f"{backend} failed: {run.stderr.strip().splitlines()[-1:]}")
                continue
            found = json.loads(run.stdout.strip().splitlines()[-1])
            cells = [f"{found[name]:.1f}" for name in ("seconds", "loaded", "peak_gb")]
            name = f"{options.variant} {options.quantize} {backend}"
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    parser.add_argument("--peers", nargs="*", default=[], help="transformers, keras_hub")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--variant", default="paligemma2-3b")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--folder", help="where the checkpoint is or shall be")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        if options.quantize:
            measure_quantized(options.folder, options.quantize)
        else:
            measure(options.measure, options.folder)
        return
    if options.quantize:
        if options.folder or options.peers:
            parser.error("--quantize writes a checkpoint of its own, without peers, and runs once")
        compare_quantized(options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or os.path.join(temporary, "checkpoint")
        if not os.path.exists(folder):
            write_checkpoint(folder, options.variant)
        loaders = ["reading"] + [f"keras_pg2-{name}" for name in options.backends]
        for peer in options.peers:
            on_backends = [f"{peer}-{backend}" for backend in options.backends]
            loaders += [peer] if peer == "transformers" else on_backends
        results = {loader: [] for loader in loaders}
        for _ in range(options.repeat):
            for loader in loaders:
                backend = loader.partition("-")[2] or "torch"
                command = [sys.executable, __file__, "--measure", loader, "--folder", folder]
                environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
                run = subprocess.run(command, env=environment, capture_output=True, text=True)
                if run.returncode:
                    print(f"{loader} failed: {run.stderr.strip().splitlines()[-1:]}")
                else:
                    results[loader].append(json.loads(run.stdout.strip().splitlines()[-1]))
        size = sum(e.stat().st_size for e in os.scandir(folder)) / 1e9
        print(f"checkpoint: {size:.2f} GB; limit of the peak: {1.1 * size + 0.5:.2f} GB")
        print("| loader | seconds (least to most) | of reading | peak GB |\n|---|---|---|---|")
        reading = statistics.median(run["seconds"] for run in results["reading"])
        for loader, runs in results.items():
            if runs:
                times = sorted(run["seconds"] for run in runs)
                seconds = statistics.median(times)
                peak = statistics.median(run["peak_gb"] for run in runs)
                spread = f"{seconds:.1f} ({times[0]:.1f} to {times[-1]:.1f})"
                print(f"| {loader} | {spread} | {seconds / reading:.2f} × | {peak:.2f} |")


if __name__ == "__main__":
    main()
