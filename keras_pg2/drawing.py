"""Draws boxes, masks, labels and scores on images."""

import colorsys
import logging
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from keras_pg2.preprocessing import image_pixels
from keras_pg2.tasks import Detections

_LOG = logging.getLogger(__name__)
# Fonts of many scripts, by the names under which Pillow finds them where they are installed.
_FONTS = (
    "DejaVuSans.ttf",  # most Linux systems
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",  # macOS
    "arial.ttf",  # Windows
    "msyh.ttc",
)
_MASK_OPACITY = 0.45
_TEXT_SHARE = 0.032  # height of letters, of the mean side of the image
_SMALLEST_SIDE = 480  # of the result, pixels: labels need room


def draw(image, detections, font=None):
    """A copy of an image with objects drawn on it.

    The colour of a label is the same in every image. Boxes and masks have a light and
    a dark outline, so that they can be seen on every ground. Labels avoid each other where there
    is room. A small image is enlarged by a whole factor first.

    Args:
        image: an image, see `Preprocessor.load_image`.
        detections: Detections, as `PaliGemma2.detect` and `segment` return them.
        font: path of a TrueType font for the labels, or None for Pillow's own. That has English
            letters alone; where it lacks one, the installed font that has most of them is taken.

    Returns:
        PIL.Image, RGB.

    Raises:
        OSError: if the font cannot be read.
        TypeError: if `detections` is not of one image.
        ValueError: if the detections are of an image of another size.

    Example:
        >>> keras_pg2.draw("cat.jpg", model.detect("cat.jpg", "cat")).save("drawn.png")
    """
    if not isinstance(detections, Detections):
        raise TypeError(
            "`detections` must be the Detections of one image, one item of what `detect` "
            f"returns for a list. Received: {type(detections).__name__}"
        )
    levels = image_pixels(image).astype("float32")
    height, width = levels.shape[:2]
    if (width, height) != (detections.width, detections.height):
        raise ValueError(
            f"`detections` must be of this image of {width} × {height} pixels. Received: "
            f"detections in {detections.width} × {detections.height} pixels"
        )
    scale = max(1, round(_SMALLEST_SIDE / max(width, height)))
    levels = levels.repeat(scale, axis=0).repeat(scale, axis=1)
    # Small things last, so that they lie on top.
    items = sorted(detections, key=lambda item: -_area(item.box))
    unit = math.sqrt(height * width) * scale
    line = max(1, round(unit * 0.004))
    for item in items:
        if item.mask is not None:
            _paint_mask(levels, item.mask.repeat(scale, 0).repeat(scale, 1), _color(item), line)
    drawn = Image.fromarray(levels.round().clip(0, 255).astype("uint8"))
    canvas = ImageDraw.Draw(drawn)
    for item in items:
        box = [place * scale for place in item.box]
        _frame(canvas, box, _color(item), line, drawn.size)
    texts = [" ".join(filter(None, [item.label, _percent(item.score)])) for item in items]
    font = _font(font, max(11, round(unit * _TEXT_SHARE)), "".join(texts))
    taken = []
    for item, text in zip(reversed(items), reversed(texts)):
        if text:
            box = [place * scale for place in item.box]
            taken.append(_label(canvas, box, text, _color(item), font, line, drawn.size, taken))
    return drawn


def _font(path, size, text):
    """The font of a path, or the first known one that has most letters of the text."""
    if path is not None:
        try:
            return ImageFont.truetype(path, size)
        except OSError as error:
            raise OSError(
                f"`font` must be the path of a TrueType font. Received: font={path!r}: {error}"
            ) from error
    best = ImageFont.load_default(size)
    missing = _missing_letters(best, text)
    for name in _FONTS:
        if not missing:
            break
        try:
            font = ImageFont.truetype(name, size)
        except OSError:  # not installed
            continue
        if len(letters := _missing_letters(font, text)) < len(missing):
            best, missing = font, letters
    if missing:
        letters = "".join(missing)
        _LOG.warning("No font was found that has the letters %r: pass `font` to `draw`.", letters)
    return best


def _missing_letters(font, text):
    """list of the letters of a text that a font lacks."""

    def shape(letter):
        mask = font.getmask(letter)
        return mask.size, bytes(mask)

    missing = shape("\uffff")  # no letter, so that a font shows what it has in place of one
    letters = sorted(letter for letter in set(text) if not letter.isspace())
    return [letter for letter in letters if shape(letter) == missing]


def _area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def _percent(score):
    return "" if score is None else f"{score:.0%}"


def _color(item):
    """RGB of a label: hues far from each other for different texts."""
    number = sum((i + 1) * ord(letter) for i, letter in enumerate(item.label))
    hue = number * 0.618034 % 1
    return tuple(round(255 * level) for level in colorsys.hsv_to_rgb(hue, 0.85, 0.95))


def _paint_mask(levels, mask, color, line):
    """Tints the inside, in place, and draws the outline."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    levels, mask = levels[part], mask[part]  # a view: what is painted stays
    levels[mask] += _MASK_OPACITY * (np.array(color, "float32") - levels[mask])
    edge = _edge(mask, line)
    levels[_edge(mask, 2 * line) & ~edge] = 255
    levels[edge] = color


def _edge(mask, width):
    """The pixels of a mask that are nearer than `width` to its outside."""
    padded = np.pad(mask, width)
    inside = mask.copy()
    for shift in range(-width, width + 1):
        rows = slice(width + shift, width + shift + mask.shape[0])
        columns = slice(width + shift, width + shift + mask.shape[1])
        inside &= padded[rows, width:-width] & padded[width:-width, columns]
    return mask & ~inside


def _frame(canvas, box, color, line, size):
    x1, y1 = (max(0, round(place)) for place in box[:2])
    x2, y2 = (min(side - 1, round(place) - 1) for side, place in zip(size, box[2:]))
    x2, y2 = max(x1, x2), max(y1, y2)
    canvas.rectangle((x1, y1, x2, y2), outline="black", width=line + 2)
    if x2 - x1 > 2 and y2 - y1 > 2:
        canvas.rectangle((x1 + 1, y1 + 1, x2 - 1, y2 - 1), outline=color, width=line)


def _label(canvas, box, text, color, font, line, size, taken):
    """Writes a label near a box, where no other is if possible. Returns its own box."""
    pad = 2 * line
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x1, y1, x2, y2 = box
    corners = [
        (x1, y1 - height),  # above, below, inside at the top and at the bottom, beside
        (x1, y2),
        (x1, y1),
        (x1, y2 - height),
        (x2 - width, y1 - height),
        (x2 - width, y2),
        (x2, y1),
        (x1 - width, y1),
    ]
    places = []
    for x, y in corners:
        x = min(max(0, x), max(0, size[0] - width))
        y = min(max(0, y), max(0, size[1] - height))
        places.append((x, y, x + width, y + height))
    x, y, *_ = place = min(places, key=lambda place: _covered(place, taken))
    red, green, blue = color
    is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
    canvas.rectangle(place, fill=color, outline="white" if is_dark else "black")
    canvas.text((x + pad - left, y + pad - top), text, "white" if is_dark else "black", font=font)
    return place


def _covered(place, taken):
    """Pixels of a place that others have taken."""
    return sum(
        max(0, min(place[2], other[2]) - max(place[0], other[0]))
        * max(0, min(place[3], other[3]) - max(place[1], other[1]))
        for other in taken
    )
