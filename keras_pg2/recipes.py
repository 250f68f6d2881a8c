"""How the papers trained each task: epochs, batch size, learning rate and the rest, as data."""

import dataclasses
import math
import numbers
import re
from collections.abc import Mapping

import keras

from keras_pg2.config import check_positive

_TRANSFERS = "big_vision configs/proj/paligemma/transfers"
_PAPER = "arXiv 2412.03555, appendix B"
_WARMUP = 0.05  # share of the steps
# What big_vision's `img/.*` is here: its projector is the head of the vision tower.
_VISION = "^(vision|projector)(/|$)"
# big_vision decays what is called `kernel`. The weights of its decoder have other names.
_DECAYED = re.compile(r"^(vision/.*|projector)/kernel$")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of a task. None is what the source does not say.

    `dataclasses.replace(recipe, learning_rate=3e-6)` changes a value. Larger models want lower
    learning rates than the 3B, for which these are. big_vision trained all of them without the
    final soft cap: `from_preset(…, final_logit_softcap=None)`.

    `optimizer` makes use of epochs, batch size, steps, learning rate and weight decay. What else a
    recipe says goes where the attribute below says.

    Attributes:
        epochs: float or None, passes over the images; where an image has several captions or
            answers, each pass draws one of them.
        batch_size: int or None, examples in a step.
        learning_rate: float or None, at its peak. It is not scaled for another batch size.
        weight_decay: float, share of the vision tower's and the projector's kernels that a step
            takes off at the peak of the schedule, whatever the learning rate. The decoder, biases,
            norms and embeddings do not decay.
        dropout: float, on the outputs of attention and MLP of the decoder:
            `from_preset(…, dropout=…)`.
        label_smoothing: float: `compile(…, label_smoothing=…)`.
        frozen: regular expression over the paths of what does not learn, or None: `freeze(…)`.
        num_beams: int, width of the beam search, 1 for greedy decoding:
            `generate(…, sampler=keras_pg2.Beam(…))`.
        text_length: int or None, tokens of prefix and suffix without `<eos>`:
            `preprocessor.sequence_length` is one more.
        steps: int or None, in place of epochs where the source says so.
        lora: mapping of arguments of `PaliGemma2.enable_lora`, or None to train all weights.
        source: str, where the values are from.
    """

    epochs: float | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    dropout: float = 0.0
    label_smoothing: float = 0.0
    frozen: str | None = None
    num_beams: int = 1
    text_length: int | None = None
    steps: int | None = None
    lora: Mapping | None = None
    source: str = ""

    def schedule(self, num_examples, batch_size=None, epochs=None, *, accumulate=1):
        """Linear warm-up from 0 over 5 % of the training, then a cosine down to 0.

        It counts batches of `fit`, as Keras does; an epoch includes its smaller last batch. A
        recipe with `steps` makes as many whatever `num_examples` and `batch_size` are, unless
        `epochs` is given.

        Args:
            num_examples, batch_size, epochs, accumulate: see `optimizer`.

        Returns:
            keras.optimizers.schedules.CosineDecay.

        Raises:
            ValueError: if an argument is not positive, or missing both here and in the recipe; or
                if `accumulate` is no integer, does not divide `batch_size` or exceeds the batches
                in all.

        Source: big_vision `utils.py`, `create_learning_rate_schedule`.
        """
        learning_rate = self._given("learning_rate")
        check_positive(accumulate=accumulate)
        if self.steps is not None and epochs is None:
            batches = self.steps * accumulate
        else:
            batch_size = self._given("batch_size", batch_size)
            if batch_size % accumulate:
                raise ValueError(
                    f"`accumulate` must divide the batch size, {batch_size}. "
                    f"Received: accumulate={accumulate!r}"
                )
            if num_examples < 1:
                raise ValueError(f"`num_examples` must be positive. Received: {num_examples!r}")
            epoch = math.ceil(num_examples * accumulate / batch_size)
            batches = max(1, round(self._given("epochs", epochs) * epoch))
            if batches < accumulate:
                raise ValueError(
                    f"`accumulate` must not exceed the batches of the whole training, {batches}, "
                    f"or no step is made. Received: accumulate={accumulate!r}"
                )
        warmup = min(max(1, round(_WARMUP * batches)), batches - 1)
        if not warmup:  # a single batch
            return keras.optimizers.schedules.CosineDecay(learning_rate, 1)
        return keras.optimizers.schedules.CosineDecay(
            0.0, batches - warmup, warmup_target=learning_rate, warmup_steps=warmup
        )

    def optimizer(self, num_examples, batch_size=None, epochs=None, *, accumulate=1, model=None):
        """Adam, or AdamW if weights decay, with the schedule and gradients clipped to norm 1.

        Args:
            num_examples: int, of one epoch, on all processes together. It and `batch_size` have no
                effect in recipes with `steps`, unless `epochs` is given.
            batch_size: int or None for the recipe's, examples in a step, on all processes and in
                all accumulated batches together.
            epochs: float or None for the recipe's.
            accumulate: int, batches of `fit` that make one step: `fit` gets
                `batch_size // accumulate` examples at a time.
            model: PaliGemma2, with LoRA if it is to have it, and frozen where it is to be. Needed
                where weights decay: which ones follows from their paths. Keras does not save that
                with the optimizer: when training goes on another day, make the optimizer anew.

        Returns:
            keras.optimizers.AdamW, or keras.optimizers.Adam if no trainable weight decays.

        Raises:
            ValueError: as `schedule`, or if weights decay and `model` is missing.

        Example:
            >>> recipe = keras_pg2.recipes.get("vqav2", image_size=224)
            >>> optimizer = recipe.optimizer(len(examples), model=model)

        Source: big_vision `optax.py`, `make`.
        """
        options = {
            "learning_rate": self.schedule(num_examples, batch_size, epochs, accumulate=accumulate),
            "epsilon": 1e-8,  # of optax
            "global_clipnorm": 1.0,
            "gradient_accumulation_steps": accumulate if accumulate > 1 else None,
        }
        if not self.weight_decay:
            return keras.optimizers.Adam(**options)
        if model is None:
            raise ValueError(
                "`model` must be given: the recipe has weight decay, of the kernels of the vision "
                "tower and the projector alone. Pass `model=model`, or do without, by "
                "`dataclasses.replace(recipe, weight_decay=0.0)`."
            )
        variables = model.variables_by_path()
        if not any(v.trainable and _DECAYED.match(path) for path, v in variables.items()):
            return keras.optimizers.Adam(**options)  # with nothing to decay, AdamW fails on torch
        # Keras multiplies the decay by the learning rate, big_vision by the schedule alone.
        decay = self.weight_decay / self.learning_rate
        optimizer = keras.optimizers.AdamW(weight_decay=decay, **options)
        optimizer.exclude_from_weight_decay(
            [v for path, v in variables.items() if not _DECAYED.match(path)]
        )
        return optimizer

    def _given(self, name, value=None):
        value = getattr(self, name) if value is None else value
        if value is None:
            raise ValueError(
                f"The source of this recipe, {self.source}, gives no `{name}`. Pass it, or use "
                f"`dataclasses.replace(recipe, {name}=…)`."
            )
        if not value > 0:
            raise ValueError(f"`{name}` must be positive. Received: {name}={value!r}")
        return value


def get(name, image_size=224):
    """The recipe of a task.

    Args:
        name: str, one of `RECIPES`, such as "vqav2"; "default", which is close to the best on most
            tasks; "forkme", big_vision's for few images; "lora" and "few_shot".
        image_size: int, in pixels. Where the task lacks it, its next smaller size is taken, or
            its smallest.

    Returns:
        Recipe.

    Raises:
        ValueError: if there is no such task, or `image_size` is no number.

    Example:
        >>> keras_pg2.recipes.get("refcoco", image_size=448).learning_rate
        1e-05
    """
    if name not in list(RECIPES):  # which asks for no hash
        raise ValueError(f"`name` must be one of {sorted(RECIPES)}. Received: name={name!r}")
    if not isinstance(image_size, numbers.Real):
        raise ValueError(f"`image_size` must be a number. Received: image_size={image_size!r}")
    sizes = RECIPES[name]
    smaller = [size for size in sizes if size <= image_size]
    return sizes[max(smaller, default=min(sizes))]


def _task(file, epochs, batch_size, learning_rate, text_length, at=None, **values):
    """A row of big_vision: the recipe at 224 px, and what is different at other sizes."""
    recipe = Recipe(
        epochs,
        batch_size,
        learning_rate,
        text_length=text_length,
        source=f"{_TRANSFERS}/{file}.py",
        **values,
    )
    changes = {224: {}, **(at or {})}
    return {size: dataclasses.replace(recipe, **change) for size, change in changes.items()}


# The best of the sweeps, `sweep_best` in the files. `refcoco`, say, is {224: Recipe, 448: …}.
# fmt: off
RECIPES = {
    #                   file            epochs batch   lr  tokens
    # Captions
    "cococap":     _task("cococap",         5, 256, 1e-5,  32, weight_decay=1e-6, num_beams=2),
    # One epoch is the images in one of 35 languages, drawn for each.
    "coco35l":     _task("coco35l",        25, 256, 1e-5,  32, weight_decay=1e-6),
    "textcaps":    _task("textcaps",        5, 256, 1e-5,  32, weight_decay=1e-6, num_beams=3),
    "scicap":      _task("scicap",         80, 256, 3e-5,  96, dropout=0.1, label_smoothing=0.1),
    "screen2words": _task("screen2words",  10, 256, 1e-5,  24, dropout=0.3, label_smoothing=0.2),
    "widgetcap":   _task("widgetcap",       4,  64, 3e-6,  32, weight_decay=3e-7, dropout=0.1,
                         label_smoothing=0.1),
    # Questions
    "vqav2":       _task("vqav2",          10, 256, 1e-5,  32, weight_decay=1e-6,
                         at={448: {"weight_decay": 0.0}}),
    "okvqa":       _task("okvqa",          10, 128, 5e-6,  32),
    "aokvqa_mc":   _task("aokvqa_mc",      15, 128, 5e-6, 128),
    "aokvqa_da":   _task("aokvqa_da",      10, 128, 5e-6,  32),
    "gqa":         _task("gqa",             1, 256, 1e-5,  32, at={448: {"frozen": _VISION}}),
    "nlvr2":       _task("nlvr2",           3, 256, 1e-5,  64, weight_decay=1e-6,
                         at={448: {"epochs": 10, "learning_rate": 3e-6, "weight_decay": 3e-7}}),
    "ai2d":        _task("ai2d",           10, 256, 1e-5, 128, weight_decay=1e-6),
    "science_qa":  _task("science_qa",     20, 128, 1e-5, 512, frozen=_VISION),
    "rsvqa_lr":    _task("rsvqa_lr",        3, 256, 3e-6,  32, label_smoothing=0.2),
    "rsvqa_hr":    _task("rsvqa_hr",        1, 256, 1e-5,  32),
    "chartqa":     _task("chartqa",        30, 256, 1e-5,  48, weight_decay=1e-6, dropout=0.1,
                         label_smoothing=0.2),
    "vizwizvqa":   _task("vizwizvqa",      10, 256, 1e-5,  48),
    "tallyqa":     _task("tallyqa",         2, 256, 1e-5,  32,
                         at={448: {"weight_decay": 1e-6},
                             896: {"learning_rate": 7e-6, "weight_decay": 7e-7}}),
    "ocrvqa":      _task("ocrvqa",          3, 128, 3e-6,  32,
                         at={896: {"learning_rate": 1e-5}}),
    "textvqa":     _task("textvqa",         5, 256, 3e-6,  32,
                         at={448: {"epochs": 10, "weight_decay": 3e-7}, 896: {"epochs": 10}}),
    "docvqa":      _task("docvqa",         10, 256, 1e-5,  32, weight_decay=1e-6),
    "infovqa":     _task("infovqa",         3, 256, 1e-5,  48, weight_decay=1e-6,
                         label_smoothing=0.4,
                         at={448: {"batch_size": 128},
                             896: {"batch_size": 32, "learning_rate": 3e-6,
                                   "weight_decay": 3e-7}}),
    "stvqa":       _task("stvqa",           3, 256, 1e-5,  48, weight_decay=1e-6,
                         label_smoothing=0.1,
                         at={448: {"batch_size": 128},
                             896: {"batch_size": 32, "learning_rate": 3e-6,
                                   "weight_decay": 3e-7}}),
    # Segmentation of what an expression refers to
    "refcoco":     _task("refcoco_seg",   100, 256, 3e-5,  48, dropout=0.1, label_smoothing=0.3,
                         at={448: {"learning_rate": 1e-5, "dropout": 0.0},
                             896: {"batch_size": 64, "learning_rate": 1e-5, "dropout": 0.0}}),
    # Videos, 16 frames (MSVD 8) as images of one example
    "activitynet_cap": _task("activitynet_cap", 1, 128, 1e-5, 64, weight_decay=1e-6,
                             frozen=_VISION),
    "activitynet_qa":  _task("activitynet_qa",  1, 128, 1e-5, 64, weight_decay=1e-6),
    "msrvtt_cap":      _task("msrvtt_cap",     20, 128, 1e-5, 32, frozen=_VISION),
    "msrvtt_qa":       _task("msrvtt_qa",       1, 128, 1e-5, 64, frozen=_VISION),
    "msvd_qa":         _task("msvd_qa",         1, 128, 3e-6, 64, weight_decay=3e-7),
    "vatex_cap":       _task("vatex_cap",      10, 128, 3e-6, 64, weight_decay=3e-7),
    # A few images of your own
    "forkme":      _task("forkme",         15,  32, 1e-5, 128, weight_decay=3e-7),
}
# fmt: on
RECIPES |= {
    # Within 2.5 % of the best on 37 tasks, with 10 epochs or fewer. RefCOCO, SciCap, ScienceQA
    # and ChartQA want their own.
    "default": {224: Recipe(10, 256, 1e-5, source="arXiv 2407.07726")},
    "lora": {
        224: Recipe(
            epochs=10,
            batch_size=32,  # 4 at a time, 8 of which make a step
            learning_rate=1e-5,
            lora={"rank": 8, "alpha": 16, "dropout": 0.05, "pattern": "all-linear"},
            source="maestro maestro/trainer/models/paligemma_2",
        )
    },
    "coco_detection": {448: Recipe(epochs=50, source=_PAPER)},
    "ocr": {
        896: Recipe(
            batch_size=256,
            learning_rate=1e-5,
            label_smoothing=0.1,
            text_length=2048,
            steps=15_000,
            source=_PAPER,
        )
    },
    "tables": {896: Recipe(learning_rate=1e-4, text_length=4096, source=_PAPER)},
    "molecules": {
        448: Recipe(
            learning_rate=1e-4, label_smoothing=0.1, text_length=256, steps=30_000, source=_PAPER
        )
    },
    "vsr": {224: Recipe(batch_size=1024, source=_PAPER)},
    "mimic_cxr": {896: Recipe(epochs=8, learning_rate=5e-6, source=_PAPER)},
}
# The papers tuned every run of few examples on its own and give no recipe.
RECIPES["few_shot"] = RECIPES["lora"]
