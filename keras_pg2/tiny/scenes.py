"""Random images of handwritten digits and shapes, with the truth about them.

The digits are real handwriting: the 1,797 scans of 8 × 8 pixels that scikit-learn ships, from the
UCI data set "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, CC BY 4.0).
The last fifth of the scans is held out: no image of the split "train" shows any of them.
"""

import dataclasses
import functools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 112
PATCH_SIZE = 14
GRID_SIZE = IMAGE_SIZE // PATCH_SIZE

DIGITS = tuple("0123456789")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
HELD_BACK_SHAPE = "moon"
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (55, 100, 240),
    "yellow": (235, 205, 30),
    "orange": (245, 135, 25),
    "purple": (155, 65, 205),
    "cyan": (60, 205, 215),
    "pink": (250, 130, 190),
}
WORDS = """
ant apple bag bank bear bed bee bell bird boat book box bread bus cake car cat chair clock cloud
coat coin corn cow crab cup deer desk dog door duck egg farm fire fish flag fly fork fox frog gate
goat gold grape hand hat hen hill home horse ice iron jam key king lake lamp leaf lemon lion lock
map milk mouse nail nest nose nut oak park pea pear pen pie pig pin pond rain ring road rock rope
rose sail salt sand seed ship shoe snow soap sock soup tea tent tree vase wall wolf
"""
WORDS = tuple(WORDS.split())
# What a patch can show. The held-back shape comes last: nothing else moves on its account.
CLASSES = ("", *DIGITS, *SHAPES, *"abcdefghijklmnopqrstuvwxyz", HELD_BACK_SHAPE)

_CLASS_IDS = {name: id for id, name in enumerate(CLASSES)}
_COLOR_NAMES = tuple(COLORS)
_COLOR_LEVELS = {name: np.array(rgb, "float32") for name, rgb in COLORS.items()}
_COLOR_IDS = {name: id for id, name in enumerate(COLORS)}
_PATCH_CENTERS = (np.arange(GRID_SIZE) + 0.5) * PATCH_SIZE
_INSIDE = 128  # a pixel belongs to an object that covers half of it
_TRAIN_SHARE = 0.8

# Longest side of an object in pixels, by the number of objects.
_LARGEST = {1: 64, 2: 56, 3: 48, 4: 42}
_MAX_OBJECTS = len(_LARGEST)
_HEIGHTS = (26, 58)  # of digits and shapes, before they are turned
_GAP = 3  # pixels between the boxes of two objects
_CENTER_GAP = 6  # pixels between their centres from left to right, so that the order is plain
_NUM_PLACES = 30  # tried for an object before it is left out


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Sprite:
    """One drawing, to be put into images in any colour.

    Attributes:
        id: int, its place in `SceneRenderer.sprites`.
        kind: "digit", "shape" or "word".
        name: str, such as "7", "star" or "fish".
        alpha: uint8 (h, w), how much of each pixel it covers. Its first and last row and column
            each have a pixel of at least 128: the box is tight.
        scan: int or None, the handwritten scan that a digit was made of.
        letter_edges: tuple of float, where the letters of a word begin and the last one ends,
            in pixels from the left.
    """

    id: int
    kind: str
    name: str
    alpha: np.ndarray
    scan: int | None = None
    letter_edges: tuple = ()

    @property
    def mask(self):
        """bool (h, w), the pixels that it covers by half or more."""
        return self.alpha >= _INSIDE


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SceneObject:
    """A sprite in an image.

    Attributes:
        sprite: Sprite.
        color: str, one of `COLORS`.
        box: tuple of 4 int, (x1, y1, x2, y2) in pixels, half-open.
    """

    sprite: Sprite
    color: str
    box: tuple

    @property
    def kind(self):
        return self.sprite.kind

    @property
    def name(self):
        return self.sprite.name


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """An image and what is in it.

    Attributes:
        image: uint8 (112, 112, 3).
        objects: tuple of SceneObject, by the centres of their boxes from left to right.
    """

    image: np.ndarray
    objects: tuple

    def mask(self, scene_object):
        """bool (112, 112), the pixels of one of the objects."""
        return _in_image(scene_object.sprite.mask, scene_object.box)


class SceneRenderer:
    """Renders scenes from a bank of sprites, which is drawn once.

    Training digits are turned, sheared, stretched, warped and drawn with pens of all widths;
    held-out digits only vary in size and by a slight turn.

    Args:
        split: "train", or "test" for the held-out scans, and other drawings of the shapes.
        kinds: tuple of "digit", "shape" and "word", what scenes may show. Digits need
            scikit-learn, for the scans.
        seed: int, of the bank.
        drawings: int or None, sprites of each scan: 16 to train and 4 to test by default.

    Raises:
        ImportError: if scikit-learn is missing.
        ValueError: if `split` or one of `kinds` is unknown.

    Example:
        >>> renderer = SceneRenderer()
        >>> scene = renderer.scene(random.Random(0))
        >>> scene.image.shape
        (112, 112, 3)
    """

    def __init__(self, split="train", kinds=("digit", "shape"), seed=0, drawings=None):
        if split not in ("train", "test"):
            raise ValueError(f"`split` must be 'train' or 'test'. Received: split={split!r}")
        if not kinds or not set(kinds) <= {"digit", "shape", "word"}:
            raise ValueError(
                f"`kinds` must be some of 'digit', 'shape' and 'word'. Received: kinds={kinds!r}"
            )
        self.split = split
        self.kinds = tuple(kinds)
        self.sprites = []
        is_train = split == "train"
        rng = np.random.default_rng([seed, int(is_train)])
        if "digit" in kinds:
            for scan, (pixels, name) in _scans(split):
                field = _smooth_field(pixels)
                for _ in range(drawings or (16 if is_train else 4)):
                    self._add("digit", name, _draw_digit(field, rng, is_train), scan=scan)
        if "shape" in kinds:
            for name in (*SHAPES, HELD_BACK_SHAPE):
                for _ in range(300 if is_train else 100):
                    self._add("shape", name, _draw_shape(name, rng))
        if "word" in kinds:
            for name in WORDS:
                for _ in range(8 if is_train else 2):
                    alpha, edges = _draw_word(name, rng)
                    self._add("word", name, alpha, letter_edges=edges)
        self._textures = [_draw_texture(kind, rng) for kind in range(3) for _ in range(16)]
        self._fitting = {size: {} for size in (*_LARGEST.values(), IMAGE_SIZE)}
        for size, sprites in self._fitting.items():
            for sprite in self.sprites:
                if max(sprite.alpha.shape) <= size:
                    sprites.setdefault(sprite.name, []).append(sprite)

    def _add(self, kind, name, alpha, **details):
        self.sprites.append(Sprite(len(self.sprites), kind, name, alpha, **details))

    def scene(self, rng, content=None, max_objects=4, shapes=SHAPES):
        """One random scene of 1 to `max_objects` objects that do not overlap.

        Args:
            rng: random.Random. The same state gives the same scene.
            content: tuple of kinds to mix, or None to choose at random: digits (40 %), shapes
                (30 %), or both (30 %). If words are among the renderer's kinds, one scene in
                seven has a word instead, at times beside a shape.
            max_objects: int, from 1 to 4.
            shapes: tuple of str, the shapes to choose from.

        Returns:
            Scene.

        Raises:
            ValueError: if `content` has a kind that the renderer has not, or `max_objects` is
                out of range.
        """
        if content is not None and not (content and set(content) <= set(self.kinds)):
            raise ValueError(
                f"`content` must be some of the renderer's kinds {self.kinds}, or None. "
                f"Received: content={content!r}"
            )
        if max_objects not in _LARGEST:
            raise ValueError(
                f"`max_objects` must be from 1 to {_MAX_OBJECTS}. "
                f"Received: max_objects={max_objects!r}"
            )
        kinds = self._choose_kinds(rng, content, max_objects)
        image = self._background(rng)
        objects = []
        for kind in kinds:
            names = {"digit": DIGITS, "shape": shapes, "word": WORDS}[kind]
            size = IMAGE_SIZE if kind == "word" else _LARGEST[len(kinds)]
            sprite = _choice(rng, self._fitting[size][_choice(rng, names)])
            box = _free_box(rng, sprite.alpha.shape, objects)
            if box is None:
                continue
            color = _choice(rng, _COLOR_NAMES)
            _paint(image, sprite.alpha, box, _COLOR_LEVELS[color], rng)
            objects.append(SceneObject(sprite, color, box))
        objects.sort(key=lambda item: item.box[0] + item.box[2])
        image = np.clip(image, 0, 255, out=image).astype("uint8")
        return Scene(np.ascontiguousarray(image.transpose(1, 2, 0)), tuple(objects))

    def _choose_kinds(self, rng, content, max_objects):
        """The kind of each object."""
        if content is None:
            content = tuple(kind for kind in self.kinds if kind != "word")
            if "word" in self.kinds and (not content or rng.random() < 1 / 7):
                content = ("word", "shape") if "shape" in content else ("word",)
            elif len(content) == 2:
                content = _choice(rng, (("digit",),) * 4 + (("shape",),) * 3 + (content,) * 3)
        if "word" in content:
            others = [kind for kind in content if kind != "word"]
            is_alone = not others or max_objects == 1 or rng.random() < 0.7
            return ["word"] if is_alone else ["word", _choice(rng, others)]
        return [_choice(rng, content) for _ in range(1 + int(rng.random() * max_objects))]

    def _background(self, rng):
        """float32 (3, 112, 112): channels come first while painting, which is twice as fast."""
        texture = _choice(rng, self._textures)
        y, x = (int(rng.random() * (side - IMAGE_SIZE)) for side in texture.shape)
        is_dark = rng.random() < 0.5
        level = rng.uniform(5, 55) if is_dark else rng.uniform(195, 245)
        tint = [[[level + rng.uniform(-10, 10)]] for _ in range(3)]
        return texture[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] + np.array(tint, "float32")

    def segment_codes(self, encode, batch_size=256):
        """The codes of every sprite, so that training looks them up.

        Args:
            encode: callable, float32 (B, 64, 64) masks inside their boxes, in [0, 1], to int
                (B, 16) codes, as `SegmentationCodec.encode`.
            batch_size: int.

        Returns:
            int array (number of sprites, 16), by the sprites' ids.
        """
        batches = range(0, len(self.sprites), batch_size)
        return np.concatenate(
            [
                encode(np.stack([_box_mask(s) for s in self.sprites[start : start + batch_size]]))
                for start in batches
            ]
        )


# Dense targets ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class DenseTargets:
    """What each of the 8 × 8 patches shows, for a vision tower to learn before it meets text.

    Attributes:
        classes: int32 (8, 8), index into `CLASSES`; 0 is background.
        colors: int32 (8, 8), index into `COLORS`; 0 on background too.
        distances: float32 (8, 8, 4), from the patch's centre to the top, left, bottom and right
            side of its object's box, in image sides, negative outside of the box; 0 on
            background.
    """

    classes: np.ndarray
    colors: np.ndarray
    distances: np.ndarray


def dense_targets(scene, least_ink=12):
    """The truth about each patch of a scene.

    Args:
        scene: Scene.
        least_ink: int, pixels of an object that make a patch its own. Of two objects, the one
            with more pixels has the patch.

    Returns:
        DenseTargets.
    """
    grid = (GRID_SIZE, GRID_SIZE)
    targets = DenseTargets(
        np.zeros(grid, "int32"), np.zeros(grid, "int32"), np.zeros((*grid, 4), "float32")
    )
    most_ink = np.full(grid, least_ink - 1)
    for item in scene.objects:
        patches = scene.mask(item).reshape(GRID_SIZE, PATCH_SIZE, GRID_SIZE, PATCH_SIZE)
        ink = patches.sum(axis=(1, 3))
        is_own = ink > most_ink
        most_ink = np.maximum(ink, most_ink)
        classes = _CLASS_IDS.get(item.name)
        if item.kind == "word":
            classes = np.broadcast_to(_letter_classes(item), grid)[is_own]
        targets.classes[is_own] = classes
        targets.colors[is_own] = _COLOR_IDS[item.color]
        x1, y1, x2, y2 = item.box
        y, x = _PATCH_CENTERS[:, None], _PATCH_CENTERS[None, :]
        sides = np.broadcast_arrays(y - y1, x - x1, y2 - y, x2 - x)
        targets.distances[is_own] = np.stack(sides, axis=-1)[is_own] / IMAGE_SIZE
    return targets


def _letter_classes(item):
    """int (8,), the letter at the centre of each column of patches."""
    places = np.searchsorted(item.sprite.letter_edges, _PATCH_CENTERS - item.box[0]) - 1
    return [_CLASS_IDS[item.name[i]] for i in places.clip(0, len(item.name) - 1)]


# Placing and painting -----------------------------------------------------------------------


def _choice(rng, items):
    """As `rng.choice`, three times as fast."""
    return items[int(rng.random() * len(items))]


def _free_box(rng, size, objects):
    """A random place for something of `size` (h, w), or None if none was found."""
    height, width = size
    for _ in range(_NUM_PLACES):
        x1 = 1 + int(rng.random() * (IMAGE_SIZE - width - 1))
        y1 = 1 + int(rng.random() * (IMAGE_SIZE - height - 1))
        x2, y2 = x1 + width, y1 + height
        for item in objects:
            left, top, right, bottom = item.box
            is_apart = (
                x1 >= right + _GAP or left >= x2 + _GAP or y1 >= bottom + _GAP or top >= y2 + _GAP
            )
            if not is_apart or abs(x1 + x2 - left - right) < 2 * _CENTER_GAP:
                break
        else:
            return x1, y1, x2, y2
    return None


def _paint(image, alpha, box, levels, rng):
    x1, y1, x2, y2 = box
    shade = np.array([[[rng.uniform(-14, 14)]] for _ in range(3)], "float32")
    region = image[:, y1:y2, x1:x2]
    region += (levels[:, None, None] + shade - region) * (alpha * np.float32(1 / 255))


def _in_image(mask, box):
    x1, y1, x2, y2 = box
    placed = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    placed[y1:y2, x1:x2] = mask
    return placed


def _box_mask(sprite):
    """float32 (64, 64) in [0, 1], as `segmentation.crop_masks` makes it."""
    mask = Image.fromarray(sprite.mask.astype("float32"))
    return np.asarray(mask.resize((64, 64), Image.Resampling.BILINEAR)).clip(0, 1)


# Sprites ------------------------------------------------------------------------------------


def _scans(split):
    """(number, (uint8 (8, 8) levels up to 16, name)) of the scans of a split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("Digits need scikit-learn: `pip install scikit-learn`.") from error
    digits = load_digits()
    pairs = list(enumerate(zip(digits.images.astype("uint8"), map(str, digits.target))))
    first_held_out = int(_TRAIN_SHARE * len(pairs))
    return pairs[:first_held_out] if split == "train" else pairs[first_held_out:]


_FIELD_SIZE = 96  # side of a smooth field, which has 12 × 12 cells: the scan and 2 around it
_CELL = _FIELD_SIZE / 12
_CONTRAST = 2  # enough for an even background; with more, faint holes and gaps would close


def _smooth_field(pixels):
    """A scan, blown up to a smooth grey image, whose level curves are strokes."""
    cells = np.pad(pixels * np.uint8(15), 2)
    size = (_FIELD_SIZE, _FIELD_SIZE)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def _draw_digit(field, rng, is_train):
    """One sprite of a digit: turned and warped, then cut at a level that sets the pen's width."""
    height = math.exp(rng.uniform(*np.log(_HEIGHTS)))
    if is_train:
        angle, shear, aspect = rng.uniform(-20, 20), rng.normal(0, 0.12), rng.uniform(0.8, 1.2)
        warp, level = rng.normal(0, 0.2 * _CELL, (4, 4, 2)), rng.uniform(85, 145)
    else:
        angle, shear, aspect = rng.uniform(-8, 8), 0, 1
        warp, level = np.zeros((4, 4, 2)), 115
    scale = height / (8 * _CELL)
    matrix = _matrix(angle, shear, aspect) * scale
    side = 3 * math.ceil(0.6 * height)  # of the canvas; a third is one cell of the mesh
    corners = np.stack(np.meshgrid(*[np.arange(4) * side // 3] * 2), axis=-1)  # (row, column, x y)
    sources = (corners - side / 2) @ np.linalg.inv(matrix).T + _FIELD_SIZE / 2 + warp
    mesh = [
        (
            (*corners[i, j].tolist(), *corners[i + 1, j + 1].tolist()),
            np.concatenate(  # north-west, south-west, south-east, north-east
                [sources[i, j], sources[i + 1, j], sources[i + 1, j + 1], sources[i, j + 1]]
            ).tolist(),
        )
        for i in range(3)
        for j in range(3)
    ]
    canvas = field.transform((side, side), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
    return _crop(((np.asarray(canvas, "float32") - level) * _CONTRAST + _INSIDE).clip(0, 255))


def _matrix(angle, shear, aspect):
    """(2, 2), turns by `angle` degrees what was sheared to the right and widened."""
    turn = math.radians(angle)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return rotation @ np.array([[aspect, -shear], [0, 1]])


def _draw_shape(name, rng):
    height = math.exp(rng.uniform(*np.log(_HEIGHTS)))
    matrix = _matrix(rng.uniform(-20, 20), rng.normal(0, 0.05), rng.uniform(0.88, 1.13))
    detail = 4
    side = math.ceil(1.6 * height)
    canvas = Image.new("L", (side * detail, side * detail))
    outline = (_outline(name) @ matrix.T * (height / 2) + side / 2) * detail
    ImageDraw.Draw(canvas).polygon(outline.ravel().tolist(), fill=255)
    return _crop(np.asarray(canvas.reduce(detail)))


@functools.cache
def _outline(name):
    """float (n, 2), x to the right and y down, about from -1 to 1."""
    turn = np.linspace(0, 2 * np.pi, 65)[:-1]
    if name == "circle":
        return np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if name == "square":
        return 0.9 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    if name == "triangle":
        return np.array([(0, -1), (1.05, 0.85), (-1.05, 0.85)])
    if name == "star":
        turn = np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2, 0.45, 1.08)
        return np.stack([radius * np.sin(turn), -radius * np.cos(turn)], axis=1)
    if name == "heart":
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return np.stack([16 * np.sin(turn) ** 3, -y - 2], axis=1) / 15.5
    if name == "cross":
        arm = [(0.34, -1), (0.34, -0.34), (1, -0.34)]
        quarter = np.array([[0, -1], [1, 0]])
        arms = [np.array(arm) @ np.linalg.matrix_power(quarter, i).T for i in range(4)]
        return np.concatenate(arms)
    if name == "moon":  # a crescent: most of a circle, and back along another one
        outer = np.linspace(0.28, 1.72, 49) * np.pi
        inner = np.linspace(1.62, 0.38, 33) * np.pi
        outer = np.stack([np.cos(outer), np.sin(outer)], axis=1)
        inner = np.stack([np.cos(inner), np.sin(inner)], axis=1) * 0.83
        return np.concatenate([outer, inner + outer[-1] - inner[0]])
    raise ValueError(f"There is no shape {name!r}.")


def _draw_word(name, rng):
    """A printed word of widely set letters, and where they begin."""
    font = _font(int(rng.integers(24, 33)))
    spacing = rng.uniform(2, 4)
    while sum(map(font.getlength, name)) + spacing * len(name) > IMAGE_SIZE - 8:
        font, spacing = _font(round(font.size) - 1), 2
    canvas = Image.new("L", (IMAGE_SIZE, 64))
    edges = [4.0]
    for letter in name:
        ImageDraw.Draw(canvas).text((edges[-1], 8), letter, font=font, fill=255)
        edges.append(edges[-1] + font.getlength(letter) + spacing)
    left = np.flatnonzero((np.asarray(canvas) >= _INSIDE).any(axis=0))[0]
    return _crop(np.asarray(canvas)), tuple(float(edge - left) for edge in edges)


@functools.cache
def _font(size):
    return ImageFont.load_default(size)


def _draw_texture(kind, rng):
    """float32 (160, 160), what a background adds to its colour: nothing, noise or a slope."""
    shape = (IMAGE_SIZE + 48, IMAGE_SIZE + 48)
    if kind == 1:
        return rng.normal(0, rng.uniform(3, 14), shape).astype("float32")
    slope = rng.uniform(15, 45) if kind == 2 else 0
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.indices(shape) / IMAGE_SIZE - 0.7
    return (slope * (np.cos(angle) * x + np.sin(angle) * y)).astype("float32")


def _crop(levels):
    """uint8, down to the rows and columns that have a pixel inside."""
    alpha = levels.astype("uint8")
    inside = alpha >= _INSIDE
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()
