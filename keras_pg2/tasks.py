"""What PaliGemma is asked in words of its training, and what its answers say about an image.

A box is `(x1, y1, x2, y2)` in pixels of the image as it was before it was squashed, half-open:
it ends behind its last pixel, see `segmentation.py`. In texts the order is y1 x1 y2 x2.
"""

import collections.abc
import dataclasses
import itertools
import logging
import re

import numpy as np

from keras_pg2.generation import Grammar
from keras_pg2.segmentation import NUM_CODES, check_area, location_tokens, mask_from_codes
from keras_pg2.tokenizer import EOS_ID, NUM_LOCATIONS, NUM_SEGMENTS

_LOG = logging.getLogger(__name__)
CAPTION_STYLES = {"short": "cap", "coco": "caption", "detailed": "describe"}
MAX_OBJECT_TOKENS = 256  # about 35 boxes, or 10 masks
_MAX_LONG_TOKENS = 128  # of texts in images, and of detailed captions

_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?")
_OBJECT = re.compile(r"((?:<loc[0-9]{4}>\s*)+)((?:<seg[0-9]{3}>\s*)*)([^<;]*)")
_SAME_OBJECT = 0.8  # least IoU of two boxes with one label that show one object


# Prompts ------------------------------------------------------------------------------------


def caption_prompt(lang="en", style="coco"):
    """The prefix that asks for a caption; see `PaliGemma2.caption`."""
    if style not in list(CAPTION_STYLES):  # which asks for no hash
        raise ValueError(f"`style` must be one of {list(CAPTION_STYLES)}. Received: {style!r}")
    return f"{CAPTION_STYLES[style]} {_checked_language(lang)}"


def answer_prompt(question, lang="en"):
    """The prefix that asks a question; see `PaliGemma2.answer`."""
    return f"answer {_checked_language(lang)} {_checked_text(question, 'questions')}"


def question_prompt(answer, lang="en"):
    """The prefix that asks for a question to an answer; see `PaliGemma2.ask`."""
    return f"question {_checked_language(lang)} {_checked_text(answer, 'answers')}"


def region_prompt(box, width, height):
    """The prefix that asks what is in a box; see `PaliGemma2.describe_region`."""
    try:
        x1, y1, x2, y2 = map(float, box)
        is_box = x1 < x2 and y1 < y2 and np.isfinite([x1, y1, x2, y2]).all()
    except (TypeError, ValueError):  # no numbers, or not 4
        is_box = False
    if not is_box:
        raise ValueError(
            "A box must be 4 numbers (x1, y1, x2, y2) in pixels with x1 < x2 and y1 < y2. "
            f"Received: {box}"
        )
    if not (x1 < width and y1 < height and x2 > 0 and y2 > 0):
        raise ValueError(
            f"A box must overlap its image of {width} × {height} pixels. Received: {box}"
        )
    check_area((x1, y1, x2, y2), width, height)
    return f"caption {location_tokens((x1, y1, x2, y2), width, height)}"


def list_of_things(things):
    """The names of things to look for.

    Args:
        things: str such as "cat" or "cat ; dog", or list of str.

    Returns:
        list of str.

    Raises:
        ValueError: if there is none, or one is no string, blank, or of several lines.
    """
    if isinstance(things, str):
        things = things.split(";")
    if isinstance(things, (list, tuple)):
        things = [_checked_text(thing, "things") for thing in things]
    if not isinstance(things, list) or not things or any(set(";<") & set(x) for x in things):
        raise ValueError(
            "`things` must be names such as 'cat', ['cat', 'dog'] or 'cat ; dog'. "
            f"Received: {things!r}"
        )
    return things


def longest_answer(prompt):
    """Options of `generate` for a prompt whose answers may be longer than most."""
    is_long = prompt.split()[:1] in (["ocr"], [CAPTION_STYLES["detailed"]])
    return {"max_new_tokens": _MAX_LONG_TOKENS} if is_long else {}


def _checked_language(lang):
    if not isinstance(lang, str) or not _LANGUAGE.fullmatch(lang):
        raise ValueError(
            f"`lang` must be the code of a language, such as 'en' or 'de'. Received: lang={lang!r}"
        )
    return lang


def _checked_text(text, name):
    if not isinstance(text, str) or not text.strip() or "\n" in text.strip():
        raise ValueError(
            f"`{name}` must be one line of text each, and not blank. Received: {text!r}"
        )
    return text.strip()


# Answers ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object in an image.

    Attributes:
        label: str, what it is; "" if the model did not say.
        box: tuple of 4 float, (x1, y1, x2, y2) in pixels.
        score: float in [0, 1], the geometric mean of the probabilities of its tokens; or None if
            they are not known.
        mask: bool (height, width), the pixels of it; or None.
        text: str, what the model said.
    """

    label: str
    box: tuple
    score: float | None = None
    mask: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    text: str = dataclasses.field(default="", repr=False)

    def to_dict(self):
        """A dict for JSON. A mask is in COCO's run-length encoding, column by column."""
        box = [round(place, 2) for place in self.box]
        result = {"label": self.label, "box": box, "score": self.score}
        if self.mask is not None:
            result["mask"] = _run_lengths(self.mask)
        return {**result, "text": self.text}


@dataclasses.dataclass(frozen=True)
class Detections(collections.abc.Sequence):
    """The objects found in an image: a sequence of `Detection`, whose slices are Detections too.

    Attributes:
        items: tuple of Detection, in the order of the model.
        width, height: int, of the image in pixels.
        text: str, the whole answer of the model.

    Example:
        >>> found = model.detect("cat.jpg", "cat ; sofa")
        >>> [(one.label, one.box, one.score) for one in found]
        [('cat', (31.2, 14.0, 402.7, 330.5), 0.93)]
    """

    items: tuple
    width: int
    height: int
    text: str = dataclasses.field(default="", repr=False)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        items = self.items[index]
        return dataclasses.replace(self, items=items) if isinstance(index, slice) else items

    def to_dict(self):
        """A dict for JSON: "width", "height", "detections" (see `Detection.to_dict`), "text"."""
        return {
            "width": self.width,
            "height": self.height,
            "detections": [item.to_dict() for item in self.items],
            "text": self.text,
        }

    def to_coco(self, image_id, category_ids):
        """Annotations as COCO's result files have them.

        Args:
            image_id: int, COCO's number of the image.
            category_ids: dict of label to COCO's number. Other labels are left out.

        Returns:
            list of dict with "image_id", "category_id", "bbox" (x, y, width, height), "score" (1
            if it is not known) and, of masks, "segmentation" (compressed run lengths).
        """
        annotations = []
        for item in self.items:
            if item.label not in category_ids:
                continue
            x1, y1, x2, y2 = map(float, item.box)
            annotation = {
                "image_id": image_id,
                "category_id": category_ids[item.label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": 1.0 if item.score is None else float(item.score),
            }
            if item.mask is not None:
                run_lengths = _run_lengths(item.mask)
                counts = _compressed(run_lengths["counts"])
                annotation["segmentation"] = {**run_lengths, "counts": counts}
            annotations.append(annotation)
        return annotations

    def to_supervision(self, names=None):
        """The objects as `supervision.Detections`, with labels in `data["class_name"]`.

        Args:
            names: list of str or None, all labels, whose places are the numbers of the classes.
                None for those of this image alone, in alphabetical order.

        Returns:
            supervision.Detections. Its masks are None if no object has one; beside others, an
            object without one has an empty mask.

        Raises:
            ImportError: if supervision is missing.
            ValueError: if `names` lacks a label.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("`to_supervision` needs `pip install supervision`.") from error
        if not self.items:
            return supervision.Detections.empty()
        labels = [item.label for item in self.items]
        names = sorted(set(labels)) if names is None else list(names)
        if missing := set(labels) - set(names):
            raise ValueError(f"`names` must have all labels. Missing: {sorted(missing)}")
        masks = None
        if any(item.mask is not None for item in self.items):
            empty = np.zeros((self.height, self.width), bool)
            masks = np.stack([empty if item.mask is None else item.mask for item in self.items])
        scores = [1.0 if item.score is None else item.score for item in self.items]
        return supervision.Detections(
            xyxy=np.array([item.box for item in self.items], "float32"),
            mask=masks,
            confidence=np.array(scores, "float32"),
            class_id=np.array([names.index(label) for label in labels]),
            data={"class_name": np.array(labels)},
        )


def _run_lengths(mask):
    """COCO's uncompressed run-length encoding of a bool array (height, width)."""
    values = np.concatenate([[False], mask.ravel(order="F"), [not mask[-1, -1]]])
    ends = np.flatnonzero(values[1:] != values[:-1])
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


def _compressed(counts):
    """COCO's string of run lengths: differences, 5 bits in a letter, lowest first."""
    letters = []
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        is_last = False
        while not is_last:
            bits, value = value & 31, value >> 5
            is_last = value == (-1 if bits & 16 else 0)
            letters.append(chr(48 + (bits if is_last else bits | 32)))
    return "".join(letters)


def parse_detections(text, width, height, codec=None):
    """The objects in an answer to `detect` or `segment`, which may be malformed.

    An object is four location tokens with a box that is not empty. All else is left out; nothing
    is made up: without a label the label is "", without exactly 16 segment tokens there is no
    mask. What is said twice (one label, boxes with an IoU of 0.8 or more) counts once.

    Args:
        text: str.
        width, height: int, of the image in pixels.
        codec: SegmentationCodec or None. Without it there are no masks.

    Returns:
        Detections, without scores.

    Example:
        >>> parse_detections("<loc0256><loc0000><loc0767><loc1023> cat ; dog", 200, 120).items
        (Detection(label='cat', box=(0.0, 30.029…, 200.0, 89.970…), score=None),)

    Source: big_vision `evaluators/proj/paligemma/transfers/segmentation.py`.
    """
    return _detections(text, width, height, codec)


def _detections(text, width, height, codec=None, score=None):
    """`parse_detections`, with `score`: start and end of an object in the text -> float."""
    found, codes = [], []
    for match in _OBJECT.finditer(text):
        places = [int(place) for place in re.findall(r"[0-9]{4}", match[1])]
        if len(places) != 4 or max(places) >= NUM_LOCATIONS:
            continue
        y1, x1, y2, x2 = (place / (NUM_LOCATIONS - 1) for place in places)
        if x1 >= x2 or y1 >= y2:
            continue
        detection = Detection(
            label=match[3].strip(),
            box=(x1 * width, y1 * height, x2 * width, y2 * height),
            score=None if score is None else score(match.start(), match.end()),
            text=match[0].strip(),
        )
        found.append(detection)
        segments = [int(code) for code in re.findall(r"[0-9]{3}", match[2])]
        is_mask = len(segments) == NUM_CODES and max(segments) < NUM_SEGMENTS
        codes.append(segments if is_mask else None)
    kept = _without_repetitions(found)
    found, codes = [found[i] for i in kept], [codes[i] for i in kept]
    with_mask = [i for i, code in enumerate(codes) if code is not None]
    if codec is not None and with_mask:
        masks = codec.decode(np.array([codes[i] for i in with_mask]))
        for i, mask in zip(with_mask, masks):
            mask = mask_from_codes(mask, found[i].box, width, height)
            found[i] = dataclasses.replace(found[i], mask=mask)
    return Detections(tuple(found), int(width), int(height), text)


def read_detections(generation, tokenizer, things, width, height, codec=None):
    """The objects in what `generate(details=True)` returns, with scores.

    Args:
        generation: Generation. If it ran out of tokens, the last object is cut off, unless its
            label is one of `things`.
        tokenizer: Tokenizer.
        things: list of str, the names asked for.
        width, height, codec: see `parse_detections`.

    Returns:
        Detections. The score of an object is the geometric mean of the probabilities of its
        tokens: locations, segments and label, without the separator.
    """
    score = None
    if generation.log_probs is not None:
        score = _span_scores(generation, tokenizer)
    found = _detections(generation.text, width, height, codec, score)
    # Before a stop string an answer is shorter than its tokens.
    is_stopped = tokenizer.decode(generation.token_ids) != generation.text
    if is_stopped or EOS_ID in generation.token_ids or not found.text.strip():
        return found
    if found.items and found.text.rstrip().endswith(found.items[-1].text):
        last = found.items[-1]
        if last.label in things and (codec is None or last.mask is not None):
            return found
        found = dataclasses.replace(found, items=found.items[:-1])
    _LOG.warning("An answer was cut off by `max_new_tokens`: %r", found.text)
    return found


def _span_scores(generation, tokenizer):
    """A function of start and end in the text: the geometric mean of its tokens' probabilities."""
    # Where the text of each token ends: location and segment tokens divide it into runs.
    extra = {*tokenizer.location_ids, *tokenizer.segment_ids}
    ends, length, run = [], 0, []
    for id in generation.token_ids.tolist():
        if id in extra:
            length += len(tokenizer.decode(run)) + len(tokenizer.decode([id]))
            run = []
            ends.append(length)
        else:
            run.append(id)
            ends.append(length + len(tokenizer.decode(run).rstrip("\ufffd")))
    spans = [*zip([0, *ends[:-1]], ends)]
    for i in reversed(range(len(spans) - 1)):
        if spans[i][0] >= spans[i][1]:  # the first bytes of a character belong to it
            spans[i] = spans[i + 1]
    log_probs = np.asarray(generation.log_probs, "float64")

    def score(start, end):
        inside = [
            i
            for i, (a, b) in enumerate(spans)
            if generation.text[max(a, start) : min(b, end)].strip()
        ]
        return float(np.exp(log_probs[inside].mean()))

    return score


def box_overlap(one, other):
    """Intersection over union of two boxes (x1, y1, x2, y2), in [0, 1]."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (one, other)]
    return width * height / (sum(areas) - width * height)


def _without_repetitions(found):
    """Indices of the objects, without those that another, likelier or earlier, says too."""
    order = sorted(range(len(found)), key=lambda i: -(found[i].score or 0))
    kept = []
    for i in order:
        if all(
            found[i].label != found[j].label
            or box_overlap(found[i].box, found[j].box) < _SAME_OBJECT
            for j in kept
        ):
            kept.append(i)
    return sorted(kept)


# Decoding that can only say well-formed things -----------------------------------------------


def detection_grammar(tokenizer, things, has_masks):
    """A grammar of answers to `detect` or `segment`.

    Each object has four locations with a box that is not empty, 16 segment tokens if
    `has_masks`, and one of the names asked for. There may be none.

    Args:
        tokenizer: Tokenizer.
        things: list of lists of str, the names, for each example.
        has_masks: bool.

    Returns:
        Grammar, with a start for each of `things`.

    Example:
        >>> grammar = detection_grammar(tokenizer, [["cat", "dog"]], has_masks=False)
        >>> model.generate("cat.jpg", "detect cat ; dog", grammar=grammar)
    """
    grammar = Grammar(tokenizer.vocab_size)
    # Nothing can begin at the last location: its end must lie behind it.
    location = grammar.add_class(tokenizer.location_ids[:-1])
    last_location = grammar.add_class(tokenizer.location_ids[-1:])
    segment = grammar.add_class(tokenizer.segment_ids)
    end = grammar.add_class([EOS_ID])
    known = {}
    for names in map(tuple, things):
        if names in known:
            grammar.starts.append(known[names])
            continue
        # Start, and after 1, 2, 3, 4 locations.
        states = [grammar.add_state() for _ in range(5)]
        known[names] = states[0]
        grammar.starts.append(states[0])
        for state, then in itertools.pairwise(states):
            grammar.allow(state, location, then)
        for state, then in itertools.pairwise(states[2:]):  # y2 and x2, two tokens after y1 and x1
            grammar.allow(state, last_location, then)
            grammar.must_grow.append(state)
        grammar.allow(states[0], end, states[0])
        state = states[4]
        for _ in range(NUM_CODES if has_masks else 0):
            state, then = grammar.add_state(), state
            grammar.allow(then, segment, state)
        for name in names:
            last = grammar.allow_tokens(state, tokenizer.encode(f" {name}"))
            grammar.allow(last, end, last)
            last = grammar.allow_tokens(state, tokenizer.encode(f" {name} ; "))
            grammar.allow(last, location, states[1])
    return grammar
