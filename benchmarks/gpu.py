"""PaliGemma 2 on a GPU: time to the first token and for each further one, beside other packages.

    python benchmarks/gpu.py [--size 3b] [--repeat 5]

Random weights in bfloat16, the real vocabulary, a prompt of 8 tokens, greedy decoding; what the
packages are is told in generate.py. Compiling takes minutes, so contestants are processes that
stay: some get ready side by side, then each is measured alone, turn by turn. Prints medians, and
least to most, as a Markdown table.

"Of the limit" is the time in which the GPU reads the weights of a token once, over the time for
a token. The limit is its memory's rate, the higher of two: copying 8 GB, and torch's product of
one vector with a matrix like the embedding.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time

import generate
import peers

# Package and backend, image side, batch size. Those of one list are on the GPU side by side.
CONTESTANTS = [
    [
        ("transformers/torch", 224, 1),
        ("keras_pg2/torch", 224, 1),
        ("keras_pg2-compiled/torch", 224, 1),
        ("keras_pg2-int4/torch", 224, 1),
        ("keras_hub/jax", 224, 1),
        ("keras_pg2/jax", 224, 1),
        ("keras_pg2-int4/jax", 224, 1),
    ],
    [
        (name, image_size, batch)
        for image_size, batch in ((224, 32), (448, 1), (896, 1))
        for name in ("transformers/torch", "keras_pg2/torch", "keras_pg2/jax")
    ],
]


class Contestant:
    """A process with a model, that gets ready by itself and is measured when told to."""

    def __init__(self, name, image_size, batch, options):
        self.label = f"{name}, {image_size} px, batch {batch}"
        self.runs, self.ready = [], None
        arguments = {
            **{"serve": name, "image-size": image_size, "batch": batch, "size": options.size},
            "tokens": options.tokens,
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, *(f"--{key}={value}" for key, value in arguments.items())],
            env={
                **os.environ,
                "KERAS_BACKEND": name.partition("/")[2],
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._errors = []
        errors = self._process.stderr
        threading.Thread(target=lambda: self._errors.extend(errors), daemon=True).start()
        self._reader = threading.Thread(target=self._get_ready, daemon=True)
        self._reader.start()

    def _get_ready(self):
        line = self._process.stdout.readline()
        self.ready = json.loads(line) if line else None

    def wait(self, deadline):
        """Waits until it is ready; stops it if it failed or the time of the deadline has come."""
        self._reader.join(max(0, deadline - time.time()))
        if self.ready is None:
            self._give_up("did not get ready")
        return self.ready is not None

    def measure(self):
        if self._process.poll() is not None:
            return
        print(file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if line:
            self.runs.append(json.loads(line))
        else:
            self._give_up("failed")

    def _give_up(self, what):
        self._process.kill()
        self._process.wait()
        print(f"{self.label} {what}: {''.join(self._errors[-1:]).strip()}")

    def stop(self):
        self._process.kill()
        self._process.wait()


def serve(options):
    if options.serve == "limit":
        print(read_rate())
        return
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # packages may print
    start = time.perf_counter()
    package, _, backend = options.serve.partition("/")
    run = generate.RUNNERS[package](options, "bfloat16")

    def seconds(num_tokens):
        start = time.perf_counter()
        run(num_tokens)
        return time.perf_counter() - start

    for _ in range(2):  # the second uses what the first compiled
        seconds(1), seconds(1 + options.tokens)
    print(json.dumps({"seconds": time.perf_counter() - start}), file=answers, flush=True)
    for _ in sys.stdin:
        first, all_tokens = seconds(1), seconds(1 + options.tokens)
        token = (all_tokens - first) / options.tokens
        result = {"first": 1e3 * first, "token": 1e3 * token, "gb": generate.peak_gb(backend)}
        print(json.dumps(result), file=answers, flush=True)


def read_rate():
    """Bytes a second that the GPU moves at most, see above; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0

    source = torch.randn(2**31, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    matrix = source[: peers.VOCAB_SIZE * 2304].view(peers.VOCAB_SIZE, 2304)
    ways = [
        (4 * len(source), lambda: target.copy_(source)),
        (2 * matrix.numel(), lambda: matrix[:1] @ matrix.t()),
    ]
    rates = []
    for num_bytes, way in ways:
        milliseconds = []
        for _ in range(20):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            way()
            events[1].record()
            torch.cuda.synchronize()
            milliseconds.append(events[0].elapsed_time(events[1]))
        rates.append(1e3 * num_bytes / statistics.median(milliseconds[5:]))
    return max(rates)


def show(contestants, weights, rate):
    for contestant in contestants:
        if not contestant.runs:
            continue
        cells = [contestant.label]
        for field in ("first", "token"):
            median, least, most = peers.spread(contestant.runs, field)
            cells.append(f"{median:.2f} ({least:.2f} to {most:.2f})")
        batch = int(contestant.label.split()[-1])
        token = peers.spread(contestant.runs, "token")[0] / 1e3
        num_bytes = weights * (17 / 32 if "int4" in contestant.label else 2)  # with scales
        cells += [f"{batch / token:.0f}", f"{100 * num_bytes / rate / token:.0f} %" if rate else ""]
        cells += [f"{contestant.runs[-1]['gb']:.1f}", f"{contestant.ready['seconds']:.0f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="3b", choices=peers.SIZES)
    parser.add_argument("--tokens", type=int, default=64, help="decoded after the first")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--patience", type=float, default=600, help="seconds to get ready")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--image-size", type=int, default=224, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.prompt = 8
    if options.serve:
        serve(options)
        return
    limit = [sys.executable, __file__, "--serve=limit"]  # apart, so that no memory stays taken
    rate = float(subprocess.run(limit, check=True, capture_output=True, text=True).stdout)
    print(f"The GPU moves at most {rate / 1e9:.0f} GB/s.\n")
    print("| | first token ms | further token ms | tokens/s | of the limit | GB | start s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for group in CONTESTANTS:
        contestants = [Contestant(*contestant, options) for contestant in group]
        deadline = time.time() + options.patience
        contestants = [contestant for contestant in contestants if contestant.wait(deadline)]
        for _ in range(options.repeat):
            for contestant in contestants:
                contestant.measure()
        for contestant in contestants:
            contestant.stop()
        show(contestants, generate.num_weights_read(options.size), rate)


if __name__ == "__main__":
    main()
