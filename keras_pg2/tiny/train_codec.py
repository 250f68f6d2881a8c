"""Trains the small `<seg>` codec of the tiny model: `python -m keras_pg2.tiny.train_codec OUT`.

Needs scikit-learn, for its scans of digits. Fastest on a CPU with KERAS_BACKEND=torch.
"""

import argparse
import logging
import math
import os

import keras
import numpy as np
from keras import ops
from PIL import Image, ImageDraw

from keras_pg2.segmentation import SegmentationCodec, boxes_of_masks, crop_masks, mask_from_codes

_LOG = logging.getLogger(__name__)
ARCHITECTURE = {"widths": (8, 24, 48, 64), "num_residual_blocks": 1, "code_width": 16}


def train(masks, *, epochs, seed=0, batch_size=64, learning_rate=2e-3, **architecture):
    """A codec trained on masks inside their boxes.

    Args:
        masks: float32 (count, 64, 64) in [0, 1], as `segmentation.crop_masks` makes them.
        epochs: int.
        seed: int.
        batch_size: int.
        learning_rate: float, at the start; it falls to 0 along a cosine.
        **architecture: arguments of `SegmentationCodec`; those missing as in `ARCHITECTURE`.

    Returns:
        SegmentationCodec.
    """
    keras.utils.set_random_seed(seed)
    codec = SegmentationCodec(**{**ARCHITECTURE, **architecture})
    steps = epochs * math.ceil(len(masks) / batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(
        *(learning_rate / 10, steps),
        warmup_target=learning_rate,
        warmup_steps=min(100, steps // 10),
    )
    codec.compile(keras.optimizers.Adam(schedule, clipnorm=1.0), loss=mask_loss)
    codec.fit(masks, masks, batch_size=batch_size, epochs=epochs)
    return codec


def mask_loss(masks, decoded):
    """Cross-entropy of each pixel and the Dice loss of each mask, in halves.

    Args:
        masks: float (B, 64, 64) in [0, 1].
        decoded: float (B, 64, 64), logits.

    Returns:
        float (B,).
    """
    cross_entropy = ops.mean(ops.binary_crossentropy(masks, decoded, from_logits=True), (1, 2))
    inside = ops.sigmoid(decoded)
    overlap = ops.sum(masks * inside, (1, 2))
    dice = 1 - (2 * overlap + 1) / (ops.sum(masks, (1, 2)) + ops.sum(inside, (1, 2)) + 1)
    return cross_entropy + 0.5 * dice


def round_trip_iou(codec, masks):
    """How well masks survive codes: mask, box, crop, codes, crop, mask.

    Args:
        codec: SegmentationCodec.
        masks: list of bool (height, width) arrays, each an image of its own.

    Returns:
        float NumPy array (count,), the intersection over union of each.
    """
    boxes = [boxes_of_masks(mask[None])[0] for mask in masks]
    decoded = codec.decode(codec.encode(inside_boxes(masks)))
    ious = []
    for mask, box, inside in zip(masks, boxes, decoded):
        result = mask_from_codes(inside, box, *mask.shape[::-1])
        ious.append((mask & result).sum() / (mask | result).sum())
    return np.array(ious)


def inside_boxes(masks):
    """Masks of images of many sizes as float32 (count, 64, 64), each inside its box."""
    return np.concatenate([crop_masks(mask[None], boxes_of_masks(mask[None])) for mask in masks])


# Masks to train on --------------------------------------------------------------------------

_TURN = np.linspace(0, 2 * np.pi, 64, endpoint=False)
_STAR = np.arange(10) * np.pi / 5
_STAR_RADIUS = np.where(np.arange(10) % 2, 0.45, 1.0)
_CROSS = np.array([-0.36, 0.36, 0.36, 1, 1, 0.36, 0.36, -0.36, -0.36, -1, -1, -0.36])
_SHAPES = {  # corners in [-1, 1], y down
    "circle": np.stack([np.cos(_TURN), np.sin(_TURN)], axis=-1),
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": np.array([(0, -1), (1, 0.8), (-1, 0.8)]),
    "star": np.stack([np.sin(_STAR), -np.cos(_STAR)], axis=-1) * _STAR_RADIUS[:, None],
    "heart": np.stack(
        [
            np.sin(_TURN) ** 3,
            -(13 * np.cos(_TURN) - 5 * np.cos(2 * _TURN) - 2 * np.cos(3 * _TURN)) / 16
            + np.cos(4 * _TURN) / 16,
        ],
        axis=-1,
    ),
    "cross": np.stack([_CROSS, np.roll(_CROSS, 3)], axis=-1),
}
_MIN_SIZE, _MAX_SIZE = 16, 64


def _transform(rng, max_angle):
    """A random turn, shear and squeeze, as a 2×2 matrix."""
    angle = np.radians(rng.uniform(-max_angle, max_angle))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    squeeze = np.exp(rng.uniform(-0.15, 0.15))
    return turn @ np.array([[squeeze, rng.uniform(-0.15, 0.15)], [0, 1 / squeeze]])


def shape_masks(count, seed):
    """Shapes of all kinds, sizes and rotations: list of bool (height, width)."""
    rng = np.random.default_rng(seed)
    kinds, masks = list(_SHAPES.values()), []
    for i in range(count):
        size = int(rng.integers(_MIN_SIZE, _MAX_SIZE + 1))
        corners = kinds[i % len(kinds)] @ _transform(rng, 180).T
        corners = (corners / np.abs(corners).max() * 0.96 + 1) / 2 * size * 4
        image = Image.new("L", (size * 4, size * 4))
        ImageDraw.Draw(image).polygon([tuple(corner) for corner in corners.tolist()], fill=255)
        masks.append(np.asarray(image.resize((size, size), Image.Resampling.BOX)) > 127)
    return masks


def digit_masks(scans, count, seed):
    """Digits of many sizes, a little turned: list of bool (height, width).

    Args:
        scans: float (scans, 8, 8) in [0, 1]. Each is drawn as often as the others.
        count: int.
        seed: int.
    """
    rng = np.random.default_rng(seed)
    masks = []
    for i in range(count):
        size = int(rng.integers(_MIN_SIZE, _MAX_SIZE + 1))
        scan = Image.fromarray(np.pad(scans[i % len(scans)], 3).astype("float32"))
        # From pixels of the image, `size` for the 8 of the scan, to those of the padded scan.
        matrix = _transform(rng, 15) * 8 / size
        side = math.ceil(size * 14 / 8)
        offset = 7 - matrix @ (side / 2, side / 2)
        affine = (*matrix[0], offset[0], *matrix[1], offset[1])
        image = scan.transform(
            (side, side), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC
        )
        masks.append(np.asarray(image) > rng.uniform(0.35, 0.55))
    return masks


def digit_scans():
    """scikit-learn's scans: float (1437, 8, 8) to train on and (360, 8, 8) held out."""
    from sklearn.datasets import load_digits

    scans = load_digits().images / 16
    return np.split(scans, [int(0.8 * len(scans))])


# Command ------------------------------------------------------------------------------------


def main(argv=None):
    """Trains, measures and saves the codec."""
    parser = argparse.ArgumentParser(prog="python -m keras_pg2.tiny.train_codec")
    parser.add_argument("out", help="path of the .safetensors file to write")
    parser.add_argument("--masks", type=int, default=12_000, help="to train on, 2/3 of them digits")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace OUT")
    options = parser.parse_args(argv)
    if os.path.lexists(options.out) and not options.force:
        parser.error(f"{options.out} exists already")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    scans, held_out = digit_scans()
    shapes = options.masks // 3
    masks = digit_masks(scans, options.masks - shapes, seed=1) + shape_masks(shapes, seed=2)
    codec = train(inside_boxes(masks), epochs=options.epochs, seed=options.seed)
    codec.save_file(options.out, dtype="float16", overwrite=options.force)

    codec = SegmentationCodec.from_file(options.out)
    tests = {
        "digits": digit_masks(scans, 1_000, seed=3),
        "held-out digits": digit_masks(held_out, 720, seed=4),
        "shapes": shape_masks(600, seed=5),
    }
    for name, masks in tests.items():
        _LOG.info("round-trip IoU, %s: %.3f", name, round_trip_iou(codec, masks).mean())
    codes = codec.encode(inside_boxes([mask for masks in tests.values() for mask in masks]))
    _LOG.info("codes in use: %d of 128", len(np.unique(codes)))


if __name__ == "__main__":
    main()
