"""Streams tensors from checkpoint files into the variables of a model, one at a time."""

import collections
import contextlib
import json
import os
import re
import zipfile

import h5py
import ml_dtypes  # noqa: F401  NumPy knows "bfloat16" once this is imported
import numpy as np
import safetensors

from keras_pg2 import _backend
from keras_pg2.checkpoints import names


class TensorFile:
    """Named tensors of a checkpoint, read when asked for.

    Attributes:
        shapes: dict of name to shape, a tuple of int.
        dtypes: dict of name to dtype, a str such as "bfloat16".
    """

    def __init__(self, shapes, dtypes, read, stack):
        self.shapes = shapes
        self.dtypes = dtypes
        self._read = read
        self._stack = stack

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._stack.close()

    def read(self, name, index=()):
        """One tensor, or a slice of it, as a NumPy array."""
        return self._read(name, index)


_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def open_safetensors(folder):
    """Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Raises:
        FileNotFoundError: if neither exists, or a shard is missing.
        ValueError: if a file is damaged or has tensors of other dtypes than floats.
    """
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        with open(index) as file:
            shards = sorted(set(json.load(file)["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    shapes, dtypes, owners = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for shard in shards:
            path = os.path.join(folder, os.path.basename(shard))
            if not os.path.exists(path):
                raise FileNotFoundError(f"The checkpoint lacks the file {path!r}.")
            try:
                file = stack.enter_context(safetensors.safe_open(path, "np"))
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"The file {path!r} is damaged: {error}") from error
            for source in file.keys():  # noqa: SIM118  no Mapping
                name = _canonical_name(source)
                tensor = file.get_slice(source)
                shapes[name] = tuple(tensor.get_shape())
                dtypes[name] = _SAFETENSORS_DTYPES.get(tensor.get_dtype(), tensor.get_dtype())
                owners[name] = (file, source)

        def read(name, index):
            file, source = owners[name]
            return file.get_tensor(source)[index]

        return TensorFile(shapes, dtypes, read, stack.pop_all())


def _canonical_name(name):
    for pattern, replacement in names.HUGGING_FACE_RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def open_npz(path):
    """Opens a big_vision `.npz`. Objects inside are never unpickled.

    Raises:
        ValueError: if the file is damaged or holds pickled objects.
    """
    shapes, dtypes, offsets = {}, {}, {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            for name, info in members.items():
                with archive.open(info) as member:
                    version = np.lib.format.read_magic(member)
                    read_header = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }[version]
                    shape, is_fortran, dtype = read_header(member)
                    if dtype.hasobject or is_fortran:
                        raise ValueError(f"the tensor {name!r} is a Python object or transposed")
                    # big_vision writes bfloat16 as two bytes without a type.
                    dtype = np.dtype("bfloat16") if dtype.str == "|V2" else dtype
                    shapes[name], dtypes[name] = shape, dtype.name
                    if info.compress_type == zipfile.ZIP_STORED:
                        offsets[name] = (_data_offset(path, info) + member.tell(), dtype)
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"The file {path!r} is damaged or no checkpoint: {error}") from error

    def read(name, index):
        if name in offsets:  # maps the file, so that a slice of a stack reads no more
            offset, dtype = offsets[name]
            tensor = np.memmap(path, dtype, "r", offset, shapes[name] or (1,))
            return np.array(tensor.reshape(shapes[name])[index])
        with np.load(path, allow_pickle=False) as archive:
            return archive[name].view(dtypes[name])[index]

    return TensorFile(shapes, dtypes, read, contextlib.ExitStack())


def _data_offset(path, info):
    """Where a member of a zip file begins: 30 bytes, its name and an extra field further on."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
    return info.header_offset + 30 + int(lengths.sum())


def open_h5(path):
    """Opens a Keras `model.weights.h5`.

    Raises:
        ValueError: if the file is damaged.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(h5py.File(path, "r"))
        except OSError as error:
            raise ValueError(f"The file {path!r} is damaged or no HDF5 file: {error}") from error
        datasets = {}
        file.visititems(
            lambda name, item: datasets.update({name: item}) if hasattr(item, "shape") else None
        )
        dtypes = {
            name: str(dataset.attrs.get("dtype", dataset.dtype))
            for name, dataset in datasets.items()
        }

        def read(name, index):
            tensor = datasets[name][index]
            return tensor.view("bfloat16") if tensor.dtype.kind == "V" else tensor

        shapes = {name: dataset.shape for name, dataset in datasets.items()}
        return TensorFile(shapes, dtypes, read, stack.pop_all())


def load_variables(model, tensors, format, config):
    """Gives every variable of a model its value, one tensor in memory at a time.

    Args:
        model: PaliGemma2.
        tensors: TensorFile.
        format: str, see `names.tensor_specs`.
        config: PaliGemmaConfig of the checkpoint.

    Raises:
        ValueError: if tensors are missing, left over, or of another shape. All are named;
            no variable is changed then.
    """
    specs = names.tensor_specs(format, config)
    _check_names(specs, tensors, format)
    variables = model.variables_by_path()
    if set(variables) != {spec.path for spec in specs}:
        difference = set(variables) ^ {spec.path for spec in specs}
        raise ValueError(f"Model and name table disagree on the variables {sorted(difference)}")
    for spec in specs:
        array = tensors.read(spec.name, spec.index)
        if spec.path == "text/embedding/embeddings":
            array = array[: config.text.vocab_size]  # Hugging Face pads the vocabulary
        _backend.set_value(variables[spec.path], spec.to_ours(array))


def _check_names(specs, tensors, format):
    wanted = {spec.name for spec in specs}
    ignored = names.HUGGING_FACE_IGNORED if format == "hf" else ()
    missing = sorted(wanted - set(tensors.shapes))
    extra = sorted(set(tensors.shapes) - wanted - set(ignored))
    wrong = []
    stacked = collections.defaultdict(list)
    for spec in specs:
        stacked[spec.name].append(spec)
    for name, group in stacked.items():
        if name not in tensors.shapes:
            continue
        indices = [spec.index for spec in group]
        leading = tuple(max(axis) + 1 for axis in zip(*indices))
        expected, found = leading + group[0].source_shape, tensors.shapes[name]
        is_padded = group[0].path == "text/embedding/embeddings" and format == "hf"
        if found != expected and not (
            is_padded and found[1:] == expected[1:] and found[0] >= expected[0]
        ):
            wrong.append(f"{name}: expected {expected}, found {found}")
    if missing or extra or wrong:
        raise ValueError(
            "The checkpoint does not fit its config.\n"
            f"Missing tensors ({len(missing)}): {_shorten(missing)}\n"
            f"Unknown tensors ({len(extra)}): {_shorten(extra)}\n"
            f"Wrong shapes ({len(wrong)}): {_shorten(wrong)}"
        )


def _shorten(items, limit=20):
    shown = items[:limit] + ([f"… {len(items) - limit} more"] if len(items) > limit else [])
    return ", ".join(shown) or "none"
