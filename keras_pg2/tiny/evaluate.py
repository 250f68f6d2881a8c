"""How well a model does on scenes it never saw, of digits it never saw, by greedy decoding.

    python -m keras_pg2.tiny.evaluate [PRESET] [--num-examples 500]

prints a Markdown table.
"""

import argparse
import collections
import dataclasses
import random
import sys

import numpy as np

from keras_pg2.checkpoints.presets import TINY
from keras_pg2.paligemma import PaliGemma2
from keras_pg2.tasks import box_overlap, parse_detections
from keras_pg2.tiny.scenes import IMAGE_SIZE, SHAPES, Scene, SceneRenderer
from keras_pg2.tiny.tasks import LANGUAGES, QUESTIONS, TASKS, tasks

_MAX_NEW_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Example:
    """One thing to ask about one held-out scene.

    Attributes:
        kind: str, the task with the choice made, such as "caption de" or "answer sum".
        scene: Scene.
        prompt: str.
        suffix: str, the right answer.
    """

    kind: str
    scene: Scene
    prompt: str
    suffix: str


def held_out_examples(renderer, kind, num_examples, seed, codes=None, shapes=SHAPES):
    """Examples of one kind, the same ones for the same arguments.

    Args:
        renderer: SceneRenderer of the split "test".
        kind: str, one of `tasks.TASKS`, whose languages or questions take turns; or with a choice,
            such as "caption de" or "answer top-most", see `tasks.tasks`.
        num_examples: int.
        seed: int.
        codes: int (number of sprites, 16) or None. Without it, the right answers to "segment"
            have codes that mean nothing.
        shapes: tuple of str, see `SceneRenderer.scene`.

    Returns:
        list of Example.

    Raises:
        ValueError: if scenes of this renderer do not fit the kind.
    """
    if num_examples < 1:
        raise ValueError(f"`num_examples` must be positive. Received: {num_examples}")
    rng = random.Random(f"{kind} {seed}")
    choices = {"caption": LANGUAGES, "answer": tuple(QUESTIONS)}.get(kind)
    kinds = [f"{kind} {choice}" for choice in choices] if choices else [kind]
    if codes is None:
        codes = np.zeros((len(renderer.sprites), 16), int)
    examples = []
    for _ in range(1000 * num_examples):
        turn = kinds[len(examples) % len(kinds)]
        scene = renderer.scene(rng, shapes=shapes)
        for prompt, suffix in tasks(scene, rng, [turn], codes):
            examples.append(Example(turn, scene, prompt, suffix))
        if len(examples) == num_examples:
            return examples
    raise ValueError(f"These scenes do not fit the kind. Received: kind={turn!r}")


def evaluate(
    model,
    num_examples=500,
    seed=1,
    *,
    renderer=None,
    kinds=TASKS,
    shapes=SHAPES,
    batch_size=50,
):
    """Scores a model's greedy answers about held-out scenes.

    Args:
        model: PaliGemma2. Its codec makes the masks.
        num_examples: int, examples of each of `kinds`.
        seed: int, of the examples.
        renderer: SceneRenderer of the split "test", or None to make one.
        kinds: sequence of str, see `held_out_examples`.
        shapes: tuple of str, see `SceneRenderer.scene`.
        batch_size: int, examples in one batch.

    Returns:
        dict of str to float, each in [0, 1]. All texts count by "exact", the share of answers
        that are right to the letter, also by number of digits, question and language.
        "caption/tokens" is the share of tokens that are right, place by place. For boxes,
        "recall" and "precision" count those of the same label with an IoU of at least 0.5,
        "iou" is the mean over the true boxes, 0 for those not found, and "all right" the share
        of answers with no box missing and none too many. "segment/box iou" and "segment/mask
        iou" are means over objects.

    Raises:
        ValueError: if `renderer` is of the training split.

    Example:
        >>> metrics = evaluate(model)
        >>> metrics["ocr/exact"]
        0.95
    """
    renderer = renderer or SceneRenderer("test")
    if renderer.split != "test":
        raise ValueError("`renderer` must be of the split 'test'. Received: 'train'")
    metrics = {}
    for kind in kinds:
        examples = held_out_examples(renderer, kind, num_examples, seed, shapes=shapes)
        answers = model.generate(
            [example.scene.image for example in examples],
            [example.prompt for example in examples],
            max_new_tokens=_MAX_NEW_TOKENS,
            batch_size=batch_size,
        )
        scores = collections.defaultdict(list)
        for example, answer in zip(examples, answers, strict=True):
            if kind.startswith("detect"):
                _score_boxes(scores, example, answer)
            elif kind.startswith("segment"):
                _score_mask(scores, example, answer, model.get_codec())
            else:
                _score_text(scores, example, answer, model.preprocessor.tokenizer)
        for name in sorted(scores):  # without any box there is no precision
            metrics[f"{kind}/{name}"] = float(np.mean(scores[name] or [0]))
    return metrics


def _score_text(scores, example, answer, tokenizer):
    is_right = answer == example.suffix
    task, _, choice = example.kind.partition(" ")
    if task == "ocr" and example.suffix.isdigit():
        count = len(example.suffix)
        choice = "1 digit" if count == 1 else f"{count} digits"
    names = ["exact", f"exact/{choice}"] if choice else ["exact"]
    for name in names:
        scores[name].append(is_right)
    if task == "caption":
        right, given = (tokenizer.encode(text) for text in (example.suffix, answer))
        share = sum(a == b for a, b in zip(right, given)) / max(len(right), len(given))
        for name in ("tokens", f"tokens/{choice}"):
            scores[name].append(share)


def _score_boxes(scores, example, answer):
    true, given = _parse(example.suffix), _parse(answer)
    overlaps = _match(true, given)
    num_given = sum(bool(part.strip()) for part in answer.split(";"))  # malformed ones too
    num_found = sum(overlap >= 0.5 for overlap in overlaps)
    scores["iou"] += overlaps
    scores["recall"] += [overlap >= 0.5 for overlap in overlaps]
    scores["precision"] += [True] * num_found + [False] * (num_given - num_found)
    scores["all right"].append(len(true) == num_given == num_found)


def _match(true, given):
    """The IoU of each true box with the one given for it, 0 if there is none.

    The closest pairs of one label find each other first.
    """
    pairs = [
        (box_overlap(one.box, other.box), i, j)
        for i, one in enumerate(true)
        for j, other in enumerate(given)
        if one.label == other.label
    ]
    overlaps, used = [0.0] * len(true), set()
    for overlap, i, j in sorted(pairs, reverse=True):
        if overlap > 0 and not overlaps[i] and j not in used:
            overlaps[i] = overlap
            used.add(j)
    return overlaps


def _score_mask(scores, example, answer, codec):
    name = example.prompt.removeprefix("segment ")
    (item,) = [item for item in example.scene.objects if item.name == name]
    given = [found for found in _parse(answer, codec) if found.label == name]
    (true,) = _parse(example.suffix)
    scores["box iou"].append(box_overlap(true.box, given[0].box) if given else 0.0)
    if not given or given[0].mask is None:
        scores["mask iou"].append(0.0)
        return
    true_mask, mask = example.scene.mask(item), given[0].mask
    scores["mask iou"].append((true_mask & mask).sum() / (true_mask | mask).sum())


def _parse(text, codec=None):
    return parse_detections(text, IMAGE_SIZE, IMAGE_SIZE, codec)


def markdown_table(metrics):
    """A Markdown table of what `evaluate` returns."""
    rows = [f"| {name} | {value:.3f} |" for name, value in metrics.items()]
    return "\n".join(["| metric | value |", "|---|---|", *rows])


def main(arguments=None):
    """Runs `python -m keras_pg2.tiny.evaluate`."""
    parser = argparse.ArgumentParser(
        prog="python -m keras_pg2.tiny.evaluate",
        description="Score a preset on held-out scenes of digits and shapes.",
    )
    parser.add_argument(
        "preset", nargs="?", default=TINY, help=f"name or path of a preset; default: {TINY}"
    )
    parser.add_argument("--num-examples", type=int, default=500, help="of each task; default: 500")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)

    model = PaliGemma2.from_preset(options.preset)
    metrics = evaluate(model, options.num_examples, options.seed)
    sys.stdout.write(f"{markdown_table(metrics)}\n")


if __name__ == "__main__":
    main()
