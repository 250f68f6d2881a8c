"""How generation scales: with rows, with the length of the cache, and memory at 896 px.

    python benchmarks/scaling.py [--what rows cache memory] [--backends jax tensorflow torch]

"rows" decodes 8 prompts of 1 to 15 tokens, and one of 8; "cache" reads a cache of 4,608 tokens,
and one of 320 (384 where lengths are rounded up): 8 blocks of 1,024 and the real vocabulary, in
turn in one process. "memory" is what answering about an image of 896 px, 4,096 image tokens, takes
beyond what a process with the 3B weights holds: resident memory at its highest, in the first call,
which compiles, and in the next. Random weights; bfloat16 on torch, float32 on jax and tensorflow.
"""

import argparse
import ctypes
import functools
import gc
import json
import os
import statistics
import threading
import time

import numpy as np
import peers

# Rows of the table, and the prompts' lengths and `max_new_tokens` of both cases.
ROWS = {
    "rows": ("tokens/s: 1 row, 8 rows", ([8], 56), (list(range(1, 16, 2)), 56)),
    "cache": ("ms a token: short cache, long cache", ([8], 56), ([4096], 256)),
    "memory": ("GB above the weights: first call, next call", ([8], 2), None),
}
STEPS, COUNT = 4, 12  # tokens that are timed together, and how often


def make_inputs(lengths, image_size=224):
    """One image and one prompt of random tokens a row, padding first."""
    rng = np.random.default_rng(0)
    longest = max(lengths)
    return {
        "images": rng.uniform(-1, 1, (len(lengths), image_size, image_size, 3)).astype("float32"),
        "token_ids": rng.integers(10, 1000, (len(lengths), longest)),
        "padding_mask": np.arange(longest) >= longest - np.array(lengths)[:, None],
    }


def decode_seconds(model, cases):
    """Median seconds a step of each case, decoded in turn."""
    from keras_pg2 import generation

    streams = []
    for lengths, max_new_tokens in cases:
        inputs = generation.align_inputs(make_inputs(lengths), model.config.text.vocab_size)
        seeds = generation.row_seeds(0, len(lengths))
        sampler = generation.Greedy()
        streams.append(
            generation.token_steps(model, inputs, sampler, max_new_tokens, seeds, lambda: STEPS)
        )
        next(streams[-1])
        streams[-1].send(np.zeros(len(lengths), bool))  # programs are compiled
    seconds = [[] for _ in cases]
    for _ in range(COUNT):
        for (lengths, _), stream, times in zip(cases, streams, seconds):
            start = time.perf_counter()
            stream.send(np.zeros(len(lengths), bool))
            times.append((time.perf_counter() - start) / STEPS)
    return [statistics.median(times) for times in seconds]


def resident_gb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def trim():
    """Gives back what is freed but kept, which would be used first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def most_gb(function):
    """The most memory that the process holds during a call."""
    trim()
    samples, is_done = [], threading.Event()

    def watch():
        while not is_done.wait(0.01):
            samples.append(resident_gb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    is_done.set()
    watcher.join()
    return max(samples)


def measure(what, backend):
    _, first, second = ROWS[what]
    dtype = "bfloat16" if backend == "torch" else "float32"
    if what == "memory":
        model = peers.keras_pg2_model("3b", dtype, image_size=896)
        for variable in model.variables:
            variable.numpy()  # jax may still be making the weights
        lengths, max_new_tokens = first
        inputs = make_inputs(lengths, image_size=896)
        answer = functools.partial(model.generate, inputs, max_new_tokens=max_new_tokens)
        trim()
        weights = resident_gb()
        return most_gb(answer) - weights, most_gb(answer) - weights
    model = peers.keras_pg2_model("mid", dtype)
    times = decode_seconds(model, (first, second))
    if what == "cache":
        return [1e3 * seconds for seconds in times]
    return [len(lengths) / seconds for (lengths, _), seconds in zip((first, second), times)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    parser.add_argument("--repeat", type=int, default=2, help="processes of each")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, _, backend = options.measure.partition("/")
        print(json.dumps(dict(zip(("first", "second"), measure(what, backend)))))
        return
    names = [f"{what}/{backend}" for what in options.what for backend in options.backends]
    print("| | | first | second | ratio |\n|---|---|---|---|---|")
    for name, runs in peers.run_in_turns(__file__, names, [], options.repeat).items():
        what, _, backend = name.partition("/")
        cells = [ROWS[what][0], backend]
        for field in ("first", "second"):
            median, least, most = peers.spread(runs, field)
            cells.append(f"{median:.2f} ({least:.2f} to {most:.2f})")
        ratio = statistics.median(run["second"] / run["first"] for run in runs)
        cells.append("" if what == "memory" else f"{ratio:.2f}")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
