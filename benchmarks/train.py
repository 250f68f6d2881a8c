"""A LoRA training step on this machine: seconds and peak memory, beside keras_hub and PEFT.

    python benchmarks/train.py [--backends jax tensorflow torch] [--repeat 3] [--steps 7]

A mid-size PaliGemma 2 (8 blocks of 1,024, the real vocabulary, random weights), 2 examples at
224 px with 64 tokens of text, 16 of them to learn; LoRA of rank 4 on query and value of both
towers, AdamW. Each contestant runs in a process of its own, interleaved. Prints medians of the
steps after the first two, and of the first step, which compiles, as a Markdown table; ratios are
to keras_hub on the same backend.
"""

import argparse
import json
import resource
import statistics
import time

import numpy as np
import peers

SIZE, BATCH_SIZE, LENGTH, SUFFIX = "mid", 2, 64, 16


def tokens():
    rng = np.random.default_rng(0)
    token_ids = rng.integers(10, 1000, (BATCH_SIZE, LENGTH)).astype("int32")
    is_suffix = np.zeros((BATCH_SIZE, LENGTH), bool)
    is_suffix[:, -SUFFIX:] = True
    images = rng.uniform(-1, 1, (BATCH_SIZE, 224, 224, 3)).astype("float32")
    return images, token_ids, is_suffix


def keras_steps(model, batch, num_steps):
    """Seconds of each step of `train_on_batch`, which waits for the loss."""
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        model.train_on_batch(*batch)
        seconds.append(time.perf_counter() - start)
    return seconds


def our_steps(dtype, num_steps, remat):
    import keras

    model = peers.keras_pg2_model(SIZE, dtype)
    model.enable_lora(4, pattern="(query|value)$")
    if remat:
        model.enable_remat()
    model.compile(keras.optimizers.AdamW(1e-4))
    images, token_ids, is_suffix = tokens()
    x = {"images": images, "token_ids": token_ids, "padding_mask": np.ones_like(is_suffix)}
    return keras_steps(model, ({**x, "suffix_mask": is_suffix, "loss_mask": is_suffix},), num_steps)


def keras_hub_steps(dtype, num_steps):
    import keras

    model = peers.keras_hub_model(SIZE, dtype)
    model.backbone.enable_lora(4)
    model.compile(
        keras.optimizers.AdamW(1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    images, token_ids, is_suffix = tokens()
    x = {"images": images, "token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    x["response_mask"] = is_suffix.astype("int32")
    y, weight = np.roll(token_ids, -1, axis=1), np.roll(is_suffix, -1, axis=1)
    weight[:, -1] = False
    return keras_steps(model, (x, y, weight.astype("float32")), num_steps)


def peft_steps(dtype, num_steps):
    import peft
    import torch

    model = peers.transformers_model(SIZE, dtype)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    images, token_ids, is_suffix = tokens()
    placeholders = np.full((BATCH_SIZE, 256), peers.VOCAB_SIZE)
    input_ids = np.concatenate([placeholders, token_ids], axis=1)
    token_type_ids = np.concatenate([placeholders * 0, is_suffix], axis=1).astype("int64")
    batch = {
        "pixel_values": torch.tensor(images.transpose(0, 3, 1, 2).copy()).to(model.dtype),
        "input_ids": torch.tensor(input_ids),
        "attention_mask": torch.ones(input_ids.shape, dtype=torch.long),
        "token_type_ids": torch.tensor(token_type_ids),
        "labels": torch.tensor(np.where(token_type_ids > 0, input_ids, -100)),
    }
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(contestant, num_steps):
    package, _, backend = contestant.partition("/")
    dtype = "bfloat16" if backend == "torch" else "float32"  # what is fastest on a CPU
    if package == "peft":
        seconds = peft_steps(dtype, num_steps)
    elif package == "keras_hub":
        seconds = keras_hub_steps(dtype, num_steps)
    else:
        seconds = our_steps(dtype, num_steps, remat=package.endswith("remat"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    found = {"first": seconds[0], "seconds": statistics.median(seconds[2:]), "peak_gb": peak}
    print(json.dumps(found))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="*", default=["jax", "tensorflow", "torch"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help="of each process, at least 3")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.steps)
        return
    packages = ("keras_hub", "keras_pg2", "keras_pg2-remat")
    contestants = [f"{package}/{name}" for name in options.backends for package in packages]
    contestants += ["peft/torch"] if "torch" in options.backends else []
    arguments = ["--steps", str(options.steps)]
    results = peers.run_in_turns(__file__, contestants, arguments, options.repeat)
    print("| step | seconds (least to most) | of keras_hub | first step s | peak GB |")
    print("|---|---|---|---|---|")
    for name, runs in results.items():
        seconds, least, most = peers.spread(runs, "seconds")
        base = results.get(f"keras_hub/{name.partition('/')[2]}", runs)
        ratio = seconds / peers.spread(base, "seconds")[0]
        first, peak = peers.spread(runs, "first")[0], peers.spread(runs, "peak_gb")[0]
        print(
            f"| {name} | {seconds:.2f} ({least:.2f} to {most:.2f}) | {ratio:.2f} × "
            f"| {first:.1f} | {peak:.2f} |"
        )


if __name__ == "__main__":
    main()
