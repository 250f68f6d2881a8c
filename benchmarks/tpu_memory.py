"""Memory and arithmetic of training steps on TPUs, by the TPU compiler; no TPU is needed.

    pip install --no-deps --target TPU "libtpu==0.0.42.*"
    PYTHONPATH=TPU python benchmarks/tpu_memory.py [ROW ...] [--list]

Compiles training steps of 3B-224 for v5e chips (16 GiB, 15.75 of them free) and prints what the
compiler says they need: the same figures on every machine. A row takes some minutes. No value is
ever made, so the model needs no memory here. LoRA is of rank 4 on query and value of both towers,
with 128 tokens of text. The compiler counts the body of a loop once; the other turns of the loop
over chunks of the loss, two products each, are added.
"""

import argparse
import dataclasses
import math
import os
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import keras_pg2
from keras_pg2 import _backend, losses

GIB = 2**30
LENGTH, IMAGE_SIZE = 128, 224


@dataclasses.dataclass(frozen=True)
class Row:
    """A training step to compile: of LoRA or of everything, on a mesh of chips."""

    batch_size: int
    remat: bool = False
    is_peer: bool = False
    is_full: bool = False
    quantize: str | None = None
    mesh: tuple[int, int] = (1, 1)  # chips along "data" and "model"


ROWS = {
    "keras_hub-lora-4": Row(4, is_peer=True),
    "lora-4": Row(4),
    "lora-4-remat": Row(4, remat=True),
    "lora-4-remat-int8": Row(4, remat=True, quantize="int8"),
    "lora-4-remat-int4": Row(4, remat=True, quantize="int4"),
    "lora-48-remat": Row(48, remat=True),
    "lora-8-remat-int8-on-2x4": Row(8, remat=True, quantize="int8", mesh=(2, 4)),
    "lora-8-remat-int4-on-2x4": Row(8, remat=True, quantize="int4", mesh=(2, 4)),
    "full-8-remat": Row(8, remat=True, is_full=True, mesh=(8, 1)),
}


def our_model(row, config):
    with _backend.variables_without_values():
        dtype = "mixed_bfloat16" if row.is_full else "bfloat16"
        model = keras_pg2.PaliGemma2(config, dtype=dtype)
        if row.quantize:
            model.quantize(row.quantize)
    if not row.is_full:
        model.enable_lora(4, pattern="(query|value)$")
    if row.remat:
        model.enable_remat()

    def loss_of(outputs, batch):
        return outputs["loss"]

    masks = dict.fromkeys(("padding_mask", "suffix_mask", "loss_mask"), "bool")
    return model, loss_of, masks


def peer_model(config):
    """keras_hub's backbone with its LoRA of rank 4, and the loss that its `fit` has."""
    import keras_hub

    vision, text = config.vision, config.text
    with _backend.variables_without_values():
        backbone = keras_hub.models.PaliGemmaBackbone(
            vocabulary_size=text.vocab_size,
            image_size=vision.image_size,
            num_layers=text.depth,
            num_query_heads=text.num_heads,
            num_key_value_heads=text.num_kv_heads,
            hidden_dim=text.width,
            intermediate_dim=2 * text.mlp_dim,
            head_dim=text.head_dim,
            vit_patch_size=vision.patch_size,
            vit_num_heads=vision.num_heads,
            vit_hidden_dim=vision.width,
            vit_num_layers=vision.depth,
            vit_intermediate_dim=vision.mlp_dim,
            use_post_ffw_norm=True,
            use_post_attention_norm=True,
            attention_logit_soft_cap=50,
            final_logit_soft_cap=30,
            dtype="bfloat16",
        )
    model = keras_hub.models.PaliGemmaCausalLM(backbone=backbone, preprocessor=None)
    with _backend.variables_without_values():
        backbone.enable_lora(4)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def loss_of(outputs, batch):
        return cross_entropy(batch["token_ids"], outputs, sample_weight=batch["response_mask"])

    return model, loss_of, dict.fromkeys(("padding_mask", "response_mask"), "int32")


def compile_step(row):
    """What the compiler says of one step: gradients, then AdamW, in the memory of the old values.

    Returns:
        dict of "arguments" and "temporaries" in GiB per chip, "tflop" per chip, "seconds".
    """
    start = time.perf_counter()
    devices = topologies.get_topology_desc(topology_name="v5e:2x4", platform="tpu").devices
    config = keras_pg2.PaliGemmaConfig.from_variant("paligemma2-3b", IMAGE_SIZE)
    num_chips = math.prod(row.mesh)
    mesh = Mesh(np.array(devices[:num_chips]).reshape(row.mesh), ("data", "model"))
    names = [f"cpu:{i}" for i in range(num_chips)]
    keras_mesh = keras.distribution.DeviceMesh(row.mesh, ("data", "model"), names)
    layouts = keras_pg2.layout_map(config, keras_mesh, row.quantize)
    splits = {path.removeprefix("(.*/)?"): layouts[path].axes for path in layouts}
    model, loss_of, masks = peer_model(config) if row.is_peer else our_model(row, config)
    optimizer = keras.optimizers.AdamW(1e-4)
    with _backend.variables_without_values():
        optimizer.build(model.trainable_variables)

    def sharding(variable):
        # The optimizer's slots lie as their weights do; their names have "_" for "/".
        path = variable.path.split("/", 1)[-1]
        axes = splits.get(path, ())
        for name, found in splits.items():
            if path.endswith(("_momentum", "_velocity")) and name.replace("/", "_") in path:
                axes = found
        return NamedSharding(mesh, PartitionSpec(*axes))

    def without_values(variables):
        return [
            jax.ShapeDtypeStruct(tuple(v.shape), v.dtype, sharding=sharding(v)) for v in variables
        ]

    by_batch = NamedSharding(mesh, PartitionSpec("data"))
    images = (row.batch_size, IMAGE_SIZE, IMAGE_SIZE, 3)
    batch = {"images": jax.ShapeDtypeStruct(images, "float32", sharding=by_batch)}
    for name, dtype in {"token_ids": "int32", **masks}.items():
        shape = (row.batch_size, LENGTH)
        batch[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=by_batch)

    def step(trainable, fixed, slots, batch):
        def loss(trainable):
            outputs, state = model.stateless_call(trainable, fixed, batch, training=True)
            return loss_of(outputs, batch), state

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        return value, trainable, state, slots

    values = [model.trainable_variables, model.non_trainable_variables, optimizer.variables]
    arguments = [*map(without_values, values), batch]
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*arguments).compile()
    memory, flops = compiled.memory_analysis(), compiled.cost_analysis()["flops"]
    if not row.is_peer:
        rows_per_chip = row.batch_size // mesh.size
        width, vocab_size = config.text.width, config.text.vocab_size
        chunk = losses.chunk_length(row.batch_size, LENGTH - 1, vocab_size)
        turns = math.ceil((LENGTH - 1) / chunk) - 1
        num_products = 3 if row.is_full else 2
        flops += turns * num_products * 2 * rows_per_chip * chunk * width * vocab_size
    return {
        "arguments": memory.argument_size_in_bytes / GIB,
        "temporaries": memory.temp_size_in_bytes / GIB,
        "tflop": flops / 1e12,
        "seconds": time.perf_counter() - start,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help="names of rows; all by default")
    parser.add_argument("--list", action="store_true", help="show the names")
    options = parser.parse_args()
    if options.list:
        print("\n".join(ROWS))
        return
    print("| step | GiB of arguments | GiB of temporaries | sum | TFLOP | compiled in |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in options.rows or ROWS:
        found = compile_step(ROWS[name])
        total = found["arguments"] + found["temporaries"]
        print(
            f"| {name} | {found['arguments']:.2f} | {found['temporaries']:.2f} | {total:.2f} | "
            f"{found['tflop']:.2f} | {found['seconds']:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
