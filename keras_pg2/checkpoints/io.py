"""Reads and writes checkpoint files tensor by tensor, so that no model is in memory twice.

A checkpoint is a dict of `LazyTensor`. Its names are the format's own in `read_*` and `write_*`,
and paths of our variables elsewhere; `to_ours` and `to_source` go between the two.
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import math
import mmap
import os
import pathlib
import re
import shutil
import tempfile
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Callable

import h5py
import ml_dtypes  # noqa: F401  NumPy knows "bfloat16" once this is imported
import numpy as np
import safetensors

from keras_pg2.checkpoints import names

_LOG = logging.getLogger(__name__)
_EMBEDDING = "text/embedding/embeddings"
_POSITIONS = "vision/position_embedding"
# What the readers of .npz and HDF5 raise for damaged files.
_DAMAGE = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    EOFError,
    TypeError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
_MAX_SHARD_BYTES = 5 * 10**9
# What `overwrite` may replace in a folder: files of the formats, and of the hubs.
_FILE_OF_A_CHECKPOINT = re.compile(
    r"(generation_|preprocessor_|processor_|tokenizer_)?config\.json|tokenizer\.(model|json)"
    r"|(added_tokens|special_tokens_map|metadata|preprocessor|image_converter|task)\.json"
    r"|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|model(_\d+)?\.weights\.(h5|json)"
    r"|segmentation\.safetensors|chat_template\.\w+|assets|\.gitattributes|\.cache"
)
HUGGING_FACE_FILLER_ROWS = 64  # after the vocabulary; the first of them is `<image>`


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when asked for.

    Attributes:
        shape: tuple of int.
        dtype: str, such as "bfloat16".
        read: callable, gives a NumPy array that nobody else holds. Those of the `read_*` functions
            take the index of a slice along the first axes, and read no more.
    """

    shape: tuple
    dtype: str
    read: Callable

    @property
    def num_bytes(self):
        """Bytes of its values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def cast(self, dtype):
        """The tensor in another dtype; None changes nothing."""
        if dtype in (None, self.dtype):
            return self
        return LazyTensor(self.shape, dtype, lambda: self.read().astype(dtype))


# Reading ------------------------------------------------------------------------------------

_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def shard_paths(folder, file_name, index_name):
    """Paths of a file, or, if there is none, of the shards that an index lists.

    Args:
        folder: str.
        file_name: str.
        index_name: str, of a JSON file with a "weight_map", whose values are names of files, or
            lists of them.

    Returns:
        list of str.

    Raises:
        FileNotFoundError: if there is neither, or a shard is missing.
        ValueError: if the index is damaged.
    """
    index = os.path.join(folder, index_name)
    shards = [file_name]
    if os.path.exists(index) and not os.path.exists(os.path.join(folder, file_name)):
        try:
            with open(index, encoding="utf-8") as file:
                values = json.load(file)["weight_map"].values()
            lists = [value if isinstance(value, list) else [value] for value in values]
            shards = {shard for listed in lists for shard in listed}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"The file {index!r} is damaged: {error}") from error
    for shard in shards:
        if not isinstance(shard, str) or shard != os.path.basename(shard):
            raise ValueError(
                f"The file {index!r} must name files of its own folder. Received: {shard!r}"
            )
        path = os.path.join(folder, shard)
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"The checkpoint lacks the file {path!r}"
                + (f", and {index_name!r}, an index of shards." if shard == file_name else ".")
            )
    return [os.path.join(folder, shard) for shard in sorted(shards)]


def read_safetensors(folder, file_name="model.safetensors", unused=None):
    """Tensors of a file, or, if there is none, of the shards that `<file_name>.index.json` lists.

    Args:
        folder: str.
        file_name: str.
        unused: compiled regular expression or None; tensors in whose names it is found are left
            out.

    Returns:
        dict of name to LazyTensor.

    Raises:
        FileNotFoundError: if neither exists, or a shard is missing.
        ValueError: if a file is damaged, or has tensors of other dtypes than floats.
    """
    tensors = {}
    for path in shard_paths(folder, file_name, f"{file_name}.index.json"):
        try:
            with safetensors.safe_open(path, "np"):  # checks the header and the file's length
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"The file {path!r} is damaged: {error}") from error
        with open(path, "rb") as file:
            version = _version(file)
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__" or (unused and unused.search(name)):
                continue
            if entry["dtype"] not in _SAFETENSORS_DTYPES:
                raise ValueError(
                    f"The tensor {name!r} of {path!r} must be one of "
                    f"{sorted(_SAFETENSORS_DTYPES)}. Received: {entry['dtype']}"
                )
            offset = 8 + length + entry["data_offsets"][0]
            dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
            tensors[name] = _stored(path, version, tuple(entry["shape"]), dtype, offset)
    return tensors


def _version(file):
    """What changes when an open file is replaced by another, or is written to."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns  # of network file systems not all keep inodes


def _stored(path, version, shape, dtype, offset):
    """A tensor that lies as it is in a file of a `_version`."""

    def read(index=()):
        shape_read = shape[len(index) :]
        size = math.prod(shape_read) * np.dtype(dtype).itemsize
        number = int(np.ravel_multi_index(index, shape[: len(index)])) if index else 0
        values = _new_memory(size)
        with open(path, "rb", buffering=0) as file:
            if _version(file) != version:
                raise ValueError(f"The file {path!r} was changed while it was read. Read it again.")
            file.seek(offset + number * size)
            done = 0
            while done < size:  # one call reads 2 GB at most
                count = file.readinto(memoryview(values[done:]))
                if not count:
                    raise ValueError(f"The file {path!r} is damaged: it ends too early.")
                done += count
        return values.view(dtype).reshape(shape_read)

    return LazyTensor(shape, dtype, read)


def _new_memory(size):
    """uint8 (size,), aligned so that jax and TensorFlow take it over without a copy.

    Memory of its own, not of the heap: what is freed goes back to the system at once. Mapping
    the file itself would be slower, page by page.
    """
    if not size:
        return np.empty(0, "uint8")
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux: a tenth of the page faults
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, "uint8")


def _sliced(shape, dtype, read):
    """A tensor that is read as a whole before it is sliced."""
    return LazyTensor(shape, dtype, lambda index=(): read()[index])


def read_npz(path):
    """Tensors of a big_vision `.npz`. Objects inside are never unpickled.

    Args:
        path: str.

    Returns:
        dict of name to LazyTensor.

    Raises:
        ValueError: if the file is damaged or holds pickled objects.
    """
    tensors = {}
    last, lock = {}, threading.Lock()

    def read(name, dtype, index=()):
        # Slices of one tensor are asked for in a row: only the first of them decompresses it.
        with lock:
            if name not in last:
                last.clear()
                last[name] = _read_npz(path, name, dtype)
            return np.array(last[name][index], order="C")

    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            version = _version(file)
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                with archive.open(info) as member:
                    shape, is_fortran, dtype = _npy_header(member)
                    header_length = member.tell()
                if info.compress_type == zipfile.ZIP_STORED and not is_fortran:
                    offset = _data_offset(path, info) + header_length
                    if offset + info.file_size - header_length > os.path.getsize(path):
                        raise ValueError("it is too short")
                    tensors[name] = _stored(path, version, shape, dtype, offset)
                else:
                    tensors[name] = LazyTensor(shape, dtype, functools.partial(read, name, dtype))
    except _DAMAGE as error:
        raise ValueError(f"The file {path!r} is damaged or no checkpoint: {error}") from error
    return tensors


def _npy_header(file):
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, is_fortran, dtype = readers[np.lib.format.read_magic(file)](file)
    if dtype.hasobject or not dtype.isnative:
        raise ValueError("a tensor is a Python object, or of another byte order")
    # big_vision writes bfloat16 as two bytes without a type.
    return shape, is_fortran, "bfloat16" if dtype.str == "|V2" else dtype.name


def _data_offset(path, info):
    """Where a member of a zip file begins: after 30 bytes, its name and an extra field."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
    return info.header_offset + 30 + int(lengths.sum())


def _read_npz(path, name, dtype):
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name].view(dtype)
    except _DAMAGE as error:
        raise ValueError(f"The file {path!r} is damaged: {name!r}: {error}") from error


def read_h5(path):
    """Tensors of a Keras `model.weights.h5`.

    Args:
        path: str.

    Returns:
        dict of name to LazyTensor.

    Raises:
        ValueError: if the file is damaged, or its values lie in other files.
    """
    tensors, outside = {}, []

    def add(name, item):  # links to other files are not visited
        if isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                outside.append(name)
            dtype = str(item.attrs.get("dtype", item.dtype))
            read = functools.partial(_read_h5, path, name, dtype)
            tensors[str(name)] = _sliced(item.shape, dtype, read)  # bytes where it is damaged

    try:
        with h5py.File(path, "r") as file:
            file.visititems(add)
    except _DAMAGE as error:
        raise ValueError(f"The file {path!r} is damaged or no HDF5 file: {error}") from error
    if outside:
        raise ValueError(f"The values of {outside[0]!r} in {path!r} lie in other files.")
    return tensors


def _read_h5(path, name, dtype):
    try:
        with h5py.File(path, "r") as file:
            array = file[name][()]
    except _DAMAGE as error:
        raise ValueError(f"The file {path!r} is damaged: {name!r}: {error}") from error
    return array.view(dtype) if array.dtype.kind == "V" else array.astype(dtype, copy=False)


# Between a format's tensors and ours --------------------------------------------------------


def to_ours(tensors, format, config, path):
    """Tensors of a checkpoint by the paths of our variables, in our layout.

    Args:
        tensors: dict of the format's name to LazyTensor.
        format: str, see `names.tensor_specs`.
        config: PaliGemmaConfig of the checkpoint.
        path: str, of the checkpoint, for errors.

    Returns:
        dict of path to LazyTensor.

    Raises:
        ValueError: if tensors are missing, left over, or of another shape. All are named.
    """
    if format == "hf":
        counts = collections.Counter(map(names.canonical_name, tensors))
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ValueError(
                f"The checkpoint holds tensors under two names each: {shorten(twice)}. Remove one."
            )
        tensors = {names.canonical_name(name): tensor for name, tensor in tensors.items()}
        heads = [head for head in names.HUGGING_FACE_HEADS if head in tensors]
        if heads and names.HUGGING_FACE_EMBEDDING not in tensors:  # one name of the tied matrix
            tensors[names.HUGGING_FACE_EMBEDDING] = tensors.pop(heads[0])
    specs = names.tensor_specs(format, config)
    _check_fit(specs, tensors, format, path)
    if format == "hf":
        _warn_of_changed_ends(tensors, config)

    def lazy(spec):
        def read():
            array = tensors[spec.name].read(spec.index)
            if spec.path == _EMBEDDING:
                array = array[: config.text.vocab_size]  # without Hugging Face's padding
            return spec.to_ours(array)

        return LazyTensor(spec.shape, tensors[spec.name].dtype, read)

    return {spec.path: lazy(spec) for spec in specs}


def common_dtype(tensors):
    """The dtype of LazyTensors, or one that holds all their values."""
    dtypes = {tensor.dtype for tensor in tensors}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def to_source(weights, format, config):
    """The inverse of `to_ours`.

    Args:
        weights: dict of path to LazyTensor.
        format: str, see `names.tensor_specs`.
        config: PaliGemmaConfig.

    Returns:
        dict of the format's name to LazyTensor.

    Raises:
        ValueError: if there are other weights, such as a subclass may add.
    """
    groups = collections.defaultdict(list)
    unknown = set(weights)
    for spec in names.tensor_specs(format, config):
        groups[spec.name].append(spec)
        unknown.discard(spec.path)
    if unknown:
        raise ValueError(
            "A checkpoint has no place for weights that were added to the model: "
            f"{shorten(unknown)}. `model.save` keeps them."
        )

    def lazy(specs):
        dtype = common_dtype(weights[spec.path] for spec in specs)
        shape = names.stacked_shape(specs)
        filler = HUGGING_FACE_FILLER_ROWS if (format, specs[0].path) == ("hf", _EMBEDDING) else 0
        shape = (shape[0] + filler, *shape[1:])

        def read():
            if not specs[0].index:
                array = specs[0].to_source(weights[specs[0].path].read())
                return np.pad(array, ((0, filler), (0, 0))) if filler else array
            stacked = np.empty(shape, dtype)
            for spec in specs:
                stacked[spec.index] = spec.to_source(weights[spec.path].read())
            return stacked

        return LazyTensor(shape, dtype, read)

    return {name: lazy(specs) for name, specs in groups.items()}


def resize_positions(weights, config, image_size):
    """Resamples the position embedding to another image size, bilinearly between its corners.

    Args:
        weights: dict of path to LazyTensor, for `config`.
        config: PaliGemmaConfig of the weights.
        image_size: int, side of the new images in pixels.

    Returns:
        dict of path to LazyTensor.

    Source: big_vision `models/vit.py`, `resample_posemb`.
    """
    old, new = (size // config.vision.patch_size for size in (config.vision.image_size, image_size))
    if old == new:
        return weights
    tensor = weights[_POSITIONS]

    def interpolate(grid):  # along the first axis
        places = np.linspace(0, old - 1, new)
        low = np.clip(np.floor(places).astype(int), 0, max(old - 2, 0))
        share = (places - low).reshape(-1, 1, 1)
        return grid[low] * (1 - share) + grid[np.minimum(low + 1, old - 1)] * share

    def read():
        grid = tensor.read().astype("float32").reshape(old, old, -1)
        grid = interpolate(interpolate(grid).swapaxes(0, 1)).swapaxes(0, 1)
        return grid.reshape(new * new, -1).astype(tensor.dtype)

    shape = (new * new, tensor.shape[1])
    return {**weights, _POSITIONS: LazyTensor(shape, tensor.dtype, read)}


def _warn_of_changed_ends(tensors, config):
    """Warns of added tokens, and of a head that is not tied: neither is read."""
    embedding = tensors[names.HUGGING_FACE_EMBEDDING]
    added = embedding.shape[0] - config.text.vocab_size - HUGGING_FACE_FILLER_ROWS
    if added > 0:
        _LOG.warning(
            "The embedding has %d more rows than PaliGemma's, of tokens that were added. They are "
            "left out: prompts and answers with these tokens will not be those of the model that "
            "was trained.",
            added,
        )
    for head in names.HUGGING_FACE_HEADS:
        if head in tensors and not np.array_equal(tensors[head].read(), embedding.read()):
            _LOG.warning(
                "The head %r differs from the embedding, to which PaliGemma ties it. It is "
                "ignored: the answers will not be those of the model that was trained.",
                head,
            )


def _check_fit(specs, tensors, format, path):
    groups = collections.defaultdict(list)
    for spec in specs:
        groups[spec.name].append(spec)
    ignored = names.HUGGING_FACE_HEADS if format == "hf" else ()
    missing = sorted(set(groups) - set(tensors))
    extra = sorted(set(tensors) - set(groups) - set(ignored))
    wrong = []
    for name, group in groups.items():
        if name not in tensors:
            continue
        expected, found = names.stacked_shape(group), tensors[name].shape
        fits = found == expected
        if format == "hf" and group[0].path == _EMBEDDING:  # Hugging Face pads the vocabulary
            fits = found[1:] == expected[1:] and found[0] >= expected[0]
        if not fits:
            wrong.append(f"{name}: expected {expected}, found {found}")
        if tensors[name].dtype not in _SAFETENSORS_DTYPES.values():
            expected = " or ".join(_SAFETENSORS_DTYPES.values())
            wrong.append(f"{name}: expected {expected}, found {tensors[name].dtype}")
    if missing or extra or wrong:
        raise misfit(f"The checkpoint {path!r} does not fit its config.", missing, extra, wrong)


def misfit(message, missing, unknown, wrong):
    """A ValueError that names the tensors of a file that do not fit."""
    return ValueError(
        f"{message}\n"
        f"Missing tensors ({len(missing)}): {shorten(missing)}\n"
        f"Unknown tensors ({len(unknown)}): {shorten(unknown)}\n"
        f"Wrong tensors ({len(wrong)}): {shorten(wrong)}"
    )


def shorten(items, limit=20):
    """The first items of a list, sorted, for an error."""
    items = sorted(items)
    shown = items[:limit] + ([f"… {len(items) - limit} more"] if len(items) > limit else [])
    return ", ".join(shown) or "none"


# Writing ------------------------------------------------------------------------------------


@contextlib.contextmanager
def replace_when_done(path, overwrite=False, num_bytes=0, is_folder=False):
    """A new path beside `path`, which becomes `path` only if all goes well.

    Args:
        path: str, a file or folder to be.
        overwrite: bool, whether something may be there already.
        num_bytes: int, room on the disk that is needed.
        is_folder: bool, whether it will be a folder. A folder never replaces a file, nor a file a
            folder.

    Yields:
        str, a path in a new temporary folder on the same disk.

    Raises:
        FileExistsError: if `path` exists and `overwrite` is False, or is of the other kind, or a
            folder that holds other things than a checkpoint or cannot be replaced.
        OSError: if the disk is too full.
        ValueError: if `path` is of a hub.
    """
    path = os.path.realpath(path_to_write(path))
    _check_target(path, overwrite, is_folder)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    free = shutil.disk_usage(os.path.dirname(path)).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC, f"{num_bytes / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} are free", path
        )
    with tempfile.TemporaryDirectory(
        prefix=f".{os.path.basename(path)}-", dir=os.path.dirname(path)
    ) as folder:
        new, old = os.path.join(folder, "new"), os.path.join(folder, "old")
        yield new
        _check_target(path, overwrite, is_folder)  # writing took long
        try:
            if is_folder and os.path.lexists(path):  # a file can take the place of another
                os.rename(path, old)
            os.replace(new, path)
        except BaseException:  # an interrupt too
            if os.path.lexists(old) and not os.path.lexists(path):
                os.rename(old, path)
            raise


def path_to_write(path):
    """The path, str, with "~" replaced.

    Raises:
        ValueError: if it is of a hub.
    """
    path = os.fspath(path)
    if re.match("(hf|kaggle)://", path):
        raise ValueError(
            f"{path!r} is no path. `upload_preset` and `upload_adapter` write to hubs."
        )
    return os.path.expanduser(path)


def _check_target(path, overwrite, is_folder):
    """Raises a FileExistsError if something is lost when `path` is replaced, or it cannot be."""
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(
            f"{path!r} exists already. Choose another path, or pass `overwrite=True`."
        )
    if os.path.lexists(path) and os.path.isdir(path) != is_folder:
        kinds = ("a file", "a folder") if is_folder else ("a folder", "a file")
        raise FileExistsError(
            f"{path!r} is {kinds[0]}, where {kinds[1]} is to be. Choose another path."
        )
    entries = os.listdir(path) if is_folder and os.path.lexists(path) else []
    others = [name for name in entries if not _FILE_OF_A_CHECKPOINT.fullmatch(name)]
    if others or (entries and "config.json" not in entries):
        raise FileExistsError(
            f"The folder {path!r} holds other things than a checkpoint, which would be lost: "
            f"{shorten(others or entries, 5)}. Choose another path."
        )
    if not os.path.isdir(path):
        return
    here = pathlib.Path(os.path.realpath(os.curdir))
    if pathlib.Path(path) in (here, *here.parents):
        raise FileExistsError(
            f"{path!r} is the current folder or holds it, so it cannot be replaced. Choose another "
            "path."
        )
    if os.path.ismount(path):
        raise FileExistsError(
            f"{path!r} is a mount point, which cannot be replaced. Choose a folder inside of it."
        )


def write_safetensors(folder, tensors, progress, max_shard_bytes=_MAX_SHARD_BYTES):
    """Writes `model.safetensors`, or shards and their index above `max_shard_bytes`.

    Args:
        folder: str, an existing folder.
        tensors: dict of name to LazyTensor.
        progress: callable with the number of bytes written since its last call.
        max_shard_bytes: int.
    """
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.num_bytes
    if len(shards) == 1:
        _write_shard(os.path.join(folder, "model.safetensors"), tensors, progress)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(os.path.join(folder, file_name), shard, progress)
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(os.path.join(folder, "model.safetensors.index.json"), index)


def _write_shard(path, tensors, progress):
    # The library's `save_file` wants all values in memory at once.
    codes = {dtype: code for code, dtype in _SAFETENSORS_DTYPES.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.num_bytes
        header[name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            _write_values(file, tensor, progress)


def _write_values(file, tensor, progress):
    array = np.ascontiguousarray(tensor.read().astype(tensor.dtype, copy=False))
    file.write(memoryview(array.reshape(-1).view("uint8")))
    progress(tensor.num_bytes)


def write_npz(path, tensors, progress):
    """Writes a big_vision `.npz`, bfloat16 as two bytes without a type, as released.

    Args:
        path: str.
        tensors: dict of name to LazyTensor.
        progress: callable with the number of bytes written since its last call.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, tensor in tensors.items():
            descr = "|V2" if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype).str
            header = {"descr": descr, "fortran_order": False, "shape": tuple(tensor.shape)}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                _write_values(member, tensor, progress)


def write_h5(path, tensors, progress):
    """Writes a Keras `model.weights.h5`.

    Args:
        path: str.
        tensors: dict of name to LazyTensor.
        progress: callable with the number of bytes written since its last call.
    """
    # HDF5 does not survive a disk that gets full, so look for the room first.
    if hasattr(os, "posix_fallocate"):
        with open(path, "wb") as file:
            total = sum(tensor.num_bytes for tensor in tensors.values())
            os.posix_fallocate(file.fileno(), 0, total)
    with h5py.File(path, "w") as file:
        for name, tensor in tensors.items():
            dataset = file.create_dataset(name, data=np.ascontiguousarray(tensor.read()))
            if tensor.dtype == "bfloat16":
                dataset.attrs["dtype"] = "bfloat16"  # as Keras marks it
            progress(tensor.num_bytes)


def write_json(path, values):
    """Writes indented JSON."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
