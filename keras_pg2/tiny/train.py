"""Trains the tiny PaliGemma 2 from nothing, in less than three hours on two CPU cores.

    KERAS_BACKEND=torch python -m keras_pg2.tiny.train OUT [--minutes 130] [--resume]

Three lessons follow each other, each a `fit` of its own:

1. "look": the vision tower learns what each patch shows, without any text.
2. "read": about eight questions on an image share one row, so that the work on the image is
   shared too. Each question sees the image and itself.
3. "answer": one question a row, under the model's own prefix-LM mask; learning rate down to 0.

Batches depend on seed, lesson and step alone, so a run that was stopped goes on as it would have.
The number of steps follows from `--minutes`, by what two cores of an AMD EPYC with bfloat16
instructions do in a minute, not from the clock: the result is the same on a slower machine.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import random
import time

import keras
import numpy as np
from keras import layers, ops

from keras_pg2 import _backend
from keras_pg2.attention import attention_mask
from keras_pg2.checkpoints.presets import CODEC_FILE, TINY
from keras_pg2.config import GemmaConfig, PaliGemmaConfig, SiglipConfig
from keras_pg2.linear import activation_dtype
from keras_pg2.paligemma import PaliGemma2
from keras_pg2.preprocessing import Preprocessor
from keras_pg2.segmentation import SegmentationCodec
from keras_pg2.tiny.evaluate import evaluate, markdown_table
from keras_pg2.tiny.scenes import (
    CLASSES,
    COLORS,
    GRID_SIZE,
    IMAGE_SIZE,
    PATCH_SIZE,
    SceneRenderer,
    dense_targets,
)
from keras_pg2.tiny.tasks import tasks, train_tokenizer
from keras_pg2.tokenizer import NUM_LOCATIONS, NUM_SEGMENTS

_LOG = logging.getLogger(__name__)

CONFIG = PaliGemmaConfig(
    vision=SiglipConfig(
        width=160, depth=6, mlp_dim=640, num_heads=5, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE
    ),
    text=GemmaConfig(
        width=128,
        depth=4,
        mlp_dim=512,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        use_post_norms=True,
        attn_logit_softcap=50.0,
        final_logit_softcap=30.0,
        vocab_size=1792,
        max_positions=512,
    ),
)
CODEC = os.path.join(os.path.dirname(__file__), TINY, CODEC_FILE)

_QUESTIONS = ("ocr", "caption", "detect", "detect", "segment", "answer", "answer", "answer")
_SAVE_SECONDS, _LOG_SECONDS, _CHECK_SECONDS = 240, 60, 900
_LONGEST_STEP = 60  # seconds; in a longer one the process was halted
_NUM_PATCHES = GRID_SIZE**2
# Of the loss on patches, by which the sides of boxes weigh as much as their names.
_BACKGROUND, _COLOR, _SIDES = 0.5, 0.5, 3.0


@dataclasses.dataclass(frozen=True)
class Lesson:
    """One part of the training.

    Attributes:
        name: str.
        steps: int.
        num_images: int, images in a batch.
        rows_per_image: int, rows of text about each image; 0 for none.
        text_length: int, T, tokens in a row.
        num_targets: int, most tokens to learn in a row.
        is_packed: bool, whether a row is filled with questions, or holds one.
        learning_rate: pair of float, at the beginning and at the end.
        hold: float, share of the steps before the learning rate falls, by a cosine.
        blur: pair of float, width at the beginning and at the end of the bell, in bins, that
            the target of a location token is blurred to. It falls by equal factors.
        patch_weight: pair of float, of the loss on patches, at the beginning and at the end.
        easy_steps: int, steps before images show more than two objects.
        ema: float, momentum of the moving average of the weights.
    """

    name: str
    steps: int
    num_images: int
    learning_rate: tuple
    hold: float
    patch_weight: tuple
    rows_per_image: int = 0
    text_length: int = 0
    num_targets: int = 0
    is_packed: bool = False
    blur: tuple = (1.0, 1.0)
    easy_steps: int = 0
    ema: float = 0.998

    def at(self, pair, step):
        """The value between the two of a pair, `step` steps from the beginning."""
        share = step / max(1, self.steps - 1)
        return pair[0] + (pair[1] - pair[0]) * share


def lessons(minutes=130):
    """The three lessons, as long as they take in so many minutes on two free cores."""
    look = Lesson(
        "look",
        steps=round(17 * minutes),
        num_images=64,
        learning_rate=(2e-3, 4e-4),
        hold=0.5,
        patch_weight=(1.0, 1.0),
    )
    read = Lesson(
        "read",
        steps=round(64 * minutes),
        num_images=32,
        rows_per_image=1,
        text_length=120,
        num_targets=72,
        is_packed=True,
        learning_rate=(2e-3, 3e-4),
        hold=0.25,
        patch_weight=(0.5, 0.2),
        blur=(8.0, 1.0),
        easy_steps=round(3.92 * minutes),
    )
    answer = Lesson(
        "answer",
        steps=round(10 * minutes),
        num_images=24,
        rows_per_image=4,
        text_length=40,
        num_targets=32,
        learning_rate=(3e-4, 0.0),
        hold=0.0,
        patch_weight=(0.2, 0.2),
        blur=(1.0, 0.5),
        ema=0.999,
    )
    return look, read, answer


# Batches ------------------------------------------------------------------------------------


class Teacher:
    """Makes batches of images with what is to be learned about them.

    Args:
        renderer: SceneRenderer of the split "train".
        preprocessor: Preprocessor.
        codes: int (number of sprites, 16), see `SceneRenderer.segment_codes`.
        seed: int.
    """

    def __init__(self, renderer, preprocessor, codes, seed=0):
        self.renderer = renderer
        self.preprocessor = preprocessor
        self.codes = codes
        self.seed = seed

    def batches(self, lesson, first_step=0):
        """An iterator over the batches of a lesson for `fit`, made by a thread, one ahead."""
        steps = ((lesson, step) for step in range(first_step, lesson.steps))
        return ((batch,) for batch in _backend.prefetch(self.batch, steps))

    def batch(self, lesson, step):
        """What `Student` reads: dict of arrays. It depends on the arguments and the seed alone."""
        rng = random.Random(f"{self.seed} {lesson.name} {step}")
        max_objects = 2 if step < lesson.easy_steps else 4
        scenes = [self.renderer.scene(rng, None, max_objects) for _ in range(lesson.num_images)]
        batch = patch_arrays(scenes)
        batch["images"] = np.stack([scene.image for scene in scenes])
        batch["patch_weight"] = np.full(
            len(scenes), lesson.at(lesson.patch_weight, step), "float32"
        )
        if not lesson.rows_per_image:
            return batch
        rows = [
            pack(self._pairs(scene, rng, lesson.is_packed), lesson.text_length, lesson.num_targets)
            for scene in scenes
            for _ in range(lesson.rows_per_image)
        ]
        batch |= {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        batch["image_index"] = np.repeat(
            np.arange(len(scenes), dtype="int32"), lesson.rows_per_image
        )
        batch["target_weights"] /= batch["target_weights"].sum()
        blur = math.exp(lesson.at([math.log(width) for width in lesson.blur], step))
        batch["blur"] = np.full(len(rows), blur, "float32")
        return batch

    def _pairs(self, scene, rng, is_packed):
        """Tokenized questions with answers, as many as a row may hold, or one."""
        kinds = list(_QUESTIONS)
        rng.shuffle(kinds)
        if is_packed:
            kinds += ["answer"] * 3
            pairs = tasks(scene, rng, kinds, self.codes)
        else:
            pairs = next(filter(None, (tasks(scene, rng, [kind], self.codes) for kind in kinds)))
        return [self.preprocessor.tokenize(*pair, end=True) for pair in pairs]


def patch_arrays(scenes):
    """What a batch of scenes shows, patch by patch.

    Args:
        scenes: list of Scene.

    Returns:
        dict of
        - "classes", "colors": int32 (B, P), see `DenseTargets`;
        - "sides": float32 (B, P, 8), in image sides: top, left, bottom and right of the object's
          box, first as distances from the patch's centre, then as places in the image;
        - "object_weights": float32 (B, P), the same for all patches with an object, with sum 1;
        - "background_weights": float32 (B, P), the same for all others.
    """
    targets = [dense_targets(scene) for scene in scenes]
    count = (len(scenes), _NUM_PATCHES)
    classes = np.stack([target.classes for target in targets]).reshape(count)
    distances = np.stack([target.distances for target in targets]).reshape(*count, 4)
    centers = (np.arange(GRID_SIZE, dtype="float32") + 0.5) / GRID_SIZE
    y, x = np.repeat(centers, GRID_SIZE), np.tile(centers, GRID_SIZE)
    places = np.stack([y, x, y, x], axis=-1) + distances * np.array([-1, -1, 1, 1], "float32")
    has_object = (classes > 0).astype("float32")
    return {
        "classes": classes,
        "colors": np.stack([target.colors for target in targets]).reshape(count),
        "sides": np.concatenate([distances, places], axis=-1),
        "object_weights": has_object / max(1, has_object.sum()),
        "background_weights": (1 - has_object) / has_object.size,
    }


def pack(pairs, length, num_targets):
    """Puts questions with their answers into one row. Those that do not fit are left out.

    Args:
        pairs: list of (token_ids, suffix_mask), lists, as `Preprocessor.tokenize` makes them, with
            `<eos>`. A single pair gets the number 0: its row has the model's own mask.
        length: int, T.
        num_targets: int, most tokens to learn.

    Returns:
        dict of
        - "token_ids": int32 (T,), without `<eos>`;
        - "pairs": int32 (T,), numbers from 1, by which tokens find each other;
        - "blocks": int32 (T,), 0 in each prefix, then 1, 2, … along its suffix;
        - "places": int32 (T,), of a token in its pair;
        - "valid": bool (T,), False on padding;
        - "target_places": int32 (num_targets,), of the token before each one to learn;
        - "targets": int32 (num_targets,);
        - "target_weights": float32 (num_targets,), 1 or, on padding, 0.
    """
    names = ("token_ids", "pairs", "blocks", "places", "valid")
    row = {name: np.zeros(length, "bool" if name == "valid" else "int32") for name in names}
    targets = {
        "target_places": np.zeros(num_targets, "int32"),
        "targets": np.zeros(num_targets, "int32"),
        "target_weights": np.zeros(num_targets, "float32"),
    }
    start = count = 0
    for number, (token_ids, suffix_mask) in enumerate(pairs, 1):
        size, num_new = len(token_ids) - 1, sum(suffix_mask)
        if start + size > length or count + num_new > num_targets:
            continue
        here = slice(start, start + size)
        row["token_ids"][here] = token_ids[:-1]
        row["pairs"][here] = number if len(pairs) > 1 else 0
        row["blocks"][here] = np.cumsum(suffix_mask[:-1])
        row["places"][here] = np.arange(size)
        row["valid"][here] = True
        new = slice(count, count + num_new)
        targets["target_places"][new] = np.arange(start + size - num_new, start + size)
        targets["targets"][new] = token_ids[-num_new:]
        targets["target_weights"][new] = 1
        start, count = start + size, count + num_new
    return row | targets


# The model as it learns ---------------------------------------------------------------------


class Student(keras.Model):
    """The model to train, with heads that say what each patch shows, to be thrown away.

    Args:
        model: PaliGemma2.
        is_compiled: bool, whether torch compiles the blocks.

    Call arguments:
        inputs: dict of tensors, see `Teacher.batch`. Without "token_ids" only patches are learned.

    Returns:
        dict of float32 scalars: "loss", and what the log shows.
    """

    def __init__(self, model, is_compiled=True):
        super().__init__(dtype=model.dtype_policy, name="student")
        self.autocast = False
        self.model = model
        self.patch_classes = layers.Dense(len(CLASSES), dtype="float32", name="patch_classes")
        self.patch_colors = layers.Dense(len(COLORS), dtype="float32", name="patch_colors")
        self.patch_sides = layers.Dense(
            8, kernel_initializer="zeros", dtype="float32", name="patch_sides"
        )
        self.build()
        self._patch_losses, self._token_losses = patch_losses, token_losses
        if is_compiled:
            for block in (*model.vision.blocks, *model.text.blocks):
                block.call = _backend.compiled(block.call)
            self._patch_losses = _backend.compiled(patch_losses)
            self._token_losses = _backend.compiled(token_losses)
        self.shown = {}
        self.optimizer = None

    def build(self, input_shape=None):
        for head in (self.patch_classes, self.patch_colors, self.patch_sides):
            head.build((None, None, self.model.config.vision.width))
        self.built = True

    def call(self, inputs, training=None):
        images = ops.cast(inputs["images"], "float32") / 127.5 - 1
        features = self.model.vision(images, training=training)
        features_float32 = ops.cast(features, "float32")
        results = self._patch_losses(
            self.patch_classes(features_float32),
            self.patch_colors(features_float32),
            self.patch_sides(features_float32),
            inputs,
        )
        patch_loss = results["patch_loss"]
        if "token_ids" not in inputs:
            return {**results, "loss": patch_loss}
        logits = self._logits(features, inputs, training)
        first_location = logits.shape[-1] - NUM_LOCATIONS - NUM_SEGMENTS
        results |= self._token_losses(logits, first_location, inputs)
        weight = ops.mean(inputs["patch_weight"])
        return {**results, "loss": results["token_loss"] + weight * patch_loss}

    def _logits(self, features, inputs, training):
        """float32 (B, num_targets, V), of the tokens to learn."""
        text = self.model.text
        images = ops.cast(self.model.projector(features), activation_dtype(self.compute_dtype))
        images = ops.take(images, inputs["image_index"], axis=0)
        x = ops.concatenate([images, text.embed(inputs["token_ids"])], axis=1)
        mask, positions = masks_and_positions(inputs, _NUM_PATCHES)
        hidden, _ = text(x, positions, (mask, mask), training=training)
        hidden = _backend.take_rows(hidden[:, _NUM_PATCHES:], inputs["target_places"])
        return text.logits(hidden)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return y_pred["loss"]

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        for name, value in y_pred.items():
            self.shown.setdefault(name, keras.metrics.Mean(name=name)).update_state(value)
        return {name: self.shown[name].result() for name in y_pred}

    @property
    def metrics(self):
        return list(self.shown.values())


def masks_and_positions(inputs, num_image_tokens):
    """The mask and the positions of rows of an image and text.

    A query sees the image and its own pair, under the mask of `attention_mask`. With number 0,
    the image's own, a pair is seen by the image too: that is the model's own mask.

    Args:
        inputs: dict of tensors, see `pack`, each (B, T).
        num_image_tokens: int, P.

    Returns:
        mask: bool (B, P + T, P + T).
        positions: int32 (B, P + T).
    """
    padding = ((0, 0), (num_image_tokens, 0))
    pairs, blocks = ops.pad(inputs["pairs"], padding), ops.pad(inputs["blocks"], padding)
    valid = ops.pad(inputs["valid"], padding, constant_values=True)
    is_related = ops.logical_or(pairs[:, None, :] == 0, pairs[:, None, :] == pairs[:, :, None])
    mask = ops.logical_and(attention_mask(blocks, blocks, valid), is_related)
    image = ops.zeros_like(pairs[:, :num_image_tokens]) + ops.arange(
        num_image_tokens, dtype="int32"
    )
    return mask, ops.concatenate([image, inputs["places"] + num_image_tokens], axis=1)


def patch_losses(classes, colors, sides, inputs):
    """The loss on patches, and how many are right.

    Args:
        classes, colors: float32 (B, P, number of them), logits.
        sides: float32 (B, P, 8).
        inputs: dict of tensors, see `patch_arrays`.

    Returns:
        dict of float32 scalars: "patch_loss"; "patch_accuracy", of classes on objects; and
        "patch_pixels", the mean error of a side in its place in the image.
    """
    weights = inputs["object_weights"]
    errors = ops.abs(sides - inputs["sides"])
    class_losses = _cross_entropy(classes, inputs["classes"])
    color_losses = _cross_entropy(colors, inputs["colors"])
    losses = class_losses + _COLOR * color_losses + _SIDES * ops.sum(errors, axis=-1)
    loss = ops.sum(weights * losses)
    loss = loss + _BACKGROUND * ops.sum(inputs["background_weights"] * class_losses)
    is_right = ops.cast(ops.argmax(classes, axis=-1), "int32") == inputs["classes"]
    return {
        "patch_loss": loss,
        "patch_accuracy": ops.sum(weights * ops.cast(is_right, "float32")),
        "patch_pixels": ops.sum(weights * ops.mean(errors[..., 4:], axis=-1)) * IMAGE_SIZE,
    }


def token_losses(logits, first_location, inputs):
    """The loss on tokens: targets of location tokens are blurred to a bell.

    Args:
        logits: float32 (B, num_targets, V).
        first_location: int, id of `<loc0000>`.
        inputs: dict of tensors, see `pack`, and "blur" (B,), the width of the bell.

    Returns:
        dict of float32 scalars: "token_loss", "token_accuracy", of all but location tokens, and
        "location_pixels", the mean error of the most likely location.
    """
    targets, weights = inputs["targets"], inputs["target_weights"]
    target_logits = ops.sum(
        ops.where(ops.arange(logits.shape[-1], dtype="int32") == targets[..., None], logits, 0.0),
        axis=-1,
    )
    bin = targets - first_location
    is_location = ops.logical_and(bin >= 0, bin < NUM_LOCATIONS)
    distances = ops.arange(NUM_LOCATIONS, dtype="int32") - bin[..., None]
    distances = ops.cast(distances, "float32") / inputs["blur"][:, None, None]
    bell = ops.exp(-0.5 * ops.square(distances))
    locations = logits[..., first_location : first_location + NUM_LOCATIONS]
    blurred = ops.sum(bell * locations, axis=-1) / ops.maximum(ops.sum(bell, axis=-1), 1e-6)
    losses = ops.logsumexp(logits, axis=-1) - ops.where(is_location, blurred, target_logits)
    location_weights = ops.where(is_location, weights, 0.0)
    other_weights = weights - location_weights
    is_right = ops.cast(target_logits >= ops.max(logits, axis=-1), "float32")
    error = ops.cast(ops.abs(ops.cast(ops.argmax(locations, axis=-1), "int32") - bin), "float32")
    error = ops.sum(location_weights * error) / (ops.sum(location_weights) + 1e-6)
    return {
        "token_loss": ops.sum(weights * losses),
        "token_accuracy": ops.sum(other_weights * is_right) / (ops.sum(other_weights) + 1e-6),
        "location_pixels": error * (IMAGE_SIZE / (NUM_LOCATIONS - 1)),
    }


def _cross_entropy(logits, targets):
    return keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)


def new_model(preprocessor, seed=0, dtype="mixed_bfloat16", config=CONFIG):
    """A model with the random weights to begin with.

    Location embeddings begin as waves over the image of many lengths, so that near places have
    near embeddings.
    """
    keras.utils.set_random_seed(seed)
    model = PaliGemma2(config, preprocessor, dtype=dtype)
    rng = np.random.default_rng(seed)
    width = config.text.width
    table = rng.normal(0, width**-0.5, (config.text.vocab_size, width))
    first = config.text.vocab_size - NUM_LOCATIONS - NUM_SEGMENTS
    frequencies = math.pi * np.geomspace(0.5, 128, width // 4)
    sizes = np.exp(-np.linspace(0, 2, width // 4))
    sizes /= np.sqrt(np.mean(sizes**2))
    angles = np.linspace(0, 1, NUM_LOCATIONS)[:, None] * frequencies
    waves = np.concatenate([np.sin(angles) * sizes, np.cos(angles) * sizes], axis=1)
    turn = rng.normal(0, (width / 2) ** -0.5, (width // 2, width))
    common = 0.5 * rng.normal(0, width**-0.5, (1, width))
    locations = slice(first, first + NUM_LOCATIONS)
    table[locations] = 0.3 * table[locations] + 1.3 * width**-0.5 * waves @ turn + common
    model.text.embedding.embeddings.assign(table.astype("float32"))
    return model


# Training -----------------------------------------------------------------------------------


class WarmHoldCosine(keras.optimizers.schedules.LearningRateSchedule):
    """A short warm-up, then constant, then down by a cosine.

    Args:
        lesson: Lesson.
        warmup: int, steps.
    """

    def __init__(self, lesson, warmup=50):
        self.lesson, self.warmup = lesson, warmup

    def __call__(self, step):
        step = ops.cast(step, "float32")
        high, low = self.lesson.learning_rate
        hold = self.lesson.hold * self.lesson.steps
        share = ops.clip((step - hold) / max(1.0, self.lesson.steps - hold), 0.0, 1.0)
        rate = low + (high - low) * 0.5 * (1 + ops.cos(math.pi * share))
        return rate * ops.minimum(1.0, (step + 1) / self.warmup)


class StackedMuon(keras.optimizers.Muon):
    """Muon that treats all matrices of one shape at once, in bfloat16: five times as fast."""

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        stacks = {}
        for gradient, variable in zip(grads, trainable_variables):
            if self._should_use_adamw(variable):
                self.update_step(gradient, variable, learning_rate)
                continue
            momentum = self.momentums[self._get_variable_index(variable)]
            momentum.assign(momentum * self.momentum + gradient)
            direction = gradient + momentum * self.momentum
            stacks.setdefault(tuple(variable.shape), []).append((direction, variable))
        for members in stacks.values():
            directions = ops.stack([ops.cast(direction, "bfloat16") for direction, _ in members])
            updates = self.zeropower_via_newtonschulz5(directions, self.ns_steps)
            for update, (_, variable) in zip(ops.cast(updates, "float32"), members):
                variable.assign_sub(self.lr_adjust(learning_rate * update))


def new_optimizer(lesson):
    """Muon for the matrices of the blocks, AdamW for everything else."""
    optimizer = StackedMuon(
        WarmHoldCosine(lesson),
        adam_beta_2=0.98,
        adam_weight_decay=0.02,
        weight_decay=0.02,
        epsilon=1e-8,
        exclude_layers=["projector", "patch_"],
        global_clipnorm=1.0,
        use_ema=True,
        ema_momentum=lesson.ema,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "scale", "gamma", "beta"])
    return optimizer


class Run:
    """A training with its state in a folder, from which it goes on.

    Args:
        folder: path of the state and the log.
        student: Student.
        teacher: Teacher.
        plan: sequence of Lesson.
        check: callable or None, from the averaged weights by path to a dict for the log; called
            every 15 minutes of lessons with text.
    """

    def __init__(self, folder, student, teacher, plan, check=None):
        self.folder = folder
        self.student, self.teacher, self.plan, self.check = student, teacher, plan, check
        self.lesson_number = self.step = 0
        self.seconds = 0.0
        os.makedirs(folder, exist_ok=True)
        self._state = os.path.join(folder, "state.npz")

    def resume(self):
        """Goes back to the saved state, if there is one."""
        if not os.path.exists(self._state):
            return
        with np.load(self._state) as state:
            self.lesson_number, self.step = (int(n) for n in state["place"])
            self.seconds = float(state["seconds"])
            arrays = [state[f"{i}"] for i in range(len(state.files) - 2)]
        if self.step:
            self._compile()
        for variable, array in zip(self._variables(), arrays, strict=True):
            variable.assign(array)

    def save(self):
        """Writes the state: all of it or nothing."""
        arrays = {f"{i}": _backend.to_numpy(v.value) for i, v in enumerate(self._variables())}
        partial = os.path.join(self.folder, "partial.npz")
        place = np.array([self.lesson_number, self.step])
        np.savez(partial, place=place, seconds=np.array(self.seconds), **arrays)
        os.replace(partial, self._state)

    def train(self, verbose=1):
        """Goes through the lessons, from where it is to the end."""
        while self.lesson_number < len(self.plan):
            lesson = self.plan[self.lesson_number]
            if self.step == 0:
                self._compile()
            self.student.fit(
                self.teacher.batches(lesson, self.step),
                steps_per_epoch=lesson.steps - self.step,
                shuffle=False,
                callbacks=[_Recorder(self)],
                verbose=verbose,
            )
            # Keras has put the averages in place of the weights.
            self.lesson_number, self.step = self.lesson_number + 1, 0
            self.student.optimizer = None
            self.save()

    def _compile(self):
        lesson = self.plan[self.lesson_number]
        model = self.student.model
        model.text.trainable = model.projector.trainable = bool(lesson.rows_per_image)
        optimizer = new_optimizer(lesson)
        self.student.compile(optimizer, loss=None, jit_compile=False)
        optimizer.build(self.student.trainable_variables)
        self.student.shown = {}

    def _variables(self):
        optimizer = self.student.optimizer
        return [*self.student.variables, *(optimizer.variables if optimizer else ())]

    def averaged_weights(self):
        """dict of path to array: moving averages where there are, else the weights."""
        model, optimizer = self.student.model, self.student.optimizer
        averages = {}
        if optimizer is not None:
            averages = {
                id(variable): average
                for variable, average in zip(
                    optimizer._trainable_variables, optimizer._model_variables_moving_average
                )
            }
        return {
            path: _backend.to_numpy(averages.get(id(variable), variable).value)
            for path, variable in model.variables_by_path().items()
        }

    def log(self, **entry):
        """Adds a line to the log, JSON."""
        lesson = self.plan[min(self.lesson_number, len(self.plan) - 1)]
        entry = {
            "lesson": lesson.name,
            "step": self.step,
            "minutes": round(self.seconds / 60, 2),
            **{
                name: round(value, 4) if isinstance(value, float) else value
                for name, value in entry.items()
            },
        }
        with open(os.path.join(self.folder, "log.jsonl"), "a") as file:
            file.write(json.dumps(entry) + "\n")


class _Recorder(keras.callbacks.Callback):
    """Counts steps and seconds, and saves, logs and checks from time to time."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self._due = dict.fromkeys(("save", "log", "check"), 0.0)

    def on_train_begin(self, logs=None):
        self._then = time.monotonic()
        for name, period in self._periods():
            self._due[name] = self.run.seconds + period

    def on_train_batch_end(self, batch, logs=None):
        run, now = self.run, time.monotonic()
        run.seconds += min(now - self._then, _LONGEST_STEP)
        run.step += 1
        if not all(math.isfinite(float(value)) for value in (logs or {}).values()):
            raise FloatingPointError(f"The loss is not finite at step {run.step}: {logs}")
        if self._is_due("log"):
            run.log(**{name: float(value) for name, value in logs.items()})
            self.model.reset_metrics()
        if self._is_due("check") and run.check and run.plan[run.lesson_number].rows_per_image:
            run.log(**run.check(run.averaged_weights()))
        if self._is_due("save"):
            run.save()
        self._then = time.monotonic()

    def _periods(self):
        return (("save", _SAVE_SECONDS), ("log", _LOG_SECONDS), ("check", _CHECK_SECONDS))

    def _is_due(self, name):
        if self.run.seconds < self._due[name]:
            return False
        self._due[name] = self.run.seconds + dict(self._periods())[name]
        return True


def options_of_run(path, given, is_resumed):
    """The options of a run: those given when it began.

    Args:
        path: path of the JSON file that keeps them.
        given: dict of name to value, or None where none is given.
        is_resumed: bool, whether the run goes on, if it began.

    Returns:
        dict of name to value.

    Raises:
        ValueError: if others are given to a run that goes on.
    """
    options = {"minutes": 130.0, "seed": 0}
    is_resumed = is_resumed and os.path.exists(path)
    if is_resumed:
        with open(path) as file:
            options = json.load(file)
    for name, value in given.items():
        if is_resumed and value not in (None, options[name]):
            raise ValueError(
                f"this run has --{name} {options[name]}, and cannot go on with {value}"
            )
        options[name] = options[name] if value is None else value
    with open(path, "w") as file:
        json.dump(options, file)
    return options


def main(arguments=None):
    """Runs `python -m keras_pg2.tiny.train`."""
    parser = argparse.ArgumentParser(
        prog="python -m keras_pg2.tiny.train",
        description="Train the tiny PaliGemma 2 from nothing.",
    )
    parser.add_argument("out", help="folder of the preset to write; OUT.run has log and state")
    parser.add_argument("--minutes", type=float, help="on two free cores; default: 130")
    parser.add_argument("--resume", action="store_true", help="go on from the state in OUT.run")
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--codec", metavar="FILE", default=CODEC, help="weights of the codec")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = f"{options.out}.run"
    if _backend.IS_COMPILED:
        parser.error("set KERAS_BACKEND=torch: on a CPU it alone is fast in bfloat16")
    if os.path.exists(options.out):
        parser.error(f"{options.out} exists already")
    if os.path.exists(folder) and not options.resume:
        parser.error(f"{folder} exists already: go on with --resume, or remove it")
    os.makedirs(folder, exist_ok=True)
    given = {"minutes": options.minutes, "seed": options.seed}
    try:
        began = options_of_run(os.path.join(folder, "options.json"), given, options.resume)
    except ValueError as error:
        parser.error(str(error))

    tokenizer = train_tokenizer(os.path.join(folder, "tokenizer.model"))
    preprocessor = Preprocessor(tokenizer, IMAGE_SIZE)
    codec = SegmentationCodec.from_file(options.codec)
    renderer, held_out = SceneRenderer("train"), SceneRenderer("test")
    teacher = Teacher(renderer, preprocessor, renderer.segment_codes(codec.encode), began["seed"])
    student = Student(new_model(preprocessor, began["seed"]))
    # In the dtype of the file. A model of its own, since those of the student are compiled.
    graduate = PaliGemma2(CONFIG, preprocessor, dtype="float16")

    graduate.use_codec(codec)

    def check(weights, num_examples=100):
        for path, variable in graduate.variables_by_path().items():
            variable.assign(weights[path])
        return evaluate(graduate, num_examples, renderer=held_out)

    run = Run(folder, student, teacher, lessons(began["minutes"]), check)
    if options.resume:
        run.resume()
    run.train()
    metrics = check(run.averaged_weights(), num_examples=500)
    run.log(**metrics)
    graduate.save_to_preset(options.out)
    codec.save_file(os.path.join(options.out, CODEC_FILE), dtype="float16", overwrite=True)
    _LOG.info("%s", markdown_table(metrics))


if __name__ == "__main__":
    main()
