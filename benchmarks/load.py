"""Loading a full-size checkpoint: time and peak memory, beside transformers and keras_hub.

    python benchmarks/load.py [--backends jax tensorflow torch] [--peers transformers] [--repeat 3]

Writes a synthetic PaliGemma 2 3B-224 checkpoint in bfloat16 (6 GB, published names and shapes,
small random values) to a temporary folder, once. Then each loader runs in a process of its own,
interleaved, with the file in the page cache; so does one that reads the tensors and keeps them.
Prints the seconds, their ratio to reading, and the peak resident memory, as a Markdown table of
medians. keras_hub 0.32 reads this folder without an error, but not rightly: it knows no Gemma 2.
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

VARIANT, IMAGE_SIZE = "paligemma2-3b", 224


def write_checkpoint(folder):
    import numpy as np

    from keras_pg2 import PaliGemmaConfig
    from keras_pg2.checkpoints import io, names, presets

    config = PaliGemmaConfig.from_variant(VARIANT, IMAGE_SIZE)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    parser.add_argument("--peers", nargs="*", default=[], help="transformers, keras_hub")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", help="where the checkpoint is or shall be")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or os.path.join(temporary, "3b")
        if not os.path.exists(folder):
            write_checkpoint(folder)
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
