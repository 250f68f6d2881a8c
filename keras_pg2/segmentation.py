"""The `<seg>` codec: masks to 16 codes inside their boxes and back, and strings of both.

A box is `(x1, y1, x2, y2)` in pixels of an image of `height` × `width`, half-open: it ends behind
its last pixel. The box of a mask whose last column is 9 has `x2 = 10`, and `x2 = width` at the
right edge. COCO's `(x, y, w, h)` is `(x, y, x + w, y + h)`. In strings the order is y1 x1 y2 x2.
"""

import contextlib
import json
import os
import sys
import zipfile
import zlib

import keras
import numpy as np
import safetensors
import safetensors.numpy
from keras import layers, ops
from PIL import Image

from keras_pg2 import _backend
from keras_pg2.checkpoints import io, names
from keras_pg2.tokenizer import NUM_LOCATIONS, NUM_SEGMENTS

OFFICIAL_URL = "https://storage.googleapis.com/big_vision/paligemma/vae-oid.npz"
MASK_SIZE = 64  # side of a mask inside its box
GRID_SIZE = 4  # the codes are 4 rows of 4
NUM_CODES = GRID_SIZE**2

_FORMAT, _VERSION = "keras_pg2.segmentation_codec", 1
_LARGEST_BATCH = 64
# Training of the codebook: a row is the moving average of the features nearest to it.
_COMMITMENT = 0.25
_AVERAGE_DECAY = 0.98
_DEAD_USAGE = 0.05  # of the mean usage; a row below it starts again at a feature of the batch


class ResidualBlock(layers.Layer):
    """Three convolutions, 3×3, 3×3 and 1×1, with ReLUs between them, added to their input.

    Args:
        width: int, channels.

    Call arguments:
        x: float (B, 4, 4, width).

    Returns:
        float (B, 4, 4, width).
    """

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.convs = [
            _conv(width, kernel_size, activation, name=f"conv_{i}", dtype=self.dtype_policy)
            for i, (kernel_size, activation) in enumerate([(3, "relu"), (3, "relu"), (1, None)])
        ]

    def build(self, input_shape):
        for conv in self.convs:
            conv.build(input_shape)

    def call(self, x):
        residual = x
        for conv in self.convs:
            residual = conv(residual)
        return x + residual

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_pg2")
class SegmentationCodec(keras.Model):
    """Masks inside their boxes as 4×4 codes of 128, PaliGemma's `<seg>` tokens: a VQ-VAE.

    The encoder halves a 64×64 mask four times; each of the 4×4 features becomes its nearest row of
    the codebook; the decoder mirrors the encoder. Convolutions are channels-last on every backend.
    The nearest row is sought in float32.

    `fit(masks, masks)` trains it: gradients pass straight through the codebook, to whose rows
    features are committed; rows follow the features by moving averages, and start again where
    features are once they die.

    Args:
        widths: tuple of 4 int, channels after each halving.
        num_residual_blocks: int, in the encoder and in the decoder.
        code_width: int, size of a row of the codebook.
        dtype: dtype policy or its name. float32 whatever the global policy is: low precision
            changes codes.
        name: str.

    Call arguments:
        masks: float (B, 64, 64) or (B, 64, 64, 1) in [0, 1].
        training: bool, whether codebook and commitment act.

    Returns:
        float (B, 64, 64), masks after a round trip: inside where positive.

    Example:
        >>> codec = keras_pg2.SegmentationCodec.from_file()  # the official one, 8 MB
        >>> codes = codec.encode(masks)  # (B, 64, 64) -> (B, 16)
        >>> codec.decode(codes) > 0

    Source: big_vision `pp/proj/paligemma/segmentation.py` and
    `evaluators/proj/paligemma/transfers/segmentation.py`.
    """

    def __init__(
        self,
        widths=(16, 32, 64, 128),
        num_residual_blocks=2,
        code_width=512,
        dtype="float32",
        name="segmentation_codec",
        **kwargs,
    ):
        super().__init__(dtype=dtype, name=name, **kwargs)
        widths = tuple(widths)
        if len(widths) != 4 or not all(_is_positive_int(width) for width in widths):
            raise ValueError(f"`widths` must be 4 positive integers. Received: widths={widths}")
        if not _is_positive_int(code_width):
            raise ValueError(
                f"`code_width` must be a positive integer. Received: code_width={code_width!r}"
            )
        if num_residual_blocks != 0 and not _is_positive_int(num_residual_blocks):
            raise ValueError(
                "`num_residual_blocks` must be an integer of at least 0. "
                f"Received: num_residual_blocks={num_residual_blocks!r}"
            )
        self.widths = widths
        self.num_residual_blocks = num_residual_blocks
        self.code_width = code_width
        self.programs = _backend.Programs()
        policy = self.dtype_policy

        def residual_blocks():
            return [
                ResidualBlock(widths[-1], name=f"residual_{i}", dtype=policy)
                for i in range(num_residual_blocks)
            ]

        def halve(i):
            return _conv(widths[i], 4, "relu", strides=2, name=f"downsample_{i}", dtype=policy)

        def double(i):
            return layers.Conv2DTranspose(
                widths[-1 - i],
                kernel_size=4,
                strides=2,
                padding="same",
                activation="relu",
                data_format="channels_last",
                name=f"upsample_{i}",
                dtype=policy,
            )

        self.encoder = keras.Sequential(
            [
                *map(halve, range(4)),
                *residual_blocks(),
                _conv(code_width, 1, None, name="projection", dtype=policy),
            ],
            name="encoder",
        )
        self.decoder = keras.Sequential(
            [
                _conv(widths[-1], 1, "relu", name="projection", dtype=policy),
                *residual_blocks(),
                *map(double, range(4)),
                _conv(1, 1, None, name="output", dtype=policy),
            ],
            name="decoder",
        )
        self.build()

    def build(self, input_shape=None):
        self.encoder.build((None, MASK_SIZE, MASK_SIZE, 1))
        self.decoder.build((None, GRID_SIZE, GRID_SIZE, self.code_width))
        self.codebook = self.add_weight(
            name="codebook",
            shape=(NUM_SEGMENTS, self.code_width),
            initializer="random_normal",
            dtype="float32",
            autocast=False,  # under a mixed policy Keras would assign to a copy
            trainable=False,
        )
        # Relative to the mean. Zeros make the first batch of a training choose all rows.
        self.usage = self.add_weight(
            name="usage",
            shape=(NUM_SEGMENTS,),
            initializer="zeros",
            dtype="float32",
            autocast=False,
            trainable=False,
        )
        self.built = True

    @classmethod
    def from_file(cls, path=None):
        """A codec with the weights of a file, recognised by its content.

        Args:
            path: path of big_vision's `vae-oid.npz` or of a file of `save_file`, or None for the
                official `vae-oid.npz`, which is downloaded once.

        Returns:
            SegmentationCodec.

        Raises:
            FileNotFoundError: if there is no such file.
            OSError: if the download fails.
            ValueError: if the file is damaged or holds something else.
        """
        path = _download() if path is None else os.path.expanduser(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(
                "`path` must be big_vision's vae-oid.npz, a file of `save_file`, or None to "
                f"download the official one. Received: path={path!r}"
            )
        if zipfile.is_zipfile(path) or path.endswith(".npz"):
            config, tensors = {}, _from_big_vision(io.read_npz(path))
        else:
            config, tensors = _read_config(path), io.read_safetensors(*os.path.split(path))
        try:
            with _backend.variables_without_values():
                codec = cls(**config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The codec {path!r} has a config of another kind: {error}") from error
        codec._assign_weights(tensors, path)
        return codec

    def save_file(self, path, *, dtype=None, overwrite=False):
        """Writes weights and config to one safetensors file for `from_file`.

        It is complete or not there at all: it is written under a temporary name first.

        Args:
            path: path.
            dtype: "float16" to halve the file, "bfloat16", "float32", or None for the codec's.
            overwrite: bool, whether to replace what is there.

        Raises:
            FileExistsError: if `path` exists and `overwrite` is False, or is a folder.
            ValueError: if there is no such dtype.
        """
        if dtype not in (None, "float16", "bfloat16", "float32"):
            raise ValueError(
                "`dtype` must be 'float16', 'bfloat16', 'float32' or None. "
                f"Received: dtype={dtype!r}"
            )
        # The library's `save_file` would hide the file from other users.
        with io.replace_when_done(path, overwrite) as new, open(new, "wb") as file:
            file.write(self.to_bytes(dtype))

    def to_bytes(self, dtype=None):
        """The bytes of the file that `save_file` writes."""
        tensors = {
            name: np.ascontiguousarray(_backend.to_numpy(v).astype(dtype or v.dtype))
            for name, v in self._variables_by_path().items()
        }
        metadata = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "config": json.dumps(self._architecture()),
        }
        return safetensors.numpy.save(tensors, metadata)

    # Masks and codes

    def encode(self, masks):
        """Masks inside their boxes to codes.

        Args:
            masks: bool, or float in [0, 1], (B, 64, 64) or (B, 64, 64, 1).

        Returns:
            int32 NumPy array (B, 16), row by row, each in [0, 128).

        Raises:
            ValueError: if `masks` has another shape, dtype or range.
        """
        masks = ops.convert_to_numpy(masks)
        received = f"Received: shape {masks.shape}, dtype {masks.dtype}"
        if masks.shape[1:] not in ((MASK_SIZE, MASK_SIZE), (MASK_SIZE, MASK_SIZE, 1)):
            raise ValueError(
                f"`masks` must be (batch, {MASK_SIZE}, {MASK_SIZE}), inside their boxes; "
                f"`crop_masks` makes them so. {received}"
            )
        masks = masks.reshape(-1, MASK_SIZE, MASK_SIZE).astype("float32")
        if not np.all((masks >= 0) & (masks <= 1)):  # NaN fails too
            raise ValueError(
                f"`masks` must be in [0, 1]: divide levels up to 255 by 255. {received}, "
                f"in [{masks.min()}, {masks.max()}]"
            )
        codes = self._run("encode", lambda x: self._nearest(self._features(x)), masks)
        return codes.reshape(-1, NUM_CODES).astype("int32")

    def decode(self, codes):
        """Codes to masks inside their boxes.

        Args:
            codes: int (B, 16), each in [0, 128).

        Returns:
            float32 NumPy array (B, 64, 64): inside where positive. The official codec stays
            near [-1, 1].

        Raises:
            ValueError: if `codes` has another shape, dtype or range.
        """
        codes = ops.convert_to_numpy(codes)
        is_int = np.issubdtype(codes.dtype, np.integer)
        if codes.ndim != 2 or codes.shape[1] != NUM_CODES or not is_int:
            raise ValueError(
                f"`codes` must be integers (batch, {NUM_CODES}). "
                f"Received: shape {codes.shape}, dtype {codes.dtype}"
            )
        if codes.size and not (codes.min() >= 0 and codes.max() < NUM_SEGMENTS):
            raise ValueError(
                f"`codes` must be in [0, {NUM_SEGMENTS}). "
                f"Received: codes in [{codes.min()}, {codes.max()}]"
            )

        def decode(x):
            return self._decoded(ops.take(self.codebook, x, axis=0))

        grid = codes.reshape(-1, GRID_SIZE, GRID_SIZE).astype("int32")
        return self._run("decode", decode, grid).reshape(-1, MASK_SIZE, MASK_SIZE)

    def call(self, masks, training=None):
        features = self._features(masks)  # (B, 4, 4, code_width)
        codes = self._nearest(features)  # (B, 4, 4)
        quantized = ops.take(self.codebook, codes, axis=0)
        if training:
            distance = ops.mean(ops.square(features - ops.stop_gradient(quantized)))
            self.add_loss(_COMMITMENT * distance)
            self._move_codebook(features, codes)
            # The value of the rows, the gradient of the features.
            quantized = features + ops.stop_gradient(quantized - features)
        return self._decoded(quantized)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], MASK_SIZE, MASK_SIZE)

    def _features(self, masks):
        masks = ops.reshape(masks, (-1, MASK_SIZE, MASK_SIZE, 1))
        return ops.cast(self.encoder(2 * (masks - 0.5)), "float32")

    def _nearest(self, features):
        products = ops.matmul(features, ops.transpose(self.codebook))
        # |feature - row|² without |feature|², which is the same for all rows.
        return ops.argmin(ops.sum(ops.square(self.codebook), axis=-1) - 2 * products, axis=-1)

    def _decoded(self, quantized):
        return ops.cast(ops.squeeze(self.decoder(quantized), axis=-1), "float32")

    def _move_codebook(self, features, codes):
        features = ops.reshape(ops.stop_gradient(features), (-1, self.code_width))
        codes = ops.one_hot(ops.reshape(codes, (-1,)), NUM_SEGMENTS, dtype="float32")
        count = ops.cast(ops.shape(features)[0], "float32")
        weight = (1 - _AVERAGE_DECAY) * NUM_SEGMENTS / count
        old = _AVERAGE_DECAY * ops.convert_to_tensor(self.usage)
        usage = old + weight * ops.sum(codes, axis=0)
        totals = weight * ops.matmul(ops.transpose(codes), features)
        moved = (ops.expand_dims(old, -1) * self.codebook + totals) / ops.expand_dims(
            ops.maximum(usage, _DEAD_USAGE), -1
        )
        # Any features of the batch do, since batches are shuffled; the prime spreads their cells.
        places = ops.arange(NUM_SEGMENTS, dtype="int32") * 521 % ops.shape(features)[0]
        restarts = ops.take(features, places, axis=0)
        is_dead = usage < _DEAD_USAGE
        self.codebook.assign(ops.where(ops.expand_dims(is_dead, -1), restarts, moved))
        self.usage.assign(ops.where(is_dead, ops.ones_like(usage), usage))

    def _run(self, name, function, inputs):
        """Applies a compiled function to batches of few sizes: 1, 4, 16 or 64."""
        program = self.programs.get(self, name, function)
        outputs = []
        for start in range(0, len(inputs), _LARGEST_BATCH):
            batch = inputs[start : start + _LARGEST_BATCH]
            count = len(batch)
            if _backend.IS_COMPILED:
                size = next(size for size in (1, 4, 16, _LARGEST_BATCH) if size >= count)
                batch = np.concatenate(
                    [batch, np.zeros((size - count, *batch.shape[1:]), batch.dtype)]
                )
            output = program(_backend.to_tensors(batch))
            outputs.append(_backend.to_numpy(output)[:count])
        return np.concatenate(outputs) if outputs else np.zeros(0, "float32")

    # Saving

    def _architecture(self):
        return {
            "widths": list(self.widths),
            "num_residual_blocks": self.num_residual_blocks,
            "code_width": self.code_width,
        }

    def get_config(self):
        return {
            **super().get_config(),
            **self._architecture(),
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
        }

    def _variables_by_path(self):
        """What files hold: dict of path without the model's name to variable."""
        variables = [*self.trainable_variables, self.codebook]
        return {v.path.split(f"{self.name}/", 1)[-1]: v for v in variables}

    def _assign_weights(self, tensors, path):
        variables = self._variables_by_path()
        missing, extra = set(variables) - set(tensors), set(tensors) - set(variables)
        wrong = [
            f"{name}: expected floats {tuple(variables[name].shape)}, "
            f"found {tensor.dtype} {tensor.shape}"
            for name, tensor in tensors.items()
            if name in variables
            and (
                tensor.shape != tuple(variables[name].shape)
                or tensor.dtype not in ("float32", "float16", "bfloat16")
            )
        ]
        if missing or extra or wrong:
            message = f"The file {path!r} is no segmentation codec, or one of another architecture."
            raise io.misfit(message, missing, extra, wrong)
        try:
            arrays = {name: tensor.read() for name, tensor in tensors.items()}
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"The file {path!r} is damaged: {error}") from error
        for name, array in arrays.items():
            if not np.isfinite(array.astype("float32")).all():
                raise ValueError(f"The file {path!r} is damaged: {name} holds NaN or infinity.")
        for name, array in arrays.items():
            dtype = variables[name].dtype
            _backend.set_value(variables[name], _backend.from_numpy(array.astype(dtype), dtype))
        _backend.set_value(self.usage, ops.ones(NUM_SEGMENTS, "float32"))  # no row is dead


def _conv(width, kernel_size, activation, strides=1, **kwargs):
    # Sizes are even, so "same" with stride 2 is torch's padding of 1 on either side.
    return layers.Conv2D(
        width,
        kernel_size,
        strides=strides,
        padding="same",
        data_format="channels_last",
        activation=activation,
        **kwargs,
    )


def _is_positive_int(value):
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


# Files --------------------------------------------------------------------------------------


def _download():
    try:
        # Keras shows its progress on stdout, where a command writes its results.
        with contextlib.redirect_stdout(sys.stderr):
            return keras.utils.get_file("vae-oid.npz", OFFICIAL_URL, cache_subdir="keras_pg2")
    except Exception as error:  # Keras raises the bare class
        raise OSError(
            f"Could not download {OFFICIAL_URL}: {error}. Download it elsewhere and pass its path."
        ) from error


def _read_config(path):
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"The file {path!r} is damaged, or neither an .npz nor a safetensors file: {error}"
        ) from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"The file {path!r} is no segmentation codec: its metadata must have the format "
            f"{_FORMAT!r}. Received: {metadata.get('format')!r}"
        )
    if metadata.get("version") != str(_VERSION):
        raise ValueError(
            f"The codec {path!r} has version {metadata.get('version')}; this release reads version "
            f"{_VERSION}. Update keras-pg2."
        )
    try:
        return dict(json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The file {path!r} is damaged: its config is no JSON object: {error}"
        ) from error


def _from_big_vision(tensors):
    """Tensors of `vae-oid.npz` by the paths of our variables, in our layout."""

    def to_ours(tensor):
        if len(tensor.shape) != 4:
            return tensor
        # (out, in, p, q), or (in, out, p, q) if transposed, to what Keras has: (p, q, in, out)
        # and (p, q, out, in).
        shape = tuple(tensor.shape[axis] for axis in (2, 3, 1, 0))
        return io.LazyTensor(shape, tensor.dtype, lambda: tensor.read().transpose(2, 3, 1, 0))

    paths = {}
    for line in filter(None, names.SEGMENTATION_CODEC.splitlines()):
        source, path = line.split()
        paths[source] = path
    return {
        paths.get(name, name): to_ours(tensor)
        for name, tensor in tensors.items()
        if name not in names.SEGMENTATION_CODEC_IGNORED
    }


# Boxes and masks ----------------------------------------------------------------------------


def boxes_of_masks(masks):
    """The smallest box around each mask.

    Args:
        masks: bool (count, height, width).

    Returns:
        int32 NumPy array (count, 4).

    Raises:
        ValueError: if a mask is empty, or `masks` no bool array of three axes.
    """
    masks = _checked_masks(masks)
    boxes = np.zeros((len(masks), 4), "int32")
    for i, mask in enumerate(masks):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            raise ValueError(f"A mask must have a pixel that is True. Received: none in masks[{i}]")
        boxes[i] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def crop_masks(masks, boxes):
    """Masks cropped to their boxes and resized for `SegmentationCodec.encode`.

    Args:
        masks: bool (count, height, width).
        boxes: float (count, 4).

    Returns:
        float32 NumPy array (count, 64, 64) in [0, 1], bilinear with antialiasing.

    Raises:
        ValueError: if the numbers differ, a box is empty or outside, a mask has no pixel in its
            box, or `masks` is not bool.

    Source: big_vision `pp/proj/paligemma/segmentation.py`.
    """
    masks = _checked_masks(masks)
    height, width = masks.shape[1:]
    boxes = _checked_boxes(boxes, width, height)
    if len(boxes) != len(masks):
        raise ValueError(
            f"`masks` and `boxes` must be as many. Received: {len(masks)} masks, {len(boxes)} boxes"
        )
    crops = np.zeros((len(masks), MASK_SIZE, MASK_SIZE), "float32")
    for i, (mask, box) in enumerate(zip(masks, boxes)):
        x1, y1, x2, y2 = box_pixels(box, width, height)
        crop = mask[y1:y2, x1:x2]
        if not crop.any():
            raise ValueError(
                "A mask must have a pixel in its box. "
                f"Received: none of masks[{i}] in x1, y1, x2, y2 = {box.tolist()}"
            )
        crops[i] = _resize(crop.astype("float32"), MASK_SIZE, MASK_SIZE)
    return np.clip(crops, 0, 1)


def mask_from_codes(decoded, box, width, height):
    """One mask of the image from what `SegmentationCodec.decode` makes of its codes.

    Args:
        decoded: float (64, 64), inside where positive.
        box: 4 float.
        width, height: int, of the image.

    Returns:
        bool NumPy array (height, width): `decoded` resized bilinearly to the box, where it is
        positive. All False if the box is empty, as models sometimes say.

    Raises:
        ValueError: if `decoded` or `box` has another shape, or `box` holds NaN.
    """
    decoded = ops.convert_to_numpy(decoded)
    box = np.asarray(box, "float64")
    if decoded.shape != (MASK_SIZE, MASK_SIZE):
        raise ValueError(
            f"`decoded` must be one mask ({MASK_SIZE}, {MASK_SIZE}). "
            f"Received: shape {decoded.shape}"
        )
    if box.shape != (4,) or not np.isfinite(box).all():
        raise ValueError(f"`box` must be 4 numbers (x1, y1, x2, y2). Received: box={box.tolist()}")
    mask = np.zeros((height, width), bool)
    box = np.clip(box, 0, [width, height, width, height])
    if box[0] < box[2] and box[1] < box[3]:
        x1, y1, x2, y2 = box_pixels(box, width, height)
        mask[y1:y2, x1:x2] = _resize(decoded.astype("float32"), x2 - x1, y2 - y1) > 0
    return mask


def _resize(array, width, height):
    resized = Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def box_pixels(box, width, height):
    """The pixels whose centres are in a box, at least one.

    Args:
        box: 4 float, x1, y1, x2, y2 in pixels, inside of the image.
        width, height: int, of the image.

    Returns:
        tuple of 4 int, x1, y1, x2, y2; the last two are not part of it.
    """
    start, end = np.ceil(np.reshape(box, (2, 2)) - 0.5).astype(int)
    start = np.minimum(start, [width - 1, height - 1])
    end = np.maximum(end, start + 1)
    return (*start.tolist(), *end.tolist())


def _checked_masks(masks):
    masks = np.asarray(masks)
    if masks.ndim != 3 or masks.dtype != bool:
        raise ValueError(
            "`masks` must be bool (count, height, width), True inside; compare others, as in "
            f"`masks > 127`. Received: shape {masks.shape}, dtype {masks.dtype}"
        )
    return masks


def _checked_boxes(boxes, width, height):
    """float64 (count, 4), clipped to the image."""
    boxes = np.asarray(boxes, "float64")
    boxes = boxes.reshape(0, 4) if boxes.size == 0 else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise ValueError(
            f"`boxes` must be numbers (count, 4), x1 y1 x2 y2 in pixels. Received: {boxes.tolist()}"
        )
    clipped = np.clip(boxes, 0, [width, height, width, height])
    for box, inside in zip(boxes.tolist(), clipped):
        if not (inside[0] < inside[2] and inside[1] < inside[3]):
            raise ValueError(
                "A box (x1, y1, x2, y2) must have x1 < x2 and y1 < y2, and overlap its image of "
                f"height {height} and width {width}. Received: {box}. Leave such objects out, or "
                "convert boxes of COCO: (x, y, x + w, y + h)."
            )
    return clipped


# Strings ------------------------------------------------------------------------------------


def encode_detection(boxes, labels, width, height):
    """Boxes and labels of an image to the suffix PaliGemma learns for `detect`.

    Args:
        boxes: float (count, 4).
        labels: list of str, as many; "" for a box without a label.
        width, height: int, of the image.

    Returns:
        str, "" without boxes.

    Raises:
        ValueError: if the numbers differ, a box is outside of the image, or empty itself or in
            location tokens, or a label is no string or contains ";", "<" or a line break.

    Example:
        >>> encode_detection([(50, 30, 160, 90)], ["cat"], width=200, height=120)
        '<loc0256><loc0256><loc0767><loc0818> cat'

    Source: big_vision `pp/proj/paligemma/segmentation.py`.
    """
    return _join(_locations(boxes, width, height), labels)


def encode_segmentation(codec, masks, labels, boxes=None):
    """Masks and labels to the suffix PaliGemma learns for `segment`, of one image or many.

    Args:
        codec: SegmentationCodec. It encodes the masks of all images together.
        masks: bool (count, height, width), the objects of an image; or a list of such, one for
            each image.
        labels: list of str, as many; or a list of such. "" is a mask without a label.
        boxes: None for the smallest box around each mask; or float (count, 4), or a list of such.

    Returns:
        str, "" without masks; or list of str.

    Raises:
        ValueError: if the numbers differ, masks are not bool, a mask is empty, a box is outside of
            the image, or empty itself or in location tokens, or a label is no string or contains
            ";", "<" or a line break.
    """
    is_single = not len(labels) or isinstance(labels[0], str)
    if is_single:
        masks, labels, boxes = [masks], [labels], [boxes]
    boxes = [None] * len(masks) if boxes is None else boxes
    if not len(masks) == len(labels) == len(boxes):
        raise ValueError(
            "`masks`, `labels` and `boxes` must be of as many images. "
            f"Received: {len(masks)}, {len(labels)}, {len(boxes)}"
        )
    locations, crops = [], [np.zeros((0, MASK_SIZE, MASK_SIZE), "float32")]
    for image_masks, image_boxes in zip(masks, boxes):
        if not len(image_masks):
            locations.append([])
            continue
        if image_boxes is None:
            image_boxes = boxes_of_masks(image_masks)
        crops.append(crop_masks(image_masks, image_boxes))
        height, width = np.shape(image_masks)[1:]
        locations.append(_locations(image_boxes, width, height))
    codes = iter(codec.encode(np.concatenate(crops)).tolist())
    suffixes = [
        _join([box + _segments(next(codes)) for box in image_locations], image_labels)
        for image_locations, image_labels in zip(locations, labels)
    ]
    return suffixes[0] if is_single else suffixes


def _locations(boxes, width, height):
    """list of str, the location tokens of boxes that have an area in them."""
    locations = []
    for box in _checked_boxes(boxes, width, height):
        check_area(box.tolist(), width, height)
        locations.append(location_tokens(box, width, height))
    return locations


def location_tokens(box, width, height):
    """A box as PaliGemma writes it.

    Args:
        box: 4 numbers, (x1, y1, x2, y2) in pixels.
        width, height: int, of the image.

    Returns:
        str, four tokens in the order y1, x1, y2, x2.

    Example:
        >>> location_tokens((0, 28, 56, 112), width=112, height=112)
        '<loc0256><loc0000><loc1023><loc0512>'
    """
    return "".join(f"<loc{place:04d}>" for place in location_numbers(box, width, height))


def check_area(box, width, height):
    """Raises a ValueError if a box, a sequence of 4 numbers, has no area, see `has_area`."""
    if not has_area(box, width, height):
        raise ValueError(
            "A box must have a width and a height in location tokens, of which there are "
            f"{NUM_LOCATIONS} a side. Received: {box} in an image of height {height} and width "
            f"{width}. Leave such objects out."
        )


def has_area(box, width, height):
    """Whether a box still has a width and a height in location tokens."""
    y1, x1, y2, x2 = location_numbers(box, width, height)
    return y1 < y2 and x1 < x2


def location_numbers(box, width, height):
    """The numbers in `location_tokens`: list of 4 int in [0, 1024), y1, x1, y2, x2."""
    x1, y1, x2, y2 = box
    last = NUM_LOCATIONS - 1
    places = (y1 / height, x1 / width, y2 / height, x2 / width)
    return [min(max(round(place * last), 0), last) for place in places]


def _segments(codes):
    return "".join(f"<seg{code:03d}>" for code in codes)


def _join(tokens, labels):
    if isinstance(labels, str) or len(labels) != len(tokens):
        raise ValueError(
            f"`labels` must be a list of {len(tokens)} strings, one for each object. "
            f"Received: labels={labels!r}"
        )
    for label in labels:
        if not isinstance(label, str) or set(";<\n") & set(label.strip()):
            raise ValueError(
                "A label must be a string without ';', '<' and line breaks, at which it would be "
                f"read as another. Received: {label!r}"
            )
    return " ; ".join(f"{token} {label.strip()}".rstrip() for token, label in zip(tokens, labels))
