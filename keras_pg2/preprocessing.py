"""Images, prompts and answers to the arrays that the model reads. NumPy and Pillow only."""

import collections.abc
import concurrent.futures
import functools
import io
import math
import os
import struct
import threading

import numpy as np
from PIL import ExifTags, Image

from keras_pg2.tokenizer import BOS_ID, EOS_ID, PAD_ID, Tokenizer

_INTERPOLATIONS = ("bicubic", "bilinear")
# What Pillow raises for damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
)
# What turns an image of each orientation upright. Pillow's own function also writes the other
# tags anew, and fails if one of them is odd.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Threads that prepare batches may meet in one PIL image, which not even reading leaves as it is.
_LOCKS = [threading.Lock() for _ in range(64)]
_CHANNELS = (1, 3, 4)
_IMAGE_TYPES = (
    "a path, the bytes of an image file, a PIL image, or an array: uint8 in [0, 255] or float in "
    "[0, 1]"
)


class Preprocessor:
    """Images and texts to model inputs, as PaliGemma was trained.

    An image is squashed to a square, whatever its aspect ratio. A text becomes
    `<bos> prefix "\\n" suffix <eos>`; the newline is a token of its own, added once even
    if the prompt already ends in one.

    Args:
        tokenizer: Tokenizer.
        image_size: int, I, side of the square in pixels.
        sequence_length: int, T, tokens of text in a training example. Defaults to the
            pretraining lengths: 128 up to 224 px, 512 above.
        interpolation: "bilinear" (antialiased, truncated to whole levels: what the models
            were trained with) or "bicubic" (equal to transformers' processor).

    Raises:
        ValueError: if an argument is out of range, or `tokenizer` is no Tokenizer.

    Source: big_vision `pp/ops_image.py` `get_resize`, `configs/proj/paligemma/transfers/common.py`.
    """

    def __init__(self, tokenizer, image_size, sequence_length=None, interpolation="bilinear"):
        if interpolation not in _INTERPOLATIONS:
            raise ValueError(
                f"`interpolation` must be one of {list(_INTERPOLATIONS)}. "
                f"Received: interpolation={interpolation!r}"
            )
        self.tokenizer = _checked_tokenizer(tokenizer)
        self.image_size = _integer("image_size", image_size, 1)
        if sequence_length is None:
            sequence_length = 128 if self.image_size <= 224 else 512
        self.sequence_length = _integer("sequence_length", sequence_length, 2)
        self.interpolation = interpolation

    def get_config(self):
        """The arguments but the tokenizer."""
        return {
            "image_size": self.image_size,
            "sequence_length": self.sequence_length,
            "interpolation": self.interpolation,
        }

    # Images

    def load_image(self, image):
        """One image to levels in [-1, 1].

        Args:
            image: a path; the bytes of an image file, a file object, or a dict of "bytes" and
                "path" (Hugging Face's); a PIL image of any mode (EXIF orientation is applied,
                alpha dropped, mode "F" read as levels in [0, 255]); or an array or tensor (H, W),
                (H, W, C) or (C, H, W), C of 1, 3 or 4, of uint8 in [0, 255] or float in [0, 1].

        Returns:
            float32 NumPy array (I, I, 3).

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the image cannot be read, has no pixels, or is an array of
                another rank, dtype or range.
        """
        if self.interpolation == "bicubic":
            size = (self.image_size, self.image_size)
            image = _read(image)
            if not isinstance(image, Image.Image):
                image = Image.fromarray(_pixels(image))
            levels = np.array(image.resize(size, Image.Resampling.BICUBIC), "float32")
        else:
            levels = _resize(_levels(_read(image)), self.image_size)
            # big_vision casts back to uint8, which truncates; the tolerance absorbs rounding.
            levels += 1e-3
            np.floor(levels, out=levels)
        levels /= 127.5  # in place, since new pages of memory take longer than the arithmetic
        levels -= 1
        return levels

    def load_images(self, examples):
        """Images of several examples, read in parallel threads.

        Args:
            examples: list of lists of images, M for each example.

        Returns:
            float32 (B, M, I, I, 3) in [-1, 1].

        Raises:
            ValueError: if the examples have different numbers of images, or none.
        """
        counts = {len(x) if isinstance(x, (list, tuple)) else 0 for x in examples}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(
                "`images` must be a list of lists, with the same number of images, at least one, "
                f"for each example. Received: {sorted(counts)} images in {examples!r:.80}"
            )
        # Each image once: two threads cannot load one PIL image.
        # Threads of this call alone: a pool that stays would hang forked data loaders.
        distinct = {id(image): image for images in examples for image in images}
        with concurrent.futures.ThreadPoolExecutor(_num_cores()) as threads:
            loaded = dict(zip(distinct, threads.map(self.load_image, distinct.values())))
        return np.array([[loaded[id(image)] for image in images] for images in examples])

    # Texts

    def tokenize(self, prompt, response="", end=False):
        """One text to token ids.

        Args:
            prompt: str, the prefix.
            response: str, the suffix or its beginning.
            end: bool, whether `<eos>` follows.

        Returns:
            token_ids: list of int.
            suffix_mask: list of bool, True on the response and `<eos>`.
        """
        for name, text in (("prompts", prompt), ("responses", response)):
            if not isinstance(text, str):
                raise ValueError(f"`{name}` must be strings. Received: {text!r}")
        encode = self.tokenizer.encode
        prefix = [BOS_ID, *encode(prompt.removesuffix("\n")), *encode("\n")]
        suffix = [*encode(response), *([EOS_ID] if end else [])]
        return prefix + suffix, [False] * len(prefix) + [True] * len(suffix)

    # Batches

    def for_generation(self, images, prompts, responses=None):
        """A batch to complete. Rows of text end together, padding comes first.

        Args:
            images: list of lists of images, see `load_image`.
            prompts: list of str.
            responses: None, or list of str, the beginnings of the answers.

        Returns:
            dict of "images" float32 (B, M, I, I, 3), "token_ids" int32 (B, T),
            "padding_mask" bool (B, T) and "suffix_mask" bool (B, T).
        """
        _check_counts(images, prompts, prompts if responses is None else responses)
        texts = self.texts_for_generation(prompts, responses)
        return {"images": self.load_images(images), **texts}

    def texts_for_generation(self, prompts, responses=None):
        """What `for_generation` returns, without the images."""
        pairs = zip(prompts, [""] * len(prompts) if responses is None else responses, strict=True)
        return align_right([self.tokenize(prompt, response) for prompt, response in pairs])

    def for_training(self, images, prompts, responses):
        """A batch to learn, padded on the right to `sequence_length`.

        Longer texts are cut at the end, so that they lose their `<eos>`, as in big_vision.

        Args:
            images: list of lists of images, see `load_image`.
            prompts: list of str.
            responses: list of str.

        Returns:
            x: dict as in `for_generation`, T = `sequence_length`.
            y: int32 (B, T), the next token of each position.
            sample_weight: float32 (B, T), 1 / n where the next token is one of the n suffix
                tokens, else 0. With `reduction="mean_with_sample_weight"` the loss is the
                mean over examples of the mean over their suffix tokens, as in big_vision.
        """
        _check_counts(images, prompts, responses)
        length = self.sequence_length
        pairs = zip(prompts, responses, strict=True)
        texts = [self.tokenize(prompt, response, end=True) for prompt, response in pairs]
        texts = [(ids[:length], suffix[:length]) for ids, suffix in texts]
        x = {"images": self.load_images(images), **_text_arrays(texts, length, padding_first=False)}
        y = np.roll(x["token_ids"], -1, axis=1)
        y[:, -1] = PAD_ID
        weight = np.roll(x["suffix_mask"], -1, axis=1).astype("float32")
        weight[:, -1] = 0
        return x, y, weight / np.maximum(weight.sum(axis=1, keepdims=True), 1)


def _checked_tokenizer(tokenizer):
    """A Tokenizer. Others can `encode`, too, but not as PaliGemma was trained."""
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            "`tokenizer` must be a keras_pg2.Tokenizer, such as `Tokenizer.from_file(path)`; those "
            f"of other libraries add tokens of their own. Received: tokenizer={tokenizer!r:.80}"
        )
    return tokenizer


def _integer(name, value, least):
    """An argument as int."""
    if not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}. Received: {name}={value!r}"
        )
    return int(value)


def _check_counts(images, *texts):
    if any(isinstance(text, str) or len(text) != (len(images) or -1) for text in texts):
        raise ValueError(
            "`images`, `prompts` and `responses` must be lists of one length, an item for each "
            f"example. Received: {len(images)} examples of images, prompts={texts[0]!r:.80}"
        )


def _num_cores():
    """Cores that this process may use; Python counts all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def align_right(texts):
    """Ragged texts to arrays, padding first, so that all rows end in the last column.

    Args:
        texts: list of `(token_ids, suffix_mask)`, each a sequence of one length.

    Returns:
        dict of "token_ids" int32, "padding_mask" and "suffix_mask" bool, each (B, T).
    """
    return _text_arrays(texts, max(len(ids) for ids, _ in texts), padding_first=True)


def _text_arrays(texts, length, padding_first):
    shape = (len(texts), length)
    token_ids = np.full(shape, PAD_ID, "int32")
    padding_mask, suffix_mask = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, (ids, suffix) in enumerate(texts):
        place = np.s_[row, length - len(ids) :] if padding_first else np.s_[row, : len(ids)]
        token_ids[place], padding_mask[place], suffix_mask[place] = ids, True, suffix
    return {"token_ids": token_ids, "padding_mask": padding_mask, "suffix_mask": suffix_mask}


def batch_examples(images, prompts, responses=None):
    """What users pass, single or batched, as lists of equal length.

    Args:
        images: an image, see `Preprocessor.load_image`; a list of images, one for each
            example; a list of lists or of arrays (M, H, W, 3), several for each example; or an
            array (B, H, W, 3) or (B, M, H, W, 3). A single image goes with every prompt.
        prompts: str, or list of str. A single prompt goes with every image. Here and in paths,
            bytes, arrays and tensors of strings are as good.
        responses: None, str, or list of str.

    Returns:
        images: list of lists of images.
        prompts: list of str.
        responses: list of str.
        is_single: bool, whether the user passed one image and one prompt.

    Raises:
        ValueError: if the numbers of images, prompts and responses differ, or are 0.
    """
    if _is_array(images) and len(images.shape) in (4, 5):
        images = list(_to_numpy(images))
    if hasattr(images, "ragged_rank"):  # of tf.data's `ragged_batch`
        images = list(images)
    images, prompts, responses = map(_items, (images, prompts, responses))
    one_image = not isinstance(images, list)
    one_prompt = isinstance(prompts, str)
    images = [_images_of(item) for item in ([images] if one_image else images)]
    one_response = responses is None or isinstance(responses, str)
    for name, texts in (("prompts", prompts), ("responses", responses)):
        is_none = name == "responses" and texts is None
        if not is_none and not isinstance(texts, (str, list)):
            raise ValueError(f"`{name}` must be a str or a list of str. Received: {texts!r:.80}")
    prompts = [prompts] if one_prompt else prompts
    responses = [responses or ""] if one_response else responses
    count = len(prompts) if one_image else len(images)
    images = images * count if one_image else images
    prompts = prompts * count if one_prompt else prompts
    responses = responses * count if one_response else responses
    if not count or not len(images) == len(prompts) == len(responses):
        raise ValueError(
            "`images`, `prompts` and `responses` must be as many, at least one; a single one "
            f"goes with all. Received: {len(images)} images, {len(prompts)} prompts, "
            f"{len(responses)} responses"
        )
    return images, prompts, responses, one_image and one_prompt and one_response


def check_tokenized(token_ids, images, vocab_size):
    """Checks the values of tokenized data.

    Args:
        token_ids: NumPy array, not empty.
        images: NumPy array, or None.
        vocab_size: int, V.

    Raises:
        ValueError: if ids are no integers below `vocab_size`, or images are no finite floats in
            [-1, 1].
    """
    if token_ids.dtype.kind not in "iu" or token_ids.min() < 0 or token_ids.max() >= vocab_size:
        raise ValueError(
            f"`token_ids` must be integers in [0, {vocab_size}), the vocabulary. Received: dtype "
            f"{token_ids.dtype}, values in [{token_ids.min()}, {token_ids.max()}]"
        )
    if images is None:
        return
    # Kind "V" is bfloat16.
    if images.dtype.kind not in "fV" or not (np.abs(images.astype("float32")) <= 1.01).all():
        raise ValueError(
            "`images` of tokenized data must be finite floats in [-1, 1], as "
            f"`preprocessor.load_images` makes them. Received: dtype {images.dtype}, values in "
            f"[{images.min()}, {images.max()}]"
        )


def checked_preprocessor(preprocessor, config):
    """The Preprocessor, or None; a ValueError unless it makes what a model of the config reads."""
    if preprocessor is None:
        return None
    if not isinstance(preprocessor, Preprocessor):
        raise ValueError(
            "`preprocessor` must be a keras_pg2.Preprocessor or None. Received: "
            f"preprocessor={preprocessor!r:.80}"
        )
    if preprocessor.image_size != config.vision.image_size:
        raise ValueError(
            "`preprocessor` and `config` must have the same image size. Received: "
            f"{preprocessor.image_size} and {config.vision.image_size}"
        )
    if preprocessor.tokenizer.vocab_size > config.text.vocab_size:
        raise ValueError(
            f"The tokenizer has {preprocessor.tokenizer.vocab_size} tokens, but the model "
            f"only {config.text.vocab_size}: it is another model's tokenizer."
        )
    return preprocessor


def _images_of(item):
    """The images of an example, as a list."""
    if _is_array(item) and len(item.shape) == 4:
        return list(_to_numpy(item))
    item = _items(item)
    return item if isinstance(item, list) else [item]


def _items(column):
    """A list of what a column of any kind holds; a single item or an array of images stays."""
    column = _text(column)
    is_single = isinstance(column, (str, bytes, os.PathLike, Image.Image, collections.abc.Mapping))
    is_column = len(getattr(column, "shape", (0,))) == 1
    if is_single or not is_column or not isinstance(column, collections.abc.Iterable):
        return column
    return [_text(item) for item in column]


def _text(item):
    """A str, from bytes or a scalar array or tensor of them; others stay, but see `_file_of`."""
    if hasattr(item, "__array__") and getattr(item, "shape", None) == ():
        item = np.asarray(item).item()
    if isinstance(item, collections.abc.Mapping) or hasattr(item, "read"):
        item = _file_of(item)
    try:
        return item.decode() if isinstance(item, bytes) and b"\0" not in item else item
    except UnicodeDecodeError:
        return item  # an image file


def _file_of(item):
    """The bytes of a file object; bytes or path of an image as data sets of Hugging Face have it.

    Others stay.
    """
    if is_stored_image(item):
        return item["path"] if item["bytes"] is None else item["bytes"]
    if hasattr(item, "seek"):
        item.seek(0)
        return item.read()
    return item


def is_stored_image(item):
    """Whether an item is an image of a data set or a Parquet file of Hugging Face, not decoded."""
    return isinstance(item, collections.abc.Mapping) and {"bytes", "path"} <= set(item)


def _is_array(image):
    return hasattr(image, "__array__") and not isinstance(image, Image.Image)


def _to_numpy(array):
    """NumPy array of an array or of a tensor of any library, on any device."""
    if hasattr(array, "detach"):  # torch
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    array = np.asarray(array)
    return array.astype("float32") if array.dtype.name == "bfloat16" else array


def image_size(image):
    """Size of an image as it is seen, without reading its pixels if the format allows it.

    Args:
        image: see `Preprocessor.load_image`; or anything with `width` and `height`.

    Returns:
        (width, height), int, in pixels.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image, or damaged.
    """
    image = _text(image)
    if isinstance(image, (str, bytes, os.PathLike)):
        with _opened(image) as opened:
            return _pil_size(opened, _name(image))
    if isinstance(image, Image.Image):
        return _pil_size(image, "the PIL image")
    if _is_array(image) and len(image.shape) in (2, 3):
        axis = int(_is_channels_first(image.shape))
        return image.shape[axis + 1], image.shape[axis]
    if hasattr(image, "width") and hasattr(image, "height"):
        return image.width, image.height
    raise ValueError(f"Each of `images` must be {_IMAGE_TYPES}. Received: {image!r:.80}")


def _resize(levels, size):
    """Bilinear with antialiasing: a triangle over the levels that a new one covers.

    Args:
        levels: uint8 or float32 (H, W, 3).
        size: int, the new height and width.

    Returns:
        float32 (size, size, 3).
    """
    height, width, _ = levels.shape
    rows = levels.reshape(height, -1)
    low = np.empty((size, rows.shape[1]), "float32")
    # Products of few new rows, or columns, with the old ones near them.
    for new, near, weights in _triangles(height, size, 1):
        np.matmul(weights, rows[near].astype("float32"), out=low[new])
    resized = np.empty((size, size * 3), "float32")
    for new, near, weights in _triangles(width, size, 3):
        np.matmul(low[:, near], weights.T, out=resized[:, new])
    return resized.reshape(size, size, 3)


@functools.lru_cache(maxsize=64)
def _triangles(length, count, num_channels):
    """Weights of the old pixels along an axis in the new ones, eight new ones at a time.

    Args:
        length, count: int, old and new number of pixels.
        num_channels: int, of a pixel, side by side along the axis; 1 if it holds whole rows.

    Returns:
        list of slices of the new and of the old levels, and of the weights, float32 (new, old).
    """
    step = length / count
    reach = max(step, 1)
    parts = []
    for start in range(0, count, 8):
        centers = (np.arange(start, min(start + 8, count)) + 0.5) * step
        first, end = max(int(centers[0] - reach), 0), min(math.ceil(centers[-1] + reach), length)
        distances = centers[:, None] - (np.arange(first, end) + 0.5)
        weights = np.maximum(1 - np.abs(distances) / reach, 0)
        weights /= weights.sum(axis=1, keepdims=True)
        new = slice(start * num_channels, (start + len(weights)) * num_channels)
        near = slice(first * num_channels, end * num_channels)
        parts.append((new, near, np.kron(weights, np.eye(num_channels)).astype("float32")))
    return parts


def image_pixels(image):
    """One image, see `Preprocessor.load_image`, to uint8 (H, W, 3)."""
    return _pixels(_levels(_read(image)))


def _pixels(levels):
    """Levels, see `_read`, to uint8."""
    return levels if levels.dtype == "uint8" else np.round(levels).clip(0, 255).astype("uint8")


def _levels(image):
    """What `_read` returned to levels: uint8 or float32 (H, W, 3)."""
    if not isinstance(image, Image.Image):
        return image
    # In strips that fit in a cache: as a whole Pillow copies it three times.
    levels = np.empty((image.height, image.width, 3), "uint8")
    for top in range(0, image.height, 128):
        bottom = min(top + 128, image.height)
        levels[top:bottom] = image.crop((0, top, image.width, bottom))
    return levels


def _read(image):
    """One image to an upright PIL image of mode "RGB", or from an array to levels in [0, 255].

    Levels are uint8 or float32 (H, W, 3).
    """
    image = _text(image)
    if isinstance(image, (str, bytes, os.PathLike)):
        with _opened(image) as opened:
            return _upright(opened, _name(image))
    if isinstance(image, Image.Image):
        return _upright(image, "the PIL image")
    if hasattr(image, "ragged_rank"):  # one of such a batch
        image = image.to_tensor()
    if not _is_array(image):
        hint = ", which has no pixels" if hasattr(image, "tokens") else ""
        raise ValueError(f"Each of `images` must be {_IMAGE_TYPES}. Received: {image!r:.80}{hint}")
    image = _to_numpy(image)
    received = f"Received: an array of shape {image.shape} and dtype {image.dtype}"
    if image.ndim != 3 or image.shape[-1] not in _CHANNELS:
        image = _channels_last(image)
    if 0 in image.shape:
        raise ValueError(f"An image must have at least one pixel. {received}")
    if image.dtype == np.uint8:
        levels = image
    elif np.issubdtype(image.dtype, np.floating):
        if not np.isfinite(image).all():
            raise ValueError(f"`images` must not contain NaN or infinity. {received}")
        low, high = image.min(), image.max()
        if low < -1e-3 or high > 1 + 1e-3:  # resizing overshoots a little
            remedy = "`(images + 1) / 2`" if low < 0 and high <= 1 else "`.astype('uint8')`"
            raise ValueError(
                "A float array in `images` must be in [0, 1]. "
                f"{received} with values in [{low}, {high}]. Pass {remedy}."
            )
        levels = np.clip(image.astype("float32"), 0, 1) * 255
    else:
        raise ValueError(f"`images` must be {_IMAGE_TYPES}. {received}")
    return np.repeat(levels, 3, axis=-1) if image.shape[-1] == 1 else levels[..., :3]


def _channels_last(array):
    """An array of another layout than (H, W, C) to that."""
    if array.ndim == 2:
        return array[..., None]
    if _is_channels_first(array.shape):
        return np.moveaxis(array, 0, -1)
    raise ValueError(
        "An array in `images` must be (height, width), (height, width, channels) or (channels, "
        "height, width), with 1, 3 or 4 channels. Received: an array of shape "
        f"{array.shape} and dtype {array.dtype}"
    )


def _is_channels_first(shape):
    return len(shape) == 3 and shape[0] in _CHANNELS and shape[2] not in _CHANNELS


def _opened(file):
    """A path, or the bytes of a file, as a PIL image whose pixels are not read yet."""
    if not isinstance(file, bytes):
        file = os.path.expanduser(os.fsdecode(file))
        if not os.path.exists(file) or os.path.isdir(file):
            kind = "image file, but a folder" if os.path.isdir(file) else "such image file"
            is_address = file.startswith(("http://", "https://"))
            hint = ". Addresses are not fetched: download the image first" if is_address else ""
            raise FileNotFoundError(f"No {kind}: {file!r}{hint}")
    try:
        return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    except PermissionError:
        raise
    except _DAMAGE as error:
        raise ValueError(
            f"The file {_name(file)} is no image that Pillow can read, or is damaged."
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"The image {_name(file)} is too large to be safe: {error} Make it smaller first, or, "
            "if you trust it, raise `PIL.Image.MAX_IMAGE_PIXELS`."
        ) from error


def _name(file):
    return f"of {len(file):,} bytes" if isinstance(file, bytes) else repr(os.fspath(file))


def _orientation(image):
    return image.getexif().get(ExifTags.Base.Orientation)


def _pil_size(image, name):
    try:
        with _lock(image):
            if image.format == "TIFF":  # before its pixels are read, Pillow may have turned it
                image.load()
            return image.size[::-1] if _orientation(image) in (5, 6, 7, 8) else image.size
    except _DAMAGE as error:
        raise _damaged(name, error) from error


def _lock(image):
    return _LOCKS[id(image) // 16 % len(_LOCKS)]


def _upright(image, name):
    """A PIL image with its pixels read, turned upright, in mode "RGB"."""
    if 0 in image.size:
        raise ValueError(f"An image must have at least one pixel. Received: {name}, {image.size}")
    try:
        with _lock(image):
            image.load()
            orientation = _orientation(image)
        if orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[orientation])
        if image.mode.startswith("I"):
            grey = np.asarray(image).astype("float32")
            has_16_bits = image.mode != "I" or grey.max() > 255
            image = Image.fromarray(grey / 257 if has_16_bits else grey)
        if image.mode != "RGB":  # La is converted by way of LA alone
            image = (image.convert("LA") if image.mode == "La" else image).convert("RGB")
        return image
    except _DAMAGE as error:
        raise _damaged(name, error) from error


def _damaged(name, error):
    return ValueError(
        f"The image {name} is damaged or of an unknown kind: {error}. Can another program open it? "
        "Save it again as PNG or JPEG."
    )
