"""Arithmetic and memory traffic of generation on a TPU or GPU, by its compiler, without the device.

    pip install --no-deps --target TPU "libtpu==0.0.42.*"
    PYTHONPATH=TPU python benchmarks/compile_generate.py [--batch 1 64] [--quantize int8]
    pip install --no-deps --target GPU "jax-cuda13-plugin==0.10.2" "jax-cuda13-pjrt==0.10.2"
    PYTHONPATH=GPU python benchmarks/compile_generate.py --device h200

Compiles the two programs of `generate` for 3B on one v5e chip, or H200: prefill of the image tokens
and 32 of text, and decoding with a cache for 128 tokens of text, of which the compiler counts one
step. Without a GPU, XLA chooses among ways of multiplying by estimates, not by trying them.
Beside the prefill's FLOPs stands the least that the architecture needs, two for each weight and
token and for each pair of query and key that may see each other; the last block computes keys and
values alone for image tokens. With `--image-size 896` the prefill has loops, of which the compiler
counts one turn.

Beside the bytes of a step stand those of the decoder's weights, as they are stored, and of the
cache. The compiler's own sum counts a weight three times that it brings into the memory of the chip
ahead of its use, and the whole embedding when a row of it is looked up. So what moves between HBM
and the chip is also summed up here, from the instructions of the compiled program.
"""

import argparse
import math
import os
import re
import time

os.environ.update(
    KERAS_BACKEND="jax",
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-8",
    TPU_WORKER_HOSTNAMES="localhost",
)

import jax
import keras
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import keras_pg2
from keras_pg2 import _backend, generation

GIB = 2**30
TEXT_LENGTH, MAX_TEXT_LENGTH = 32, 128
# What XLA must know of the GPU, as its proto `GpuTargetConfigProto`.
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200 141GB HBM3e"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 threads_per_warp: 32
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  device_memory_size: 151397597184 memory_bandwidth: 4800000000000
}
"""


def least_flops(config, batch_size):
    """Of the prefill, with logits of the last position alone."""
    vision, text = config.vision, config.text
    patches = vision.num_tokens
    tokens = patches + TEXT_LENGTH
    patch_width = 3 * vision.patch_size**2
    block = 4 * vision.width**2 + 2 * vision.width * vision.mlp_dim
    weights = patch_width * vision.width + vision.depth * block + vision.width * text.width
    pairs = vision.depth * 2 * patches * vision.width
    total = patches * (weights + pairs)
    heads = 2 * text.num_heads + 2 * text.num_kv_heads
    block = text.width * (heads * text.head_dim + 3 * text.mlp_dim)
    block += 2 * tokens * text.num_heads * text.head_dim
    last = patches * 2 * text.width * text.num_kv_heads * text.head_dim + TEXT_LENGTH * block
    total += tokens * (text.depth - 1) * block + last + text.vocab_size * text.width
    return 2 * batch_size * total


def hbm_bytes(program):
    """Bytes that the loop of a compiled program moves from and to HBM in one turn."""
    computations, name = {}, None
    for line in program.splitlines():
        header = re.match(r"(?:ENTRY )?%([\w.-]+) \(.*\{$", line)
        if header:
            name = header[1]
            computations[name] = []
        found = re.match(r"\s+(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)", line)
        if found:
            computations[name].append(found.groups())
    (body,) = re.findall(r" while\(.*body=%?([\w.-]+)", program)
    types = {name: type for name, type, *_ in computations[body]}
    total = 0
    for _, type, operation, operands, options in computations[body]:
        operands = re.findall(r"%([\w.-]+)", operands)
        if operation in ("copy-start", "slice-start"):  # what arrives, and left HBM
            total += sum(size for size, is_in_hbm in _arrays(type) if not is_in_hbm)
        elif operation == "fusion":
            written = _arrays(_written_type(computations, type, options))
            total += sum(size for size, is_in_hbm in written if is_in_hbm)
            for i, operand in enumerate(operands):
                ((size, is_in_hbm),) = _arrays(types[operand])
                total += min(size, _sliced_bytes(computations, options, i)) if is_in_hbm else 0
        elif operation in ("dynamic-update-slice", "convolution", "copy", "reshape"):
            changed = operands[1:2] if operation == "dynamic-update-slice" else operands
            sizes = [array for operand in changed for array in _arrays(types[operand])]
            sizes += [] if operation == "dynamic-update-slice" else _arrays(type)
            total += sum(size for size, is_in_hbm in sizes if is_in_hbm)
    return total


def _arrays(type):
    """(bytes, whether it lies in HBM) of each array of a type such as "(bf16[8,2]{…S(1)}, …)"."""
    widths = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}
    return [
        (math.prod(map(int, filter(None, shape.split(",")))) * widths[dtype], "S(" not in layout)
        for dtype, shape, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", type)
        if dtype in widths
    ]


def _written_type(computations, type, options):
    """Type of what a fusion writes: a slice, if it updates its operand in place."""
    instructions = computations[re.search(r"calls=%?([\w.-]+)", options)[1]]
    *_, (_, _, operation, operands, _) = instructions
    if operation != "dynamic-update-slice":
        return type
    update = re.findall(r"%([\w.-]+)", operands)[1]
    return next(type for name, type, *_ in instructions if name == update)


def _sliced_bytes(computations, options, index):
    """Bytes of a fusion's operand that are read, if slices are all that it is used for."""
    instructions = computations[re.search(r"calls=%?([\w.-]+)", options)[1]]
    (name,) = [name for name, _, op, i, _ in instructions if op == "parameter" and i == str(index)]
    total = 0
    for _, type, operation, operands, options in instructions:
        operands = re.findall(r"%([\w.-]+)", operands)
        if name not in operands:
            continue
        if operation == "fusion":
            total += _sliced_bytes(computations, options, operands.index(name))
        elif operation in ("slice", "dynamic-slice", "gather"):
            total += sum(size for size, _ in _arrays(type))
        elif operation != "dynamic-update-slice" or name != operands[0]:
            return math.inf
    return total


def topology(device):
    if device == "v5e":
        return topologies.get_topology_desc(topology_name="v5e:2x4", platform="tpu")
    return topologies.get_topology_desc(
        topology_name=device, platform="cuda", topology="1x1x1", target_config=H200
    )


def compile_programs(device, batch_size, image_size, dtype, mode):
    _backend.has_jax_gpu = lambda: device == "h200"
    target = topology(device).devices[0]
    config = keras_pg2.PaliGemmaConfig.from_variant("paligemma2-3b", image_size)
    cache_length = config.vision.num_tokens + MAX_TEXT_LENGTH
    with _backend.variables_without_values():
        model = keras_pg2.PaliGemma2(config, dtype=dtype)
        if mode:
            model.quantize(mode)
    sharding = SingleDeviceSharding(target)

    def placed(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(tuple(x.shape), x.dtype, sharding=sharding), tree
        )

    def with_values(function):
        def program(values, *args):
            _backend._state.in_program, _backend._state.parts = True, {}  # as in `Programs.get`
            with keras.StatelessScope(state_mapping=zip(model.variables, values)):
                return function(*args)

        return program

    def prefill(inputs):
        sampler = generation.Greedy()
        return generation._prefill(model, sampler, cache_length, MAX_TEXT_LENGTH, inputs, {})

    def advance(state, limit):
        return generation._advance(model, generation.Greedy(), state, limit)

    values = placed([np.broadcast_to(np.zeros((), v.dtype), v.shape) for v in model.variables])
    shape = (batch_size, TEXT_LENGTH)
    inputs = {
        "images": jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), "float32"),
        "token_ids": jax.ShapeDtypeStruct(shape, "int32"),
        "padding_mask": jax.ShapeDtypeStruct(shape, "bool"),
        "suffix_mask": jax.ShapeDtypeStruct(shape, "bool"),
    }
    start = time.perf_counter()
    compiled_prefill = jax.jit(with_values(prefill)).lower(values, placed(inputs)).compile()
    prefill_seconds = time.perf_counter() - start
    state = placed(jax.eval_shape(with_values(prefill), values, inputs))
    limit = jax.ShapeDtypeStruct((), "int32", sharding=sharding)
    start = time.perf_counter()
    decode = jax.jit(with_values(advance), donate_argnums=1)
    compiled_decode = decode.lower(values, state, limit).compile()
    decode_seconds = time.perf_counter() - start
    cache_bytes = sum(
        math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state["cache"])
    )
    weight_bytes = sum(
        math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in model.text.variables
    )
    # XLA for GPUs counts neither.
    flops = (compiled_prefill.cost_analysis() or {}).get("flops", math.nan)
    num_bytes = (compiled_decode.cost_analysis() or {}).get("bytes accessed", math.nan)
    moved = hbm_bytes(compiled_decode.as_text())
    memory = compiled_decode.memory_analysis()
    least = least_flops(config, batch_size)
    print(
        f"| {batch_size} | {flops / 1e12:.3f} | {least / 1e12:.3f} | {flops / least:.3f} | "
        f"{compiled_prefill.memory_analysis().temp_size_in_bytes / GIB:.2f} | "
        f"{num_bytes / 1e9:.3f} | {moved / 1e9:.3f} | {(weight_bytes + cache_bytes) / 1e9:.3f} | "
        f"{moved / (weight_bytes + cache_bytes):.3f} | {cache_bytes / GIB:.3f} | "
        f"{memory.alias_size_in_bytes / GIB:.3f} | {memory.temp_size_in_bytes / GIB:.3f} | "
        f"{prefill_seconds:.0f} + {decode_seconds:.0f} |",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="v5e", choices=["v5e", "h200"])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 64])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", choices=["int8", "int4"])
    options = parser.parse_args()
    columns = (
        "batch | prefill TFLOP | least | ratio | temporaries GiB | decode step GB, compiler | "
        "HBM | weights + cache | HBM's ratio | cache GiB | aliased | decode's temporaries GiB | "
        "compiled in s"
    )
    print(f"| {columns} |")
    print("|---" * 13 + "|", flush=True)
    for batch_size in options.batch:
        arguments = batch_size, options.image_size, options.dtype, options.quantize
        compile_programs(options.device, *arguments)


if __name__ == "__main__":
    main()
