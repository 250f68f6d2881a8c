"""Loading a full-size checkpoint: time and peak memory, beside transformers and keras_hub.

    python benchmarks/load.py [--backends jax tensorflow torch] [--peers transformers] [--repeat 3]

Writes a synthetic PaliGemma 2 3B-224 checkpoint in bfloat16 (6 GB, published names and shapes,
small random values) to a temporary folder, once. Then each loader runs in a process of its own,
interleaved, and so does one that only reads the tensors. Prints the seconds and the peak resident
memory as a Markdown table of medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

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


def measure(loader, folder):
    import resource
    import time

    import numpy as np
    import safetensors

    def read():
        start = time.perf_counter()
        for name in sorted(os.listdir(folder)):
            if name.endswith(".safetensors"):
                with safetensors.safe_open(os.path.join(folder, name), "np") as file:
                    for key in file.keys():  # noqa: SIM118
                        file.get_tensor(key)
        return time.perf_counter() - start

    if loader == "read":
        import ml_dtypes  # noqa: F401

        read()
        print(json.dumps({"seconds": min(read() for _ in range(2)), "peak_gb": 0}))
        return
    if loader == "transformers":
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

    start = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    result = {"seconds": seconds, "peak_gb": peak}
    if loader.startswith("keras_pg2"):
        result["model_gb"] = sum(np.prod(v.shape) for v in model.variables) * 2 / 1e9
    print(json.dumps(result))


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
        loaders = ["read", *(f"keras_pg2-{name}" for name in options.backends)]
        for peer in options.peers:
            loaders += (
                [peer] if peer == "transformers" else [f"{peer}-{b}" for b in options.backends]
            )
        results = {loader: [] for loader in loaders}
        for _ in range(options.repeat):
            for loader in loaders:
                backend = loader.partition("-")[2] or "jax"
                command = [sys.executable, __file__, "--measure", loader, "--folder", folder]
                environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
                run = subprocess.run(command, env=environment, capture_output=True, text=True)
                if run.returncode:
                    print(f"{loader} failed: {run.stderr.strip().splitlines()[-1:]}")
                else:
                    results[loader].append(json.loads(run.stdout.strip().splitlines()[-1]))
        print("| loader | seconds | of reading | peak GB |\n|---|---|---|---|")
        median = {}
        for loader, runs in results.items():
            if runs:
                median[loader] = statistics.median(run["seconds"] for run in runs)
                peak = statistics.median(run["peak_gb"] for run in runs)
                ratio = median[loader] / median["read"]
                print(f"| {loader} | {median[loader]:.1f} | {ratio:.2f} × | {peak:.2f} |")


if __name__ == "__main__":
    main()
