"""Reads and writes LoRA adapters in PEFT's layout: a JSON config and a safetensors file.

The names and axes of A and B follow from the row of their kernel in `names.py`: A is the kernel
with the rank as output, B the one with the rank as input.

Source: PEFT 0.21 `tuners/lora/config.py` and `utils/save_and_load.py`.
"""

import collections
import dataclasses
import json
import os
import re
import tempfile

import ml_dtypes  # noqa: F401  NumPy knows "bfloat16" once this is imported
import numpy as np
import safetensors
import safetensors.numpy
from keras import backend, ops

from keras_pg2.checkpoints import names
from keras_pg2.checkpoints.io import misfit, path_to_write, shorten
from keras_pg2.linear import LoraOptions

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Of each field the value that we implement, then those that mean the same. All else is refused.
_SUPPORTED = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
    "monteclora_config": (None, {}),
    # The other ways of initialising change the weights of the base model as well.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def save_adapter(model, folder, base_model=None, overwrite=False):
    """Writes the LoRA of a model as PEFT does.

    Args:
        model: PaliGemma2 with LoRA.
        folder: path, made if missing.
        base_model: str or None, the model that the adapter belongs to, for
            `base_model_name_or_path`.
        overwrite: bool, whether to replace an adapter that is there.

    Raises:
        FileExistsError: if there is an adapter and `overwrite` is False.
        ValueError: if the model has no LoRA, has it on a layer that a subclass added, or `folder`
            is of a hub.
    """
    layers = model.lora_layers()
    if not layers:
        raise ValueError("The model has no LoRA to save. Call `enable_lora` first.")
    folder = path_to_write(folder)
    config_path = os.path.join(folder, CONFIG_FILE)
    for path in (config_path, os.path.join(folder, TENSOR_FILE)):
        if os.path.lexists(path) and not overwrite:
            raise FileExistsError(
                f"{path!r} exists already. Choose another folder, or pass `overwrite=True`."
            )
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise FileExistsError(f"{folder!r} is a file, where a folder is to be.")
    kernels = _kernel_specs(model.config)
    if unknown := sorted(set(layers) - set(kernels)):
        raise ValueError(
            "An adapter has no place for LoRA of layers that were added to the model: "
            f"{shorten(unknown)}. `model.save` keeps it."
        )
    base_model = base_model and os.fspath(base_model)
    layers = {path: layers[path] for path in kernels if path in layers}  # first block first
    tensors = {}
    for path, layer in layers.items():
        for spec, variable in zip(_lora_specs(kernels[path], layer.lora.rank), _variables(layer)):
            array = spec.to_source(np.asarray(ops.convert_to_numpy(variable), "float32"))
            tensors[_PREFIX + _written_name(spec.name)] = np.ascontiguousarray(array)
    os.makedirs(folder, exist_ok=True)
    config = _config(layers, kernels, base_model)
    options = {"indent": 2, "sort_keys": True, "default": lambda x: x.item()}  # of NumPy's numbers
    config = json.dumps(config, **options)
    # All or nothing: a file is complete before it gets its name. The config goes first and comes
    # last, so that it is never beside tensors of another adapter.
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) as new:
        with open(os.path.join(new, TENSOR_FILE), "wb") as file:  # `save_file` would hide it
            file.write(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
        with open(os.path.join(new, CONFIG_FILE), "w", encoding="utf-8") as file:
            file.write(config)
        if os.path.lexists(config_path):
            os.remove(config_path)
        for name in (TENSOR_FILE, CONFIG_FILE):
            os.replace(os.path.join(new, name), os.path.join(folder, name))


def load_adapter(model, folder):
    """Enables LoRA on the layers that an adapter of PEFT has, with its values.

    Args:
        model: PaliGemma2 without LoRA.
        folder: path with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the adapter is damaged, of a kind that is not supported, or does not fit
            the model, which is unchanged then.
    """
    folder = os.path.expanduser(folder)
    config_path = os.path.join(folder, CONFIG_FILE)
    config = _read_config(config_path)
    tensors, raw_names = _read_tensors(os.path.join(folder, TENSOR_FILE))
    kernels = _kernel_specs(model.config)
    modules = {_module_name(spec): path for path, spec in kernels.items()}
    options, values, missing, wrong = {}, {}, [], []
    unknown = set(tensors)
    for module, path in modules.items():
        pair = [f"{module}.lora_{letter}.weight" for letter in "AB"]
        found = [name for name in pair if name in tensors]
        unknown -= set(found)
        if len(found) == 1:
            missing += set(pair) - set(found)
        if len(found) < 2:
            continue
        rank = len(np.atleast_1d(tensors[pair[0]]))
        try:
            options[path] = _options(config, raw_names[pair[0]], rank)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The file {config_path!r} has a bad field: {error}") from error
        values[path] = []
        for spec in _lora_specs(kernels[path], rank):
            array = tensors[spec.name]
            if array.shape == spec.source_shape:
                values[path].append(spec.to_ours(array))
            else:
                wrong.append(f"{spec.name}: expected {spec.source_shape}, found {array.shape}")
    if unknown or missing or wrong or not options:
        message = f"The adapter {os.fspath(folder)!r} does not fit the model."
        raise misfit(message, missing, unknown, wrong)
    model.enable_lora_on(options)
    for path, layer in model.lora_layers().items():
        for variable, value in zip(_variables(layer), values[path]):
            variable.assign(value)


def _variables(layer):
    return layer.lora_kernel_a, layer.lora_kernel_b


# Names and shapes ---------------------------------------------------------------------------


def _kernel_specs(config):
    """dict of layer path to the TensorSpec of its kernel."""
    return {
        spec.path.removesuffix("/kernel"): spec
        for spec in names.tensor_specs("hf", config)
        if spec.path.endswith("/kernel")
    }


def _module_name(spec):
    return spec.name.removesuffix(".weight")


def _lora_specs(kernel, rank):
    """TensorSpecs of A and B, R being the rank."""
    source, (_, outputs) = kernel.axes
    # The patch embedding is a convolution there, and B one over single pixels.
    ones = " 1" * (len(source) - 2)
    layouts = {
        "A": kernel.layout.replace(outputs, "R"),
        "B": f"{outputs} R{ones} -> R {outputs}",
    }
    return [
        dataclasses.replace(
            kernel,
            name=f"{_module_name(kernel)}.lora_{letter}.weight",
            layout=layout,
            sizes={**kernel.sizes, "R": rank},
        )
        for letter, layout in layouts.items()
    ]


def _written_name(name):
    # Old names, which all releases of transformers know, but for the projector: PEFT 0.21 on
    # transformers 5.23 finds it by its new name alone, which 4.52 brought.
    return re.sub(r"^(?=multi_modal_projector)", "model.", name)


def _read_name(name):
    """The name of the published layout, and the module's name in the model that PEFT saw."""
    raw = name.removeprefix(_PREFIX)
    module, _, tensor = raw.partition(".lora_")
    tensor = tensor.replace("A.default.", "A.").replace("B.default.", "B.")
    raw = names.canonical_name(raw)
    return f"{raw.partition('.lora_')[0]}.lora_{tensor}" if tensor else raw, module


def _pattern(spec):
    """A regular expression for the module in every layout of transformers."""
    tower, _, rest = _module_name(spec).partition(".")
    rest = re.escape(re.sub(r"^(vision_)?model\.", "", rest))
    return rf"(.*\.)?{tower}\.(.*\.)?{rest}"


# Files --------------------------------------------------------------------------------------


def _config(layers, kernels, base_model):
    options = [layer.lora for layer in layers.values()]
    rank = collections.Counter(option.rank for option in options).most_common(1)[0][0]
    alpha = collections.Counter(option.alpha for option in options).most_common(1)[0][0]
    ranks, alphas, blocks = {}, {}, collections.defaultdict(list)
    for path, layer in layers.items():
        pattern = _pattern(kernels[path])
        if layer.lora.rank != rank:
            ranks[pattern] = layer.lora.rank
        if layer.lora.alpha != alpha:
            alphas[pattern] = layer.lora.alpha
        block = re.search(r"layers\\\.(\d+)", pattern)
        blocks[re.sub(r"(layers\\\.)\d+", r"\1{}", pattern)].append(block and block[1])
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(option.dropout for option in options),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": "|".join(
            pattern.replace("{}", f"({'|'.join(map(str, numbers))})")
            for pattern, numbers in blocks.items()
        ),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _read_config(path):
    folder = os.path.dirname(path) or os.curdir
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"There is no folder {folder!r} with an adapter.")
    if not os.path.exists(path):
        raise FileNotFoundError(f"The adapter lacks the file {path!r}.")
    with open(path, encoding="utf-8") as file:
        try:
            config = json.load(file)
        except ValueError as error:
            raise ValueError(f"The file {path!r} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"The file {path!r} must hold a JSON object.")
    for field, supported in _SUPPORTED.items():
        # Without the type, 0 and 1 would pass for False and True.
        value = config.get(field, supported[0] if field != "peft_type" else None)
        if not any(value == other and type(value) is type(other) for other in supported):
            raise ValueError(
                f"The adapter {path!r} has {field}={value!r}, which is not supported. Expected "
                f"{supported[0]!r}. PEFT's `merge_and_unload` makes a plain model of it, which "
                "`from_preset` reads."
            )
    return config


def _read_tensors(path):
    """dict of name to array, and dict of name to the module's name in the file."""
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"The adapter lacks the file {path!r}. A pickled `adapter_model.bin` is not read; "
            "PEFT's `save_pretrained(safe_serialization=True)` makes one of the other."
        )
    tensors, modules = {}, {}
    try:
        with safetensors.safe_open(path, "np") as file:
            for key in file.keys():  # noqa: SIM118  no Mapping
                name, module = _read_name(key)
                if name in tensors:
                    raise ValueError(f"The file {path!r} has two names for {name!r}.")
                array = file.get_tensor(key)
                if not backend.is_float_dtype(array.dtype.name):
                    raise ValueError(
                        f"The tensor {key!r} of {path!r} must have floats. Received: {array.dtype}"
                    )
                if not np.isfinite(array.astype("float32")).all():
                    raise ValueError(
                        f"The tensor {key!r} of {path!r} has values that are no finite numbers. "
                        "Its training diverged, or the file is damaged."
                    )
                tensors[name], modules[name] = array, module
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"The file {path!r} is damaged: {error}") from error
    return tensors, modules


def _options(config, module, rank):
    """LoraOptions of a module; the rank is that of its tensors."""
    alpha = config.get("lora_alpha", 8)
    try:
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
    except (AttributeError, re.error) as error:
        raise ValueError(f"`alpha_pattern` is damaged: {error}") from error
    if config.get("use_rslora"):  # scales by alpha / √rank
        alpha = alpha * rank**0.5
    return LoraOptions(rank, alpha, config.get("lora_dropout", 0.0))
