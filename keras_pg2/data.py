"""Data files to training examples: JSONL, COCO and visual question answering.

An example is a dict of "image", "prefix" and "suffix". Images stay closed here: an example gives
their paths, and `fit` opens them in threads.
"""

import array
import collections
import collections.abc
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import operator
import os
import random
import sys

import numpy as np
import tqdm
from PIL import Image

from keras_pg2.checkpoints import io
from keras_pg2.preprocessing import image_pixels
from keras_pg2.segmentation import (
    SegmentationCodec,
    box_pixels,
    encode_segmentation,
    has_area,
    location_tokens,
)

_LOG = logging.getLogger(__name__)
_LARGE_FILE, _MANY_ROWS = 10**8, 10**5  # bytes and rows from which progress is shown
_MAX_PLACES = 5  # bad rows named in a warning
_PROMPTS = ("categories", "category", "all classes")
_KINDS = {str: "a string", int: "an integer", list: "a list", object: "an image"}


class Examples(collections.abc.Sequence):
    """Training examples, made when asked for by position. Slices are `Examples` too.

    The functions of this module make them: `jsonl`, `coco_detection`, `coco_segmentation`,
    `coco_captions` and `vqa`. Threads may share them.

    Args:
        read: callable, gives the example of a row: a dict of "image" (path, or list of paths),
            "prefix" and "suffix" (str).
        rows: int array, the rows that these examples are of.

    Example:
        >>> examples = keras_pg2.data.jsonl("train.jsonl")
        >>> examples[0]
        {'image': 'cat.jpg', 'prefix': 'caption en', 'suffix': 'a cat on a sofa'}
        >>> train, validation = examples.split(0.1, seed=0)
        >>> model.fit(train, validation_data=validation)
    """

    def __init__(self, read, rows):
        self._read = read
        self._rows = np.asarray(rows, "int64")

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Examples(self._read, self._rows[index])
        return self._read(int(self._rows[operator.index(index)]))

    def __iter__(self):
        # `Sequence` would take an IndexError of what reads an example for the end.
        return map(self._read, self._rows.tolist())

    def take(self, count):
        """The first `count` examples, or all if there are fewer."""
        return self[: max(count, 0)]

    def split(self, fraction, seed=0):
        """Two parts, drawn at random: the rest, and `fraction` of the examples.

        Examples of one image may fall into both. Each part keeps the order.

        Args:
            fraction: float in (0, 1), share of the second part, at least one example.
            seed: int.

        Returns:
            Examples, Examples.

        Raises:
            ValueError: if `fraction` is out of range, or there are less than 2 examples.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"`fraction` must be in (0, 1). Received: fraction={fraction!r}")
        if len(self) < 2:
            raise ValueError(f"Splitting needs at least 2 examples. Received: {len(self)}")
        count = min(max(round(fraction * len(self)), 1), len(self) - 1)
        is_second = np.zeros(len(self), bool)
        is_second[np.random.default_rng(seed).permutation(len(self))[:count]] = True
        first, second = (self._rows[mask] for mask in (~is_second, is_second))
        return Examples(self._read, first), Examples(self._read, second)


# JSONL --------------------------------------------------------------------------------------


def jsonl(path, image_folder=None, *, prefix=None, check_images=True, on_error="raise", shard=None):
    """Examples of a JSONL file: an object with `image`, `prefix` and `suffix` on each line.

    It is the format of big_vision's fine-tuning notebook. Every line is checked once; what stays
    in memory is where lines begin, 16 bytes for each.

    Args:
        path: path of the file.
        image_folder: path of the folder that file names are relative to. Defaults to the file's.
        prefix: str or None, to take the place of each row's own.
        check_images: bool, whether images must exist.
        on_error: "raise" to stop at the first bad row; or "skip" to leave out bad rows, counted in
            a warning.
        shard: None, or `(index, count)`, the part of one of several processes: every `count`-th
            example. Lengths differ by 1 at most; processes that train together need the same
            number of batches, so give them `steps_per_epoch`.

    Returns:
        Examples. `image` is a path, or a list of paths where the row has a list of names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a row is bad, with file and line; if no example is left; or if an option is
            out of range.

    Example:
        >>> keras_pg2.data.jsonl("train.jsonl", image_folder="images", prefix="caption en")

    Source: big_vision `datasets/jsonl.py`.
    """
    if not isinstance(prefix, str | None):
        raise ValueError(f"`prefix` must be a str or None. Received: prefix={prefix!r}")
    path = os.path.expanduser(path)
    checks = _Checks(on_error, check_images)
    reader = _JsonLines(path, _folder(path, image_folder), prefix, checks)
    return checks.examples(reader.read, len(reader), shard, path)


class _JsonLines:
    """Reads rows of a JSONL file from where they begin."""

    def __init__(self, path, folder, prefix, checks):
        self._path, self._folder, self._prefix, self._checks = path, folder, prefix, checks
        self._offsets, self._numbers = array.array("q"), array.array("q")
        size, offset = os.path.getsize(path), 0
        with (
            open(path, "rb") as file,
            tqdm.tqdm(
                total=size, unit="B", unit_scale=True, disable=size < _LARGE_FILE, desc=path
            ) as bar,
        ):
            for number, line in enumerate(file, 1):
                if line.strip():
                    with checks.row(f"{path}:{number}"):
                        self._example(line)
                        self._offsets.append(offset)
                        self._numbers.append(number)
                offset += len(line)
                bar.update(len(line))

    def __len__(self):
        return len(self._offsets)

    def read(self, row):
        with open(self._path, "rb") as file:
            file.seek(self._offsets[row])
            line = file.readline()
        try:
            return self._example(line)
        except ValueError as error:
            raise ValueError(
                f"{self._path}:{self._numbers[row]}: {error} It was right before: has somebody "
                "changed the file or the images?"
            ) from error

    def _example(self, line):
        row = _parse(line)
        if not isinstance(row, dict):
            raise ValueError(f"A row must be a JSON object. Received: {row!r:.80}.")
        if self._prefix is not None:
            row["prefix"] = self._prefix
        return {
            "image": self._checks.images(self._folder, _field(row, "image", (str, list))),
            "prefix": _field(row, "prefix", str),
            "suffix": _field(row, "suffix", str),
        }


def write_jsonl(path, examples, *, overwrite=False):
    """Writes examples to a JSONL file for `jsonl`.

    Images given as arrays or PIL images are saved as 8-bit PNG in the folder `<name>_images`
    beside the file, equal ones once. Of images given by path the path is written, relative to
    the file. The file is complete or not there at all: it is written under a temporary name first.

    Args:
        path: path of the file.
        examples: iterable of dict with "image" (path, PIL image, array as in
            `Preprocessor.load_image`, or a list of these), "prefix" and "suffix" (str).
        overwrite: bool, whether to replace the file.

    Raises:
        FileExistsError: if `path` exists and `overwrite` is False, or is a folder.
        ValueError: if an example lacks something, is of another type, or an image is missing.

    Example:
        >>> keras_pg2.data.write_jsonl(
        ...     "train.jsonl", [{"image": image, "prefix": "caption en", "suffix": "a cat"}]
        ... )
    """
    # Without links, since ".." after one leads elsewhere.
    path = os.path.realpath(os.path.expanduser(path))
    folder = os.path.dirname(path)
    image_folder = os.path.splitext(os.path.basename(path))[0] + "_images"

    def name(image):
        if isinstance(image, (str, os.PathLike)):
            image = os.path.expanduser(image)
            if not os.path.isfile(image):
                raise ValueError(f"There is no image {image!r}.")
            image_path = os.path.realpath(os.path.dirname(image)), os.path.basename(image)
            return os.path.relpath(os.path.join(*image_path), folder).replace(os.sep, "/")
        levels = image_pixels(image)
        digest = hashlib.sha256(repr(levels.shape).encode() + levels.tobytes()).hexdigest()
        relative = f"{image_folder}/{digest[:32]}.png"
        if not os.path.exists(os.path.join(folder, relative)):
            with io.replace_when_done(os.path.join(folder, relative)) as new:
                Image.fromarray(levels).save(new, "PNG")
        return relative

    with (
        io.replace_when_done(path, overwrite) as new,
        open(new, "w", encoding="utf-8") as file,
    ):
        for position, example in enumerate(examples):
            try:
                image = _field(example, "image", object)
                many = isinstance(image, (list, tuple))
                row = {
                    "image": [name(item) for item in image] if many else name(image),
                    "prefix": _field(example, "prefix", str),
                    "suffix": _field(example, "suffix", str),
                }
                if not row["image"]:
                    raise ValueError("`image` must not be empty.")
            except ValueError as error:
                raise ValueError(f"examples[{position}]: {error}") from error
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


# COCO ---------------------------------------------------------------------------------------


def coco_detection(
    annotations,
    image_folder=None,
    *,
    prompt="categories",
    keep_crowds=False,
    seed=0,
    check_images=True,
    on_error="raise",
    shard=None,
):
    """Examples of COCO's boxes: "detect cat ; dog" -> "<loc…><loc…><loc…><loc…> cat ; …".

    Images without objects are left out, and so are boxes without a width or a height in location
    tokens, of which there are 1,024 a side.

    Args:
        annotations: path of the JSON file, with `images`, `annotations` and `categories`.
        image_folder: path of the folder of the images. Defaults to the file's.
        prompt: "categories": an example for each image, which asks for the categories in it;
            "category": an example for each category in an image; or "all classes": an example
            for each image, "detect all classes" and the objects in random order, drawn once.
            PaliGemma 2 was trained on COCO so, with noise boxes besides, which are not made here.
            In the others, objects go by category, then from top to bottom.
        keep_crowds: bool, whether objects marked `iscrowd` count.
        seed: int, of the order of objects.
        check_images: bool, whether images must exist.
        on_error: "raise" to stop at the first bad image or annotation; or "skip" to leave them
            out, counted in a warning.
        shard: None, or `(index, count)`, see `jsonl`.

    Returns:
        Examples.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an annotation is bad, with file and id; if no example is left; or if an
            option is out of range.

    Example:
        >>> keras_pg2.data.coco_detection("annotations/instances_train2017.json", "train2017")

    Source: arXiv 2407.07726, section 3.2.5; arXiv 2412.03555, appendix B.
    """
    _check_prompt(prompt, _PROMPTS)
    checks = _Checks(on_error, check_images)
    rows = []
    for scene in _scenes(annotations, image_folder, keep_crowds, checks):
        for names, objects in _prompted(scene, prompt, seed):
            size = (scene.width, scene.height)
            suffix = " ; ".join(f"{location_tokens(o.box, *size)} {o.label}" for o in objects)
            rows.append((scene.path, f"detect {names}", suffix))
    return _examples(rows, checks, shard, annotations)


def coco_segmentation(
    annotations,
    image_folder=None,
    *,
    codec,
    prompt="categories",
    keep_crowds=False,
    check_images=True,
    on_error="raise",
    shard=None,
):
    """Examples of COCO's masks: "segment cat ; dog" -> "<loc…>×4<seg…>×16 cat ; …".

    Masks may be polygons, or run lengths as lists or compressed. The codec runs when an example is
    first asked for; suffixes are kept then.

    Args:
        annotations: path of the JSON file, with `images`, `annotations` and `categories`.
        image_folder: path of the folder of the images. Defaults to the file's.
        codec: SegmentationCodec, such as `model.get_codec()`. Or a callable that makes the suffix
            of the objects of one image from `masks` (bool array (count, height, width)),
            `labels` (list of str) and `boxes` (float array (count, 4), x1 y1 x2 y2 in pixels).
        prompt: "categories" or "category", see `coco_detection`.
        keep_crowds: bool, whether objects marked `iscrowd` count.
        check_images: bool, whether images must exist.
        on_error: "raise" or "skip", see `coco_detection`.
        shard: None, or `(index, count)`, see `jsonl`.

    Returns:
        Examples.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an annotation is bad, with file and id; if no example is left; or if an
            option is out of range.

    Example:
        >>> annotations = "annotations/instances_train2017.json"
        >>> keras_pg2.data.coco_segmentation(annotations, "train2017", codec=model.get_codec())

    Source: big_vision `pp/proj/paligemma/segmentation.py`.
    """
    _check_prompt(prompt, _PROMPTS[:2])
    if not callable(codec):
        raise ValueError(
            "`codec` must be a SegmentationCodec, such as `model.get_codec()`, or a function. "
            f"Received: codec={codec!r:.80}"
        )
    checks = _Checks(on_error, check_images)
    rows, objects_of_rows = [], []
    for scene in _scenes(annotations, image_folder, keep_crowds, checks, with_masks=True):
        for names, objects in _prompted(scene, prompt, seed=0):
            rows.append((scene.path, f"segment {names}", None))
            objects_of_rows.append((scene.width, scene.height, objects))
    if isinstance(codec, SegmentationCodec):
        codec = functools.partial(encode_segmentation, codec)
    suffixes = _Segmentations(codec, objects_of_rows)
    return _examples(rows, checks, shard, annotations, suffixes)


def coco_captions(
    annotations,
    image_folder=None,
    *,
    prefix="caption en",
    one_per_image=False,
    seed=0,
    check_images=True,
    on_error="raise",
    shard=None,
):
    """Examples of COCO's captions.

    Args:
        annotations: path of the JSON file, with `images` and `annotations`.
        image_folder: path of the folder of the images. Defaults to the file's.
        prefix: str.
        one_per_image: bool: False for an example for each caption; True for one for each image,
            with a caption drawn at random. The epochs of the paper's recipes count images: 5 of
            them are 1 epoch of all captions.
        seed: int, of the draw.
        check_images: bool, whether images must exist.
        on_error: "raise" or "skip", see `coco_detection`.
        shard: None, or `(index, count)`, see `jsonl`.

    Returns:
        Examples.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an annotation is bad, with file and id; if no example is left; or if an
            option is out of range.

    Example:
        >>> keras_pg2.data.coco_captions("annotations/captions_train2017.json", "train2017")

    Source: big_vision `configs/proj/paligemma/transfers/cococap.py`.
    """
    if not isinstance(prefix, str):
        raise ValueError(f"`prefix` must be a string. Received: prefix={prefix!r}")
    checks = _Checks(on_error, check_images)
    rows = []
    for path, image, image_annotations in _read_coco(annotations, image_folder, checks)[1]:
        captions = []
        for place, annotation in image_annotations:
            with checks.row(place):
                captions.append(_not_blank(annotation, "caption"))
        if one_per_image and captions:
            captions = [random.Random(f"{seed}/{image['id']}").choice(captions)]
        rows.extend((path, prefix, caption) for caption in captions)
    return _examples(rows, checks, shard, annotations)


@dataclasses.dataclass(frozen=True, slots=True)
class _Object:
    rank: int  # of its category
    label: str
    box: tuple  # x1, y1, x2, y2 in pixels
    segmentation: object


@dataclasses.dataclass(frozen=True, slots=True)
class _Scene:
    id: object
    path: str
    width: int
    height: int
    objects: list


def _scenes(annotations, image_folder, keep_crowds, checks, with_masks=False):
    """Images with at least one object, as _Scene."""
    source = os.fspath(annotations)
    data, annotated = _read_coco(source, image_folder, checks)
    categories = {}
    for rank, category in enumerate(_field(data, "categories", list, source)):
        with checks.row(f"{source}: category {_id(category, rank)}"):
            name = _field(category, "name", str).strip()
            if not name or set(";<\n") & set(name):
                raise ValueError(
                    "`name` must be a word or more without ';', '<' and line breaks. "
                    f"Received: {name!r}."
                )
            id = _field(category, "id", (int, str))
            if id in categories:
                raise ValueError(f"`id` {id!r} belongs to another category already.")
            categories[id] = rank, name
    num_empty = 0
    for path, image, image_annotations in annotated:
        objects = []
        with checks.row(f"{source}: image {image['id']}"):
            width, height = (_field(image, name, int) for name in ("width", "height"))
            if width < 1 or height < 1:
                raise ValueError(f"Sizes must be positive. Received: {width} × {height}.")
            for place, annotation in image_annotations:
                with checks.row(place):
                    if annotation.get("iscrowd") not in (0, 1, None):
                        raise ValueError(
                            f"`iscrowd` must be 0 or 1. Received: {annotation['iscrowd']!r:.80}."
                        )
                    if annotation.get("iscrowd") and not keep_crowds:
                        continue
                    category = _field(annotation, "category_id", (int, str))
                    if category not in categories:
                        raise ValueError(f"`category_id` {category!r} is not in `categories`.")
                    segmentation = annotation.get("segmentation") if with_masks else None
                    if with_masks:
                        _check_segmentation(segmentation, width, height)
                    box = _box(annotation, width, height)
                    if box is None or not has_area(box, width, height):
                        num_empty += 1
                        continue
                    item = _Object(*categories[category], box, segmentation)
                    if with_masks:
                        _check_overlap(item, width, height)
                    objects.append(item)
        if objects:
            yield _Scene(image["id"], path, width, height, objects)
    if num_empty:
        _LOG.info(
            "%s: left out %d boxes without a width or a height in location tokens, of which there "
            "are 1,024 a side.",
            source,
            num_empty,
        )


def _read_coco(source, image_folder, checks):
    """The whole file, and its images with annotations: (path, image, [(place, annotation)])."""
    source = os.path.expanduser(source)
    folder = _folder(source, image_folder)
    data = _load_json(source)
    images = _field(data, "images", list, source)
    ids = [image.get("id") for image in images if isinstance(image, dict)]
    known = {id for id in ids if isinstance(id, (int, str))}
    annotations_by_image = collections.defaultdict(list)
    for position, annotation in enumerate(_field(data, "annotations", list, source)):
        place = f"{source}: annotation {_id(annotation, position)}"
        with checks.row(place):
            image_id = _field(annotation, "image_id", (int, str))
            if image_id not in known:
                raise ValueError(f"`image_id` {image_id!r} is not in `images`.")
            annotations_by_image[image_id].append((place, annotation))
    annotated, names = [], {}
    for position, image in enumerate(tqdm.tqdm(images, disable=len(images) < _MANY_ROWS)):
        with checks.row(f"{source}: image {_id(image, position)}"):
            id = _field(image, "id", (int, str))
            if names.setdefault(id, image.get("file_name")) != image.get("file_name"):
                raise ValueError(f"`id` {id!r} belongs to {names[id]!r} already.")
            # Each id once: annotations of an image that is there twice count once.
            if found := annotations_by_image.pop(id, None):
                name = _field(image, "file_name", str)
                annotated.append((checks.images(folder, name), image, found))
    return data, annotated


def _prompted(scene, prompt, seed):
    """What comes after the word of the task, and the objects of the answer in their order."""
    if prompt == "all classes":
        objects = list(scene.objects)
        random.Random(f"{seed}/{scene.id}").shuffle(objects)
        yield prompt, objects
        return
    objects = sorted(scene.objects, key=lambda item: (item.rank, item.box[1], item.box[0]))
    labels = dict.fromkeys(item.label for item in objects)
    if prompt == "categories":
        yield " ; ".join(labels), objects
    else:
        for label in labels:
            yield label, [item for item in objects if item.label == label]


def _check_prompt(prompt, choices):
    if prompt not in choices:
        raise ValueError(f"`prompt` must be one of {choices}. Received: prompt={prompt!r}")


def _box(annotation, width, height):
    """COCO's x, y, width and height in pixels to x1, y1, x2, y2 in the image, None if empty."""
    box = _field(annotation, "bbox", list)
    if len(box) != 4 or not all(_is_number(value) for value in box):
        raise ValueError(f"`bbox` must be 4 numbers: x, y, width, height. Received: {box!r:.80}.")
    x, y, box_width, box_height = box
    if 0 in (box_width, box_height):
        return None
    x1, x2 = (min(max(value, 0), width) for value in (x, x + box_width))
    y1, y2 = (min(max(value, 0), height) for value in (y, y + box_height))
    if x1 >= x2 or y1 >= y2:
        raise ValueError(
            "`bbox` must have a width, a height, and a part inside of its image of "
            f"{width} × {height}. Received: {box}."
        )
    return x1, y1, x2, y2


# Masks --------------------------------------------------------------------------------------


class _Segmentations:
    """Suffixes of masks, made when first asked for."""

    def __init__(self, codec, objects_of_rows):
        self._codec, self._objects_of_rows = codec, objects_of_rows
        self._suffixes = {}

    def __getitem__(self, row):
        if row not in self._suffixes:
            width, height, objects = self._objects_of_rows[row]
            masks = np.stack([_mask(item, width, height) for item in objects])
            labels, boxes = [item.label for item in objects], [item.box for item in objects]
            self._suffixes[row] = self._codec(masks, labels, np.array(boxes, "float64"))
        return self._suffixes[row]


def _check_segmentation(segmentation, width, height):
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width]:
            raise ValueError(
                f"`size` of the mask must be the image's, [{height}, {width}]. "
                f"Received: {segmentation.get('size')!r}."
            )
        counts = _read_run_lengths(segmentation)
        if min(counts, default=-1) < 0 or sum(counts) != height * width or not sum(counts[1::2]):
            raise ValueError(
                f"The run lengths of the mask must add up to its {height * width} pixels, and "
                f"some must be inside. Received: {counts!r:.80}."
            )
    elif not isinstance(segmentation, list) or not segmentation:
        raise ValueError(
            "`segmentation` must be a list of polygons, or an object with `size` and `counts`. "
            f"Received: {segmentation!r:.80}."
        )
    else:
        for polygon in segmentation:
            is_polygon = isinstance(polygon, list) and len(polygon) % 2 == 0
            if not is_polygon or not all(_is_number(value) for value in polygon):
                raise ValueError(
                    f"A polygon must be a list of numbers x, y, x, y …. Received: {polygon!r:.80}."
                )
        if not _polygons(segmentation):
            raise ValueError(
                "`segmentation` must have a polygon of at least 3 points. "
                f"Received: {segmentation!r:.80}."
            )


def _polygons(segmentation):
    """Without the points and lines that tools for labels leave among them."""
    return [polygon for polygon in segmentation if len(polygon) >= 6]


def _check_overlap(item, width, height):
    box = item.box
    if isinstance(item.segmentation, dict):
        x1, y1, x2, y2 = box_pixels(box, width, height)
        if _mask(item, width, height)[y1:y2, x1:x2].any():
            return
    else:
        for polygon in _polygons(item.segmentation):
            x, y = polygon[::2], polygon[1::2]
            if min(x) <= box[2] and max(x) >= box[0] and min(y) <= box[3] and max(y) >= box[1]:
                return
    raise ValueError(
        "`segmentation` must overlap `bbox`, which is x, y, width, height. "
        f"Received: {item.segmentation!s:.80} outside of x1, y1, x2, y2 = {box}."
    )


def _mask(item, width, height):
    """bool (height, width). A polygon too thin to hold the centre of a pixel fills its box."""
    if isinstance(item.segmentation, dict):
        counts = _read_run_lengths(item.segmentation)
        values = np.arange(len(counts)) % 2 == 1
        return np.repeat(values, counts).reshape(width, height).T
    mask = np.zeros((height, width), bool)
    for polygon in _polygons(item.segmentation):
        mask |= _polygon_mask(np.reshape(polygon, (-1, 2)), width, height)
    x1, y1, x2, y2 = box_pixels(item.box, width, height)
    if not mask[y1:y2, x1:x2].any():
        mask[y1:y2, x1:x2] = True
    return mask


def _read_run_lengths(segmentation):
    """Lengths of the runs outside, inside, outside … a mask, column by column.

    Compressed, a length is the difference from the last but one, in groups of 5 bits, low ones
    first, written as characters from "0"; the sixth bit says that more follow.

    Source: cocoapi `common/maskApi.c`, `rleFrString`.
    """
    counts = segmentation.get("counts")
    if isinstance(counts, list) and all(isinstance(count, int) for count in counts):
        return counts
    if not isinstance(counts, str) or not all("0" <= character <= "o" for character in counts):
        raise ValueError(
            "`counts` of a mask must be a list of integers, or COCO's compressed string. "
            f"Received: {counts!r:.80}."
        )
    lengths, length, shift = [], 0, 0
    for character in counts:
        bits = ord(character) - ord("0")
        length |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:  # the sign
                length -= 1 << shift
            lengths.append(length + (lengths[-2] if len(lengths) > 2 else 0))
            length, shift = 0, 0
    return lengths


def _polygon_mask(points, width, height):
    """The pixels whose centres are inside of a polygon, by the even-odd rule."""
    ends = np.roll(points, -1, axis=0)
    (x1, y1), (x2, y2) = points.T, ends.T
    centers = np.arange(height) + 0.5
    rows, edges = np.nonzero((y1 <= centers[:, None]) != (y2 <= centers[:, None]))
    steepness = (x2[edges] - x1[edges]) / (y2[edges] - y1[edges])
    crossings = x1[edges] + (centers[rows] - y1[edges]) * steepness
    columns = np.clip(np.ceil(crossings - 0.5), 0, width).astype(int)
    counts = np.zeros((height, width + 1), "uint8")  # overflow leaves even and odd as they are
    np.add.at(counts, (rows, columns), 1)
    return np.cumsum(counts, axis=1, dtype="uint8")[:, :width] % 2 == 1


# Visual question answering ------------------------------------------------------------------


def vqa(
    questions,
    annotations=None,
    image_folder=None,
    *,
    prefix="answer en {question}",
    answer="most common",
    image_name=None,
    seed=0,
    check_images=True,
    on_error="raise",
    shard=None,
):
    """Examples of questions and answers: VQAv2's pair of JSON files, or one file with both.

    One file is a list of objects, or has it under `data`, `questions` or `annotations`: each with
    `question`; `answer`, or `answers` of which an item is a string or has `answer`; and `image`.
    That is what VizWiz, DocVQA and others have; TextVQA needs `image_name="{image_id}.jpg"`.

    Args:
        questions: path of a JSON file.
        annotations: path of the JSON file of the answers, or None if `questions` has them.
        image_folder: path of the folder of the images. Defaults to the file's.
        prefix: str with "{question}".
        answer: "most common", the first if several are, or "random", drawn once. Blank ones of
            several do not count.
        image_name: None, or how file names follow from the fields of a question, such as
            "{image_id}.jpg". By default they are in `image`, or are COCO's:
            "COCO_train2014_000000000009.jpg" from `data_subtype` and `image_id`.
        seed: int, of the draw.
        check_images: bool, whether images must exist.
        on_error: "raise" to stop at the first bad question; or "skip" to leave them out, counted
            in a warning.
        shard: None, or `(index, count)`, see `jsonl`.

    Returns:
        Examples.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a question is bad, with file and id; if no example is left; or if an option
            is out of range.

    Example:
        >>> keras_pg2.data.vqa(
        ...     "v2_OpenEnded_mscoco_train2014_questions.json",
        ...     "v2_mscoco_train2014_annotations.json",
        ...     "train2014",
        ... )

    Source: big_vision `configs/proj/paligemma/transfers/vqav2.py`.
    """
    if not isinstance(prefix, str) or "{question}" not in prefix:
        raise ValueError(f"`prefix` must hold '{{question}}'. Received: prefix={prefix!r}")
    if image_name is not None and not isinstance(image_name, str):
        raise ValueError(
            '`image_name` must be a str, such as "{image_id}.jpg", or None. '
            f"Received: image_name={image_name!r}"
        )
    if answer not in ("most common", "random"):
        raise ValueError(f"`answer` must be 'most common' or 'random'. Received: answer={answer!r}")
    source = os.path.expanduser(questions)
    checks = _Checks(on_error, check_images)
    folder = _folder(source, image_folder)
    data = _load_json(source)
    questions = _table(data, ("questions", "data", "annotations"), source)
    subtype = data.get("data_subtype") if isinstance(data, dict) else None
    coco_name = f"COCO_{subtype}_{{image_id:012d}}.jpg" if subtype else None
    answers = {}
    if annotations is not None:
        annotations = os.path.expanduser(annotations)
        for position, row in enumerate(
            _table(_load_json(annotations), ("annotations", "data"), annotations)
        ):
            with checks.row(f"{annotations}: annotation of question {_id(row, position)}"):
                question_id = _field(row, "question_id", (int, str))
                answers.setdefault(question_id, []).extend(_answers(row))
    paths, rows = {}, []
    for position, row in enumerate(tqdm.tqdm(questions, disable=len(questions) < _MANY_ROWS)):
        id = _id(row, position)
        with checks.row(f"{source}: question {id}"):
            question = _not_blank(row, "question")
            if annotations is None:
                choices = _answers(row)
            elif isinstance(id, (int, str)) and id in answers:
                choices = answers[id]
            else:
                raise ValueError(f"It has no answer in {annotations}.")
            if answer == "random":
                choice = random.Random(f"{seed}/{id}").choice(choices)
            else:
                choice = collections.Counter(choices).most_common(1)[0][0]
            if image_name is None and "image" in row:
                name = _field(row, "image", str)
            else:
                name = _named(image_name or coco_name, row)
            if name not in paths:
                paths[name] = checks.images(folder, name)
            rows.append((paths[name], prefix.replace("{question}", question), choice))
    return _examples(rows, checks, shard, source)


def _answers(row):
    """The answers of a row, which is an object, of any of the formats, at least one."""
    answers = [row["answer"]] if "answer" in row else _field(row, "answers", list)
    answers = [item.get("answer") if isinstance(item, dict) else item for item in answers]
    texts = [text for item in answers if (text := str(item).strip())]
    if not texts or not all(isinstance(item, str) or _is_number(item) for item in answers):
        raise ValueError(
            "Answers must be strings or numbers, at least one that is not blank. "
            f"Received: {answers!r:.80}."
        )
    return texts


def _named(image_name, row):
    if image_name is None:
        raise ValueError(
            "The field `image` is missing. If images are named by another field, pass "
            '`image_name`, such as "{image_id}.jpg".'
        )
    try:
        return image_name.format_map(row)
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The name {image_name!r} cannot be made from the fields {sorted(row)}: {error}."
        ) from error


def _table(data, fields, source):
    """The list of objects that is a file, or is under one of its fields."""
    if isinstance(data, dict):
        data = next((data[field] for field in fields if field in data), None)
    if not isinstance(data, list):
        raise ValueError(f"{source} must hold a list, or an object with a list in one of {fields}.")
    return data


# Rows of any format -------------------------------------------------------------------------


class _Checks:
    """What becomes of bad rows: an error at the first, or a warning about all."""

    def __init__(self, on_error, check_images):
        if on_error not in ("raise", "skip"):
            raise ValueError(f"`on_error` must be 'raise' or 'skip'. Received: {on_error!r}")
        self._skip, self._check_images = on_error == "skip", check_images
        self._count, self._messages = 0, []

    @contextlib.contextmanager
    def row(self, place):
        """A ValueError inside is about the row at `place`: it is raised with it, or counted."""
        try:
            yield
        except ValueError as error:
            if not self._skip:
                if isinstance(error, _BadRowError):
                    raise
                raise _BadRowError(
                    f'{place}: {error} Mend it, or pass on_error="skip" to leave such rows out.'
                ) from error
            self._count += 1
            if len(self._messages) < _MAX_PLACES:
                self._messages.append(f"{place}: {error}")

    def images(self, folder, names):
        """Path of the image of a name, or paths of those of a list."""
        if isinstance(names, list):
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"`image` must be a name or a list of them. Received: {names!r}.")
            return [self.images(folder, name) for name in names]
        path = os.path.join(folder, os.path.expanduser(names))
        if self._check_images and not os.path.isfile(path):
            raise ValueError(f"There is no image {path!r}.")
        return path

    def examples(self, read, count, shard, source):
        """The Examples of rows 0 … count - 1, once all are checked."""
        if self._count:
            _LOG.warning(
                "Left out %d bad rows of %s:\n%s%s",
                self._count,
                source,
                "\n".join(self._messages),
                "\n…" if self._count > len(self._messages) else "",
            )
        if not count:
            raise ValueError(f"{source} has no examples, or none that is right.")
        try:
            index, shards = (0, 1) if shard is None else map(operator.index, shard)
            is_part = 0 <= index < shards
        except (TypeError, ValueError):  # no integers, or not two
            is_part = False
        if not is_part:
            raise ValueError(
                f"`shard` must be (index, count) with 0 <= index < count. Received: shard={shard!r}"
            )
        rows = np.arange(index, count, shards)
        if not len(rows):
            raise ValueError(
                f"{source} has {count} examples, too few for shard={shard!r}: each of the "
                f"{shards} needs one."
            )
        return Examples(read, rows)


class _BadRowError(ValueError):
    """Names its place already."""


class _Rows:
    """Reads rows `(path, prefix, suffix)`; suffixes may be elsewhere."""

    def __init__(self, rows, suffixes):
        self._rows, self._suffixes = rows, suffixes

    def read(self, row):
        image, prefix, suffix = self._rows[row]
        if self._suffixes is not None:
            suffix = self._suffixes[row]
        return {"image": image, "prefix": prefix, "suffix": suffix}


def _examples(rows, checks, shard, source, suffixes=None):
    return checks.examples(_Rows(rows, suffixes).read, len(rows), shard, os.fspath(source))


def _folder(path, image_folder):
    return os.path.dirname(path) if image_folder is None else os.path.expanduser(image_folder)


def _parse(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"This is no JSON: {error}.") from error


def _load_json(path):
    with open(path, "rb") as file:
        content = file.read()
    try:
        return _parse(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _field(row, name, kind, source=None):
    """The value of a field, of one of the kinds."""
    where = f"{source}: " if source else ""
    if not isinstance(row, dict):
        raise ValueError(f"{where}There must be a JSON object. Received: {row!r:.80}.")
    if name not in row:
        raise ValueError(f"{where}The field `{name}` is missing; there are {sorted(row)}.")
    value = row[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        raise ValueError(f"{where}`{name}` must be {expected}. Received: {value!r:.80}.")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}`{name}` is no valid Unicode: {error}.") from error
    return value


def _not_blank(row, name):
    """The text of a field without the spaces around it."""
    text = _field(row, name, str).strip()
    if not text:
        raise ValueError(f"`{name}` must not be blank. Received: {row[name]!r}.")
    return text


def _id(row, position):
    """What to call a row: its id, or its position if it has none."""
    row = row if isinstance(row, dict) else {}
    return next(
        (row[name] for name in ("question_id", "questionId", "id") if name in row),
        f"number {position + 1}",
    )


def _is_number(value):
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max  # neither NaN nor an integer beyond floats
