"""How weights are spread over devices, for `keras.distribution`."""

import keras

from keras_pg2.checkpoints import names
from keras_pg2.config import PaliGemmaConfig
from keras_pg2.quantization import ROW_MULTIPLE, scheme_of_preset

# Axes of each kernel: over which axis of the mesh it is split, "data" or "model". A product
# splits its output, the next one its input, so that one sum ends each attention and MLP.
_SPLITS = {
    "query": ("data", "model"),
    "key": ("data", "model"),
    "value": ("data", "model"),
    "output": ("model", "data"),
    "gate": ("data", "model"),
    "up": ("data", "model"),
    "down": ("model", "data"),
    "embedding": ("model", "data"),
    "projector": ("data", "model"),
    "patch_embedding": (None, "model"),
}


def layout_map(config, device_mesh, quantize=None):
    """Layouts of all weights: fully sharded along "data", tensor parallel along "model".

    An axis that a mesh dimension does not divide stays whole, and so do norms. Key and value
    heads are split only between heads: with fewer heads than devices each device has them all.
    LoRA has no layout: each device holds all of it.

    Args:
        config: PaliGemmaConfig.
        device_mesh: `keras.distribution.DeviceMesh` with the axes "data" and "model", of any
            sizes, 1 included.
        quantize: None, or to what the model will be quantized, see `PaliGemma2.from_preset`.

    Returns:
        `keras.distribution.LayoutMap` for `keras.distribution.ModelParallel`, to be set before
        the model is made. Needs the jax backend.

    Raises:
        ValueError: if `config` is none, the mesh has other axes, or `quantize` is not supported.

    Example:
        >>> mesh = keras.distribution.DeviceMesh((2, 4), ("data", "model"))
        >>> config = keras_pg2.PaliGemmaConfig.from_variant("paligemma2-3b")
        >>> layouts = keras_pg2.layout_map(config, mesh)
        >>> keras.distribution.set_distribution(
        ...     keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="data"))
        >>> model = keras_pg2.PaliGemma2.from_preset("paligemma2-3b-pt-224")

    Source: big_vision `sharding.py` (`fsdp`); Megatron-LM, arXiv 1909.08053, section 3.
    """
    if not isinstance(config, PaliGemmaConfig):
        raise ValueError(
            "`config` must be a PaliGemmaConfig, such as `model.config`. "
            f"Received: config={config!r:.80}"
        )
    if set(device_mesh.axis_names) != {"data", "model"}:
        raise ValueError(
            "`device_mesh` must have the axes 'data' and 'model'; one may have the size 1. "
            f"Received: {device_mesh.axis_names}"
        )
    group_size = scheme_of_preset(quantize)[1] if quantize else None
    sizes = dict(zip(device_mesh.axis_names, device_mesh.shape))
    heads = {"vision": (config.vision.num_heads,) * 2}
    heads["text"] = (config.text.num_heads, config.text.num_kv_heads)
    layouts = keras.distribution.LayoutMap(device_mesh)
    for spec in names.tensor_specs("preset", config):
        tower, layer, weight = (spec.path.split("/")[i] for i in (0, -2, -1))
        axes = _SPLITS.get(layer, ()) if weight in ("kernel", "bias", "embeddings") else ()
        axes = axes[1:] if weight == "bias" else axes
        units = list(spec.shape)
        if layer in ("query", "key", "value", "output"):
            count = heads[tower][layer in ("key", "value")]
            units = [count if axis == "model" else size for axis, size in zip(axes, units)]
        axes = tuple(
            axis if axis and unit % sizes[axis] == 0 else None for axis, unit in zip(axes, units)
        )
        if quantize and weight in ("kernel", "embeddings"):
            (height, width), (rows, columns) = spec.shape, axes
            if weight == "kernel":  # quantized as its transpose
                (width, height), (columns, rows) = spec.shape, axes
            codes, scales = (rows, columns), (rows,)
            if group_size is not None:  # a byte holds two groups of columns; rows are padded
                num_rows = -(-height // ROW_MULTIPLE) * ROW_MULTIPLE
                rows = rows if rows and num_rows % sizes[rows] == 0 else None
                num_groups = -(-width // (2 * group_size))
                groups = columns if columns and num_groups % sizes[columns] == 0 else None
                codes = scales = (groups, rows, None)
            path = f"(.*/)?{spec.path.rpartition('/')[0]}/quantized"
            layouts[f"{path}/codes"], layouts[f"{path}/scales"] = codes, scales
        elif any(axes):
            layouts[f"(.*/)?{spec.path}"] = axes
    return layouts
