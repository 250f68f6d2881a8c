"""What can be asked about a scene, in PaliGemma's words, and the right answers.

Everything that has an order goes from left to right, so that there is one right answer.
"""

import io
import random
import re

import numpy as np
import sentencepiece

from keras_pg2.segmentation import location_tokens
from keras_pg2.tiny.scenes import (
    COLORS,
    DIGITS,
    IMAGE_SIZE,
    SHAPES,
    WORDS,
    Scene,
    SceneObject,
    Sprite,
)
from keras_pg2.tokenizer import Tokenizer

TASKS = ("ocr", "caption", "answer", "detect", "segment")
LANGUAGES = ("en", "de", "fr", "vi")

_ABSENT_SHARE = 0.015  # of the prompts to detect: the model must know that there may be nothing


def tasks(scene, rng, kinds=TASKS, codes=None):
    """Prompts about a scene and their right answers.

    Args:
        scene: Scene.
        rng: random.Random, chooses the question. The answer follows from scene and question.
        kinds: sequence of what to ask: one of `TASKS`, alone or with a choice: "caption de", one
            of `LANGUAGES`; "answer sum", one of `QUESTIONS` or `HELD_BACK_QUESTIONS`; "detect
            star" or "segment 7", a name.
        codes: int (number of sprites, 16), see `SceneRenderer.segment_codes`, for "segment".

    Returns:
        list of (prompt, suffix), both str. A kind that does not fit the scene, as "ocr" without
        text, is left out.

    Raises:
        ValueError: if a kind is unknown, or "segment" is asked for without `codes`.

    Example:
        >>> tasks(scene, random.Random(0), ["ocr", "answer color"])
        [('ocr', '307'), ('answer en what color is the star?', 'red')]
    """
    pairs = []
    for kind in kinds:
        task, _, choice = kind.partition(" ")
        if task == "ocr" and not choice:
            pair = _ocr(scene)
        elif task == "caption" and choice in ("", *LANGUAGES):
            language = choice or rng.choice(LANGUAGES)
            pair = f"caption {language}", caption(scene.objects, language)
        elif task == "answer":
            pair = _answer(scene, rng, choice)
        elif task == "detect":
            pair = _detect(scene, rng, choice)
        elif task == "segment" and codes is not None:
            pair = _segment(scene, rng, choice, codes)
        else:
            raise ValueError(
                f"Each of `kinds` must be one of {TASKS}, alone or with a choice; 'segment' needs "
                f"`codes`. Received: {kind!r}"
            )
        if pair is not None:
            pairs.append(pair)
    return pairs


def _locations(item):
    return location_tokens(item.box, IMAGE_SIZE, IMAGE_SIZE)


def _texts(scene):
    return [item for item in scene.objects if item.kind in ("digit", "word")]


def _of_kind(scene, kind):
    return [item for item in scene.objects if item.kind == kind]


def _things(scene):
    """What has a name of its own: digits and shapes."""
    return [item for item in scene.objects if item.kind != "word"]


def _unique(items, scene, attribute):
    """Those that share the attribute with nothing else in the scene."""
    values = [getattr(item, attribute) for item in scene.objects]
    return [item for item in items if values.count(getattr(item, attribute)) == 1]


def _ocr(scene):
    texts = _texts(scene)
    return ("ocr", "".join(item.name for item in texts)) if texts else None


# Captions -----------------------------------------------------------------------------------

_AND = {"en": " and ", "de": " und ", "fr": " et ", "vi": " và "}
_GERMAN_SHAPES = {  # article, ending of the adjective, noun
    "circle": ("ein", "er", "Kreis"),
    "square": ("ein", "es", "Quadrat"),
    "triangle": ("ein", "es", "Dreieck"),
    "star": ("ein", "er", "Stern"),
    "heart": ("ein", "es", "Herz"),
    "cross": ("ein", "es", "Kreuz"),
    "moon": ("ein", "er", "Mond"),
}
_GERMAN_COLORS = {
    "red": "rot",
    "green": "grün",
    "blue": "blau",
    "yellow": "gelb",
    "orange": "orange",
    "purple": "violett",
    "cyan": "türkis",
    "pink": "rosa",
}
_GERMAN_UNDECLINED = ("orange", "türkis", "rosa")
_FRENCH_SHAPES = {
    "circle": "un cercle",
    "square": "un carré",
    "triangle": "un triangle",
    "star": "une étoile",
    "heart": "un cœur",
    "cross": "une croix",
    "moon": "une lune",
}
_FRENCH_COLORS = {  # masculine, feminine
    "red": ("rouge", "rouge"),
    "green": ("vert", "verte"),
    "blue": ("bleu", "bleue"),
    "yellow": ("jaune", "jaune"),
    "orange": ("orange", "orange"),
    "purple": ("violet", "violette"),
    "cyan": ("turquoise", "turquoise"),
    "pink": ("rose", "rose"),
}
_VIETNAMESE_SHAPES = {
    "circle": "một hình tròn",
    "square": "một hình vuông",
    "triangle": "một hình tam giác",
    "star": "một ngôi sao",
    "heart": "một trái tim",
    "cross": "một hình chữ thập",
    "moon": "một mặt trăng",
}
_VIETNAMESE_COLORS = {
    "red": "đỏ",
    "green": "xanh lá",
    "blue": "xanh dương",
    "yellow": "vàng",
    "orange": "cam",
    "purple": "tím",
    "cyan": "xanh ngọc",
    "pink": "hồng",
}


def caption(objects, language):
    """What is to be seen, from left to right.

    Args:
        objects: sequence of SceneObject, at least one.
        language: str, one of `LANGUAGES`.

    Returns:
        str, such as "a red 5, an orange star and a blue heart".
    """
    describe = {"en": _english, "de": _german, "fr": _french, "vi": _vietnamese}[language]
    *phrases, last = [describe(item) for item in objects]
    return ", ".join(phrases) + _AND[language] + last if phrases else last


def _english(item):
    if item.kind == "word":
        return f"the word {item.name} in {item.color}"
    return f"{_article(item.color)} {item.color} {item.name}"


def _article(word):
    return "an" if word[0] in "aeiou8" else "a"


def _german(item):
    color = _GERMAN_COLORS[item.color]
    if item.kind == "word":
        return f"das Wort {item.name} in {color.capitalize()}"
    article, ending, noun = _GERMAN_SHAPES.get(item.name, ("eine", "e", item.name))  # die Fünf
    return f"{article} {color if color in _GERMAN_UNDECLINED else color + ending} {noun}"


def _french(item):
    masculine, feminine = _FRENCH_COLORS[item.color]
    if item.kind == "word":
        return f"le mot {item.name} en {masculine}"
    noun = _FRENCH_SHAPES.get(item.name, f"un {item.name}")
    return f"{noun} {feminine if noun.startswith('une ') else masculine}"


def _vietnamese(item):
    color = _VIETNAMESE_COLORS[item.color]
    if item.kind == "word":
        return f"từ {item.name} màu {color}"
    return f"{_VIETNAMESE_SHAPES.get(item.name, f'một số {item.name}')} màu {color}"


# Questions ----------------------------------------------------------------------------------


def _answer(scene, rng, choice):
    questions = QUESTIONS | HELD_BACK_QUESTIONS
    if choice and choice not in questions:
        raise ValueError(f"A question must be one of {list(questions)}. Received: {choice!r}")
    for name in [choice] if choice else rng.sample(list(QUESTIONS), len(QUESTIONS)):
        if pair := questions[name](scene, rng):
            question, answer = pair
            return f"answer en {question}", answer
    return None


def _count(scene, rng):
    nouns = {"digits": ["digit"], "shapes": ["shape"], "objects": ["digit", "shape", "word"]}
    noun = rng.choice(list(nouns))
    count = sum(item.kind in nouns[noun] for item in scene.objects)
    return f"how many {noun} are there?", str(count)


def _count_shape(scene, rng):
    shapes = _of_kind(scene, "shape")
    name = rng.choice(shapes).name if shapes and rng.random() < 0.7 else rng.choice(SHAPES)
    plural = f"{name}es" if name.endswith("s") else f"{name}s"
    return f"how many {plural} are there?", str(sum(item.name == name for item in scene.objects))


def _count_color(scene, rng):
    if rng.random() < 0.7:
        color = rng.choice(scene.objects).color
    else:
        color = rng.choice(list(COLORS))
    count = sum(item.color == color for item in scene.objects)
    return f"how many {color} objects are there?", str(count)


def _color(scene, rng):
    if items := _unique(scene.objects, scene, "name"):
        item = rng.choice(items)
        name = "word" if item.kind == "word" else item.name
        return f"what color is the {name}?", item.color
    return None


def _name(scene, rng):
    if items := _unique(_things(scene), scene, "color"):
        item = rng.choice(items)
        return f"what is {item.color}?", item.name
    return None


def _exists(scene, rng):
    present = [item.name for item in _things(scene)]
    absent = [name for name in (*DIGITS, *SHAPES) if name not in present]
    is_there = bool(present) and rng.random() < 0.5
    name = rng.choice(present if is_there else absent)
    return f"is there {_article(name)} {name}?", "yes" if is_there else "no"


def _digit_at(place, key, last=False, least_gap=0):
    """A question for the digit at one end of the scene, by twice the centre of its box."""

    def question(scene, rng):
        digits = sorted(_of_kind(scene, "digit"), key=key, reverse=last)
        if len(digits) < 2 or abs(key(digits[0]) - key(digits[1])) < 2 * least_gap:
            return None
        return f"which digit is {place}?", digits[0].name

    return question


def _across(item):
    return item.box[0] + item.box[2]


def _down(item):
    return item.box[1] + item.box[3]


def _sum(scene, rng):
    digits = _of_kind(scene, "digit")
    if len(digits) < 2:
        return None
    return "what is the sum of the digits?", str(sum(int(item.name) for item in digits))


QUESTIONS = {  # name to function: Scene, random.Random -> (question, answer) or None
    "count": _count,
    "count shape": _count_shape,
    "count color": _count_color,
    "color": _color,
    "name": _name,
    "exists": _exists,
    "left-most": _digit_at("left-most", _across),
    "right-most": _digit_at("right-most", _across, last=True),
    "sum": _sum,
}
# The preset never meets these, nor the shape `scenes.HELD_BACK_SHAPE`: they are left for tests of
# transfer. All orders it knows go from left to right; a model that takes "top-most" for one of
# them is right once in n digits (0.36 on average), as by chance. But what the answer takes is
# there to be found: the digits, and their heights, which it detects.
HELD_BACK_QUESTIONS = {
    "top-most": _digit_at("top-most", _down, least_gap=6),
    "bottom-most": _digit_at("bottom-most", _down, last=True, least_gap=6),
}


# Boxes and masks ----------------------------------------------------------------------------


def _detect(scene, rng, name):
    things = _things(scene)
    if name:
        things = [item for item in things if item.name == name]
    if not things:
        return None
    if name:
        return f"detect {name}", _boxes(things)
    present = [item.name for item in things]
    if rng.random() < _ABSENT_SHARE:
        absent = [name for name in (*DIGITS, *SHAPES) if name not in present]
        return f"detect {rng.choice(absent)}", ""
    first, second = rng.choice(things), rng.choice(things)
    way = rng.random()
    if way < 0.15:
        label = f"{first.color} {first.name}"
        found = [item for item in things if (item.color, item.name) == (first.color, first.name)]
        return f"detect {label}", _boxes(found, label)
    if way < 0.3:
        found = _of_kind(scene, first.kind)
        return f"detect {first.kind}", _boxes(found, first.kind)
    names = [first.name]
    if way < 0.55 and second.name != first.name:
        names.append(second.name)
    return f"detect {' ; '.join(names)}", _boxes(item for item in things if item.name in names)


def _boxes(items, label=None):
    return " ; ".join(f"{_locations(item)} {label or item.name}" for item in items)


def _segment(scene, rng, name, codes):
    items = _unique(_things(scene), scene, "name")
    items = [item for item in items if item.name == name] if name else items
    if not items:
        return None
    item = rng.choice(items)
    segments = "".join(f"<seg{code:03d}>" for code in codes[item.sprite.id])
    return f"segment {item.name}", f"{_locations(item)}{segments} {item.name}"


# Tokenizer ----------------------------------------------------------------------------------


def train_tokenizer(path, vocab_size=640):
    """Trains the tokenizer on texts of all tasks, and writes it: the same one each time.

    It is of Gemma's kind: byte-pair encoding with one token per digit, bytes for letters that it
    does not know, and text kept as it is. Location and segment tokens follow the last piece.

    Args:
        path: path of the `tokenizer.model` to write.
        vocab_size: int, number of pieces, 256 of them bytes. With 640 nearly every word of the
            tasks is one token; with 512 captions are up to twice as long.

    Returns:
        Tokenizer.

    Example:
        >>> tokenizer = train_tokenizer("tokenizer.model")
        >>> tokenizer.vocab_size
        1792
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_tokenizer_texts()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=["\n"],
        split_digits=True,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    with open(path, "wb") as file:
        file.write(model.getvalue())
    return Tokenizer(model.getvalue())


def _tokenizer_texts(num_scenes=4_000):
    """list of str: prompts and suffixes, cut at location and segment tokens as `Tokenizer` does."""
    rng = random.Random(0)
    captions = [f"caption {language}" for language in LANGUAGES]
    kinds = ["ocr", *captions, *["answer"] * 5, "detect", "detect", "segment"]
    texts = []
    for _ in range(num_scenes):
        scene = _scene_without_image(rng)
        for pair in tasks(scene, rng, kinds, codes=np.zeros((1, 16), int)):
            for text in pair:
                texts += filter(None, re.split(r"<\w+>", text))
    return texts


def _scene_without_image(rng):
    if rng.random() < 0.02:
        kinds = ["word"]
    else:
        kinds = rng.choices(["digit", "shape"], k=rng.randint(1, 4))
    names = {"digit": DIGITS, "shape": SHAPES, "word": WORDS}
    objects = [
        SceneObject(
            Sprite(0, kind, rng.choice(names[kind]), None), rng.choice(list(COLORS)), (0, 0, 1, 1)
        )
        for kind in kinds
    ]
    return Scene(None, tuple(objects))
