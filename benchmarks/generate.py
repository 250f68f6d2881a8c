"""Time to the first token and for each further one, beside keras_hub and transformers.

    python benchmarks/generate.py [--size mid] [--backends jax tensorflow torch] [--repeat 3]

PaliGemma 2 at 224 px with the real vocabulary and random weights: "mid" has 8 blocks of 1,024, "3b"
is the published size. The prompt is 8 tokens; greedy decoding. bfloat16, but float32 where jax and
tensorflow run on a CPU, which is fastest there; "-int8" and "-int4" have quantized weights,
"-compiled" decodes with torch.compile, which transformers 5.23 cannot: with the cache that this
needs, its PaliGemma 2 refuses the masks that its `generate` makes. Each contestant runs in a
process of its own, in turn, on the GPU if there is one.

keras_hub gets its shortest possible lengths, and once ("keras_hub-default") its default sequence
length, of which it computes every position. "Of the limit" is the rate at which decoding reads the
decoder's weights, each once a token, over the rate of the same framework, in the same process, for
products of one vector with matrices of 2304×9216 that lie in no cache, in its fastest way.
"""

import argparse
import json
import resource
import statistics
import time

import numpy as np
import peers

DEFAULT_LENGTH = 1024  # of text: keras_hub's sequence_length


def model_inputs(options):
    rng = np.random.default_rng(0)
    side = options.image_size
    images = rng.uniform(-1, 1, (options.batch, side, side, 3)).astype("float32")
    token_ids = rng.integers(10, 1000, (options.batch, options.prompt)).astype("int32")
    token_ids[:, 0] = 2
    return images, token_ids


def keras_pg2_runner(options, dtype, mode=None, is_compiled=False):
    """A function that generates n tokens."""
    model = peers.keras_pg2_model(options.size, dtype, options.image_size)
    if mode is not None:
        model.quantize(mode)
    if is_compiled:
        model.enable_torch_compile()
    images, token_ids = model_inputs(options)

    def run(num_tokens):
        answers = model.generate(
            {"images": images, "token_ids": token_ids}, max_new_tokens=num_tokens
        )
        if any(len(answer.token_ids) < num_tokens for answer in answers):
            raise RuntimeError("The random weights ended an answer.")

    return run


def keras_hub_runner(options, dtype, text_length=None):
    model = peers.keras_hub_model(options.size, dtype, options.image_size)
    model.compile(sampler="greedy")
    images, token_ids = model_inputs(options)

    def run(num_tokens):
        # It cannot be told how many tokens to make: the prompt fills what it shall not.
        length = text_length or options.prompt + num_tokens
        prompt_length = length - num_tokens
        batch = {"token_ids": np.zeros((options.batch, length), "int32")}
        batch["padding_mask"] = np.zeros_like(batch["token_ids"])
        batch["token_ids"][:, :prompt_length] = np.resize(token_ids, (options.batch, prompt_length))
        batch["padding_mask"][:, :prompt_length] = 1
        model.generate({"images": images, **batch}, stop_token_ids=None)

    return run


def transformers_runner(options, dtype):
    import torch

    model = peers.transformers_model(options.size, dtype, options.image_size).eval()
    images, token_ids = model_inputs(options)
    placeholders = np.full((options.batch, (options.image_size // 14) ** 2), peers.VOCAB_SIZE)
    input_ids = torch.tensor(np.concatenate([placeholders, token_ids], axis=1))
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.tensor(images.transpose(0, 3, 1, 2).copy()).to(model.dtype),
    }
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}

    def run(num_tokens):
        with torch.inference_mode():
            lengths = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
            model.generate(**batch, **lengths, do_sample=False).cpu()

    return run


RUNNERS = {
    "transformers": transformers_runner,
    "keras_hub-default": lambda *args: keras_hub_runner(*args, DEFAULT_LENGTH),
    "keras_hub": keras_hub_runner,
    "keras_pg2": keras_pg2_runner,
    "keras_pg2-int8": lambda *args: keras_pg2_runner(*args, "int8"),
    "keras_pg2-int4": lambda *args: keras_pg2_runner(*args, "int4"),
    "keras_pg2-compiled": lambda *args: keras_pg2_runner(*args, None, True),
    "keras_pg2-int4-compiled": lambda *args: keras_pg2_runner(*args, "int4", True),
}


def product_rate(dtype):
    """Weights a second that this framework multiplies by a vector."""
    import keras
    from keras import ops

    shape, count = (2304, 9216), 12
    pattern = np.random.default_rng(0).normal(size=shape).astype("float32")
    matrices = [ops.cast(ops.convert_to_tensor(pattern + i), dtype) for i in range(count)]
    vector = ops.ones((1, shape[0]), dtype)

    def products(vector, matrices):
        return [ops.matmul(vector, matrix) for matrix in matrices]

    ways = [products]
    if keras.config.backend() == "jax":
        import jax

        ways = [jax.jit(products)]
    elif keras.config.backend() == "tensorflow":
        import tensorflow as tf

        ways = [tf.function(products, jit_compile=True)]
    else:  # in the layout of torch.nn.Linear; it depends on the CPU which way is the fastest
        import torch

        matrices = [matrix.t().contiguous().t() for matrix in matrices]

        def without_onednn(vector, matrices):
            with torch.backends.mkldnn.flags(enabled=False):
                return products(vector, matrices)

        def weights_on_the_left(vector, matrices):
            columns = vector.repeat(2, 1).t()
            return [ops.matmul(matrix.t(), columns) for matrix in matrices]

        ways += [without_onednn, weights_on_the_left]
    seconds = [[] for _ in ways]
    for _ in range(12):
        for way, times in zip(ways, seconds):
            start = time.perf_counter()
            ops.convert_to_numpy(way(vector, matrices)[-1])
            times.append(time.perf_counter() - start)
    fastest = min(statistics.median(times[2:]) for times in seconds)
    return count * shape[0] * shape[1] / fastest


def num_weights_read(size):
    """Weights that a decoded token is multiplied by."""
    text = peers.SIZES[size][1]
    heads = 2 * text["num_heads"] + 2 * text["num_kv_heads"]
    block = text["width"] * (heads * text["head_dim"] + 3 * text["mlp_dim"])
    return text["depth"] * block + peers.VOCAB_SIZE * text["width"]


def has_gpu(backend):
    if backend == "torch":
        import torch

        return torch.cuda.is_available()
    if backend == "jax":
        import jax

        return jax.default_backend() == "gpu"
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def peak_gb(backend):
    """Of the GPU's memory; without one, of the process's."""
    if not has_gpu(backend):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if backend == "torch":
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    if backend == "jax":
        import jax

        return jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9
    import tensorflow as tf

    return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 1e9


def measure(options):
    package, _, backend = options.measure.partition("/")
    is_fast_in_16_bits = backend == "torch" or has_gpu(backend)
    dtype = options.dtype or ("bfloat16" if is_fast_in_16_bits else "float32")
    run = RUNNERS[package](options, dtype)

    def seconds(num_tokens):
        start = time.perf_counter()
        run(num_tokens)
        return time.perf_counter() - start

    first_calls = seconds(1) + seconds(1 + options.tokens)  # programs are compiled
    first, all_tokens = (
        statistics.median(seconds(count) for _ in range(options.calls))
        for count in (1, 1 + options.tokens)
    )
    token = (all_tokens - first) / options.tokens
    peak = peak_gb(backend)  # before the matrices of the next line
    limit = num_weights_read(options.size) / product_rate(dtype)
    print(
        json.dumps(
            {
                "first": first,
                "token": token,
                "rate": options.batch / token,
                "compile": first_calls - first - all_tokens,
                "of_limit": limit / token,
                "peak_gb": peak,
            }
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    parser.add_argument("--packages", nargs="*", default=list(RUNNERS), choices=RUNNERS)
    parser.add_argument("--size", default="mid", choices=peers.SIZES)
    parser.add_argument("--dtype", help="default: what is fastest on the device")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=8, help="tokens")
    parser.add_argument("--tokens", type=int, default=16, help="decoded after the first")
    parser.add_argument("--calls", type=int, default=3, help="timed in each process")
    parser.add_argument("--repeat", type=int, default=3, help="processes of each contestant")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options)
        return
    names = [
        f"{package}/{backend}"
        for backend in options.backends
        for package in options.packages
        if backend == "torch" or not ("transformers" in package or package.endswith("-compiled"))
    ]
    arguments = [
        f"--{name}={getattr(options, name.replace('-', '_'))}"
        for name in ("size", "image-size", "batch", "prompt", "tokens", "calls")
    ]
    if options.dtype:
        arguments.append(f"--dtype={options.dtype}")
    results = peers.run_in_turns(__file__, names, arguments, options.repeat)
    print(
        "| | first token s | ours of it | tokens/s | ours of it | of the limit | compile s | GB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, runs in results.items():
        ours = results.get(f"keras_pg2/{name.partition('/')[2]}", runs)
        cells = [name]
        for field in ("first", "rate"):
            median, least, most = peers.spread(runs, field)
            ratio = peers.spread(ours, field)[0] / median
            cells += [f"{median:.2f} ({least:.2f} to {most:.2f})", f"{ratio:.2f}"]
        cells += [f"{peers.spread(runs, f)[0]:.2f}" for f in ("of_limit", "compile", "peak_gb")]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
