"""Memory and arithmetic of training steps on TPUs, by the TPU compiler; no TPU is needed.

    pip install --no-deps --target TPU "libtpu==0.0.42.*"
    PYTHONPATH=TPU KERAS_BACKEND=jax python benchmarks/tpu_memory.py [--peer]

Compiles one training step for a v5e chip (15.75 GiB), or for eight, and prints what the compiler
says it needs: the figures are the same on every machine. The compiler counts the body of a loop
once; the loop over chunks of the loss is added here. Without values, the 3B model needs no memory.
"""

import os

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
from keras_pg2 import _backend

GIB = 2**30
V5E_GIB = 15.75


def make_model(variant, image_size, dtype):
    config = keras_pg2.PaliGemmaConfig.from_variant(variant, image_size)
    with _backend.variables_without_values():
        return keras_pg2.PaliGemma2(config, dtype=dtype)


def without_values(variables, sharding):
    return [
        jax.ShapeDtypeStruct(tuple(v.shape), v.dtype, sharding=sharding(v.path)) for v in variables
    ]


def batch_of(model, batch_size, length, sharding):
    size = model.config.vision.image_size
    shapes = {
        "images": ((batch_size, 1, size, size, 3), "float32"),
        "token_ids": ((batch_size, length), "int32"),
        **{
            name: ((batch_size, length), "bool")
            for name in ("padding_mask", "suffix_mask", "loss_mask")
        },
    }
    return {k: jax.ShapeDtypeStruct(*v, sharding=sharding) for k, v in shapes.items()}


def compile_step(model, optimizer, batch_size, length, variable_sharding, batch_sharding):
    """One training step, as Keras runs it: gradients, then the optimizer, all donated."""
    with _backend.variables_without_values():
        optimizer.build(model.trainable_variables)

    def step(trainable, fixed, slots, batch):
        def loss(trainable):
            outputs, state = model.stateless_call(trainable, fixed, batch, training=True)
            return outputs["loss"], state

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        return value, trainable, state, slots

    arguments = (
        without_values(model.trainable_variables, variable_sharding),
        without_values(model.non_trainable_variables, variable_sharding),
        without_values(optimizer.variables, variable_sharding),
        batch_of(model, batch_size, length, batch_sharding),
    )
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    flops = compiled.cost_analysis()["flops"]
    return {
        "arguments": memory.argument_size_in_bytes / GIB,
        "temporaries": memory.temp_size_in_bytes / GIB,
        "tflop": flops / 1e12,
    }


def main():
    devices = topologies.get_topology_desc(topology_name="v5e:2x4", platform="tpu").devices
    one = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
    model = make_model("paligemma2-3b", 224, "bfloat16")
    model.enable_lora(4, pattern="(query|value)$")
    for remat in (False, True):
        model.enable_remat(("vision", "text") if remat else ())
        print(
            remat, compile_step(model, keras.optimizers.AdamW(1e-4), 4, 128, lambda path: one, one)
        )


if __name__ == "__main__":
    main()
