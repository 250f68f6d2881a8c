"""Scenes, tasks, tokenizer and evaluation of the tiny model."""

import random
import types

import numpy as np
import pytest

from keras_pg2.segmentation import location_tokens
from keras_pg2.tiny import scenes
from keras_pg2.tiny.evaluate import (
    evaluate,
    held_out_examples,
    markdown_table,
    parse_detections,
)
from keras_pg2.tiny.scenes import Scene, SceneObject, SceneRenderer, Sprite, dense_targets
from keras_pg2.tiny.tasks import (
    HELD_BACK_QUESTIONS,
    LANGUAGES,
    QUESTIONS,
    TASKS,
    caption,
    tasks,
    train_tokenizer,
)

ALL_KINDS = ("digit", "shape", "word")


@pytest.fixture(scope="module")
def renderer():
    """Of the held-out split, with words."""
    pytest.importorskip("sklearn")
    return SceneRenderer("test", ALL_KINDS, drawings=2)


@pytest.fixture(scope="module")
def some_scenes(renderer):
    rng = random.Random(0)
    return [renderer.scene(rng) for _ in range(200)]


@pytest.fixture(scope="module")
def tiny_tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def thing(name, color="red", box=(0, 0, 1, 1)):
    kind = "digit" if name.isdigit() else "shape" if name in (*scenes.SHAPES, "moon") else "word"
    height, width = box[3] - box[1], box[2] - box[0]
    return SceneObject(Sprite(0, kind, name, np.full((height, width), 255, "uint8")), color, box)


def scene_of(*things):
    return Scene(None, tuple(things))


# Scenes


def test_a_seed_gives_one_scene(renderer, some_scenes):
    again = SceneRenderer("test", ALL_KINDS, drawings=2)
    rng = random.Random(0)
    for expected in some_scenes[:20]:
        scene = again.scene(rng)
        np.testing.assert_array_equal(scene.image, expected.image)
        assert [item.box for item in scene.objects] == [item.box for item in expected.objects]
    other = SceneRenderer("test", ("shape",), seed=1).scene(random.Random(0))
    assert not np.array_equal(other.image, some_scenes[0].image)


def test_training_shows_no_held_out_scan(renderer):
    train = SceneRenderer("train", ("digit",), drawings=1)
    seen = {sprite.scan for sprite in train.sprites}
    held_out = {sprite.scan for sprite in renderer.sprites if sprite.kind == "digit"}
    assert seen == set(range(1437))
    assert held_out == set(range(1437, 1797))


def test_images(some_scenes):
    for scene in some_scenes:
        assert scene.image.shape == (112, 112, 3)
        assert scene.image.dtype == np.uint8
        assert scene.image.flags.c_contiguous
    corners = np.array([scene.image[0, 0].mean() for scene in some_scenes])
    assert (corners < 90).mean() > 0.3  # dark and light backgrounds
    assert (corners > 160).mean() > 0.3


def test_number_and_kinds_of_objects(some_scenes):
    counts = {len(scene.objects) for scene in some_scenes}
    assert counts == {1, 2, 3, 4}
    kinds = {frozenset(item.kind for item in scene.objects) for scene in some_scenes}
    assert {frozenset([kind]) for kind in ALL_KINDS} < kinds
    assert frozenset(["digit", "shape"]) in kinds
    names = {item.name for scene in some_scenes for item in scene.objects}
    assert names > {*scenes.DIGITS, *scenes.SHAPES}
    assert scenes.HELD_BACK_SHAPE not in names


def test_boxes_are_tight_and_apart(some_scenes):
    for scene in some_scenes:
        for item in scene.objects:
            mask = scene.mask(item)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            assert item.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        for i, one in enumerate(scene.objects):
            for other in scene.objects[i + 1 :]:
                gap_x = max(one.box[0], other.box[0]) - min(one.box[2], other.box[2])
                gap_y = max(one.box[1], other.box[1]) - min(one.box[3], other.box[3])
                assert max(gap_x, gap_y) >= 3
                assert other.box[0] + other.box[2] - one.box[0] - one.box[2] >= 12


def test_objects_have_their_colors(some_scenes):
    for scene in some_scenes:
        for item in scene.objects:
            core = scene.mask(item)
            core[item.box[1] : item.box[3], item.box[0] : item.box[2]] &= item.sprite.alpha == 255
            if core.any():
                difference = scene.image[core].mean(axis=0) - scenes.COLORS[item.color]
                assert np.abs(difference).max() < 16


def test_choosing_what_scenes_show(renderer):
    rng = random.Random(0)
    for _ in range(20):
        scene = renderer.scene(rng, content=("digit",), max_objects=2)
        assert {item.kind for item in scene.objects} == {"digit"}
        assert len(scene.objects) <= 2
        scene = renderer.scene(rng, content=("shape",), shapes=("moon",))
        assert {item.name for item in scene.objects} == {"moon"}
        assert renderer.scene(rng, content=("word",)).objects[0].kind == "word"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"split": "valid"}, "split='valid'"), ({"kinds": ("cat",)}, "cat"), ({"kinds": ()}, "some")],
)
def test_bad_renderer(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneRenderer(**arguments)


@pytest.mark.parametrize("options", [{"content": ("digit",)}, {"content": ()}, {"max_objects": 5}])
def test_bad_scene(options):
    renderer = SceneRenderer("test", ("shape",))
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*"):
        renderer.scene(random.Random(0), **options)


def test_segment_codes(renderer):
    def encode(masks):
        assert masks.shape[1:] == (64, 64)
        assert masks.dtype == np.float32
        assert 0 <= masks.min() < 0.01 < 0.99 < masks.max() <= 1
        return np.tile(masks.mean(axis=(1, 2))[:, None] * 128, 16).astype(int)

    codes = renderer.segment_codes(encode)
    assert codes.shape == (len(renderer.sprites), 16)
    filled = [sprite.mask.mean() * 128 for sprite in renderer.sprites]
    np.testing.assert_allclose(codes[:, 0], filled, atol=3)


# Dense targets


def test_dense_targets():
    scene = scene_of(thing("7", "green", (14, 28, 42, 56)), thing("star", "pink", (60, 0, 70, 14)))
    targets = dense_targets(scene)
    expected = np.zeros((8, 8), int)
    expected[2:4, 1:3] = scenes.CLASSES.index("7")
    expected[0, 4] = scenes.CLASSES.index("star")  # 10 of its 14 columns
    assert targets.classes.tolist() == expected.tolist()
    colors = list(scenes.COLORS)
    assert targets.colors[2, 1] == colors.index("green")
    assert targets.colors[0, 4] == colors.index("pink")
    assert targets.colors[7, 7] == 0
    # The centre (21, 35) is 7 px below the top and 7 px right of the left side.
    np.testing.assert_allclose(targets.distances[2, 1] * 112, [7, 7, 21, 21], rtol=1e-6)
    np.testing.assert_allclose(targets.distances[0, 4] * 112, [7, 3, 7, 7], rtol=1e-6)
    assert not targets.distances[7, 7].any()


def test_dense_targets_of_letters():
    alpha = np.full((14, 42), 255, "uint8")
    sprite = Sprite(0, "word", "cat", alpha, letter_edges=(-1.0, 14.0, 28.0, 42.0))
    scene = scene_of(SceneObject(sprite, "red", (28, 14, 70, 28)))
    row = dense_targets(scene).classes[1]
    assert [scenes.CLASSES[id] for id in row] == ["", "", "c", "a", "t", "", "", ""]


def test_every_object_has_a_patch(some_scenes):
    for scene in some_scenes:
        targets = dense_targets(scene)
        classes = set(targets.classes.ravel().tolist()) - {0}
        names = [item.name for item in scene.objects if item.kind != "word"]
        assert classes >= {scenes.CLASSES.index(name) for name in names}
        is_background = targets.classes == 0
        assert not targets.colors[is_background].any()


# Captions


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("en", "a red 8, an orange star and a blue heart"),
        ("de", "eine rote 8, ein orange Stern und ein blaues Herz"),
        ("fr", "un 8 rouge, une étoile orange et un cœur bleu"),
        ("vi", "một số 8 màu đỏ, một ngôi sao màu cam và một trái tim màu xanh dương"),
    ],
)
def test_captions(language, expected):
    objects = [thing("8"), thing("star", "orange"), thing("heart", "blue")]
    assert caption(objects, language) == expected


def test_german_endings():
    def phrase(name, color):
        return caption([thing(name, color)], "de")

    assert phrase("3", "purple") == "eine violette 3"
    assert phrase("circle", "green") == "ein grüner Kreis"
    assert phrase("star", "yellow") == "ein gelber Stern"
    assert phrase("moon", "blue") == "ein blauer Mond"
    assert phrase("square", "red") == "ein rotes Quadrat"
    assert phrase("triangle", "purple") == "ein violettes Dreieck"
    assert phrase("cross", "green") == "ein grünes Kreuz"
    assert phrase("cross", "cyan") == "ein türkis Kreuz"
    assert phrase("circle", "pink") == "ein rosa Kreis"
    assert phrase("0", "orange") == "eine orange 0"
    assert phrase("fish", "green") == "das Wort fish in Grün"


def test_french_agreement():
    def phrase(name, color):
        return caption([thing(name, color)], "fr")

    assert phrase("star", "green") == "une étoile verte"
    assert phrase("cross", "purple") == "une croix violette"
    assert phrase("moon", "blue") == "une lune bleue"
    assert phrase("circle", "green") == "un cercle vert"
    assert phrase("square", "purple") == "un carré violet"
    assert phrase("triangle", "blue") == "un triangle bleu"
    assert phrase("heart", "pink") == "un cœur rose"
    assert phrase("cross", "cyan") == "une croix turquoise"
    assert phrase("5", "yellow") == "un 5 jaune"
    assert phrase("fish", "green") == "le mot fish en vert"


def test_vietnamese_and_english_words():
    assert caption([thing("square", "cyan")], "vi") == "một hình vuông màu xanh ngọc"
    assert caption([thing("fish", "green")], "vi") == "từ fish màu xanh lá"
    assert caption([thing("fish", "green")], "en") == "the word fish in green"


# Tasks


def test_answers():
    scene = scene_of(
        thing("8", "red", (0, 60, 10, 80)),
        thing("star", "pink", (20, 0, 30, 10)),
        thing("3", "red", (40, 0, 50, 20)),
        thing("star", "cyan", (60, 0, 70, 10)),
    )
    answers = {name: set() for name in [*QUESTIONS, *HELD_BACK_QUESTIONS]}
    rng = random.Random(0)
    for _ in range(100):
        for name in answers:
            ((prompt, suffix),) = tasks(scene, rng, [f"answer {name}"])
            answers[name].add((prompt.removeprefix("answer en "), suffix))
    assert answers["count"] == {
        ("how many digits are there?", "2"),
        ("how many shapes are there?", "2"),
        ("how many objects are there?", "4"),
    }
    assert answers["count shape"] > {
        ("how many stars are there?", "2"),
        ("how many crosses are there?", "0"),
    }
    assert answers["count color"] > {
        ("how many red objects are there?", "2"),
        ("how many blue objects are there?", "0"),
    }
    assert answers["color"] == {("what color is the 8?", "red"), ("what color is the 3?", "red")}
    assert answers["name"] == {("what is pink?", "star"), ("what is cyan?", "star")}
    assert answers["exists"] > {
        ("is there an 8?", "yes"),
        ("is there a star?", "yes"),
        ("is there a 5?", "no"),
        ("is there a heart?", "no"),
    }
    assert answers["left-most"] == {("which digit is left-most?", "8")}
    assert answers["right-most"] == {("which digit is right-most?", "3")}
    assert answers["sum"] == {("what is the sum of the digits?", "11")}
    assert answers["top-most"] == {("which digit is top-most?", "3")}
    assert answers["bottom-most"] == {("which digit is bottom-most?", "8")}


def test_ocr_and_boxes():
    scene = scene_of(
        thing("4", "red", (0, 0, 56, 112)),
        thing("2", "blue", (28, 14, 84, 98)),
        thing("4", "pink", (60, 0, 112, 56)),
        thing("star", "pink", (80, 60, 112, 112)),
    )
    first, second = "<loc0000><loc0000><loc1023><loc0512>", "<loc0128><loc0256><loc0895><loc0767>"
    third, star = "<loc0000><loc0548><loc0512><loc1023>", "<loc0548><loc0731><loc1023><loc1023>"
    codes = np.arange(16)[None]
    assert tasks(scene, random.Random(0), ["ocr", "detect 4", "segment 2", "segment 4"], codes) == [
        ("ocr", "424"),
        ("detect 4", f"{first} 4 ; {third} 4"),
        ("segment 2", second + "".join(f"<seg{i:03d}>" for i in range(16)) + " 2"),
    ]
    rng = random.Random(0)
    pairs = dict(pair for _ in range(400) for pair in tasks(scene, rng, ["detect"]))
    assert pairs["detect 2"] == f"{second} 2"
    assert pairs["detect pink 4"] == f"{third} pink 4"
    assert pairs["detect digit"] == f"{first} digit ; {second} digit ; {third} digit"
    assert pairs["detect shape"] == f"{star} shape"
    assert pairs["detect star ; 2"] == pairs["detect 2 ; star"] == f"{second} 2 ; {star} star"
    assert any(not suffix for suffix in pairs.values())


def test_few_prompts_detect_nothing(some_scenes):
    rng = random.Random(0)
    pairs = [
        pair for _ in range(20) for scene in some_scenes for pair in tasks(scene, rng, ["detect"])
    ]
    assert 0.005 < np.mean([not suffix for _, suffix in pairs]) < 0.02
    for prompt, suffix in pairs:
        assert bool(parse_detections(suffix, 112, 112)) == bool(suffix), prompt


def test_held_back_tasks_do_not_come_by_themselves(some_scenes):
    rng = random.Random(0)
    texts = [
        text
        for scene in some_scenes
        for pair in tasks(scene, rng, ["answer", "caption", "detect"] * 3)
        for text in pair
    ]
    assert not any("moon" in text or "top-most" in text or "bottom-most" in text for text in texts)


def test_what_does_not_fit_is_left_out():
    scene = scene_of(thing("star"))
    kinds = ["ocr", "answer sum", "answer top-most", "detect 5", "segment 5", "caption en"]
    pairs = tasks(scene, random.Random(0), kinds, np.zeros((1, 16), int))
    assert pairs == [("caption en", "a red star")]


@pytest.mark.parametrize(
    "kind", ["read", "ocr fast", "caption es", "answer why", "segment", "segment star"]
)
def test_unknown_kinds(kind):
    with pytest.raises(ValueError, match=kind.split()[-1]):
        tasks(scene_of(thing("star")), random.Random(0), [kind])


# Tokenizer


def test_tokenizer_round_trip(tiny_tokenizer, some_scenes):
    assert tiny_tokenizer.vocab_size == 640 + 1024 + 128
    assert tiny_tokenizer.encode("\n") == [4]
    rng = random.Random(0)
    kinds = [*TASKS, *[f"caption {language}" for language in LANGUAGES], "answer top-most"]
    codes = np.zeros((10**4, 16), int)
    longest = [0, 0]
    for scene in some_scenes:
        for pair in tasks(scene, rng, kinds, codes):
            for i, text in enumerate(pair):
                ids = tiny_tokenizer.encode(text)
                assert tiny_tokenizer.decode(ids) == text
                assert 3 not in ids
                longest[i] = max(longest[i], len(ids))
    assert longest[0] <= 18  # the held-back question is spelled out
    assert longest[1] <= 31
    assert len(tiny_tokenizer.encode("731")) == 3


@pytest.mark.parametrize(
    "text",
    [
        "".join(map(chr, range(32, 127))),
        "äöüÄÖÜß àâæçéèêëîïôœùûüÿ ÀÂÆÇÉÈÊËÎÏÔŒÙÛÜŸ",
        "ăâđêôơư ắằẳẵặ ấầẩẫậ ếềểễệ ốồổỗộ ớờởỡợ ứừửữự ỳýỷỹỵ ĂÂĐÊÔƠƯ ẮẤẾỐỚỨÝ",
        "  two  spaces 你好 🙂",
    ],
)
def test_tokenizer_knows_every_letter(tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text)
    assert 3 not in ids
    assert tiny_tokenizer.decode(ids) == text


def test_tokenizer_is_the_same_each_time(tiny_tokenizer, tmp_path):
    path = tmp_path / "tokenizer.model"
    assert train_tokenizer(path).model == path.read_bytes() == tiny_tokenizer.model


# Evaluation


class FakeModel:
    """Answers as `answer(image, prompt)` does."""

    def __init__(self, answer, tokenizer, codec=None):
        self.answer = answer
        self.get_codec = lambda: codec
        self.preprocessor = types.SimpleNamespace(tokenizer=tokenizer)

    def generate(self, images, prompts, max_new_tokens, batch_size):
        return [self.answer(image, prompt) for image, prompt in zip(images, prompts, strict=True)]


KINDS = (*TASKS, "answer top-most")


@pytest.fixture(scope="module")
def truth(renderer):
    """The right answers to what `evaluate` asks; the codes of a sprite spell its id."""
    codes = np.zeros((len(renderer.sprites), 16), int)
    codes[:, 0], codes[:, 1] = np.divmod(np.arange(len(codes)), 128)
    return {
        (example.scene.image.tobytes(), example.prompt): example.suffix
        for kind in KINDS
        for example in held_out_examples(renderer, kind, 40, seed=5, codes=codes)
    }


@pytest.fixture(scope="module")
def codec(renderer):
    def decode(codes):
        assert codes.shape[1:] == (16,)
        sprites = [renderer.sprites[first * 128 + second] for first, second, *_ in codes]
        return np.stack([scenes._box_mask(sprite) - 0.5 for sprite in sprites])

    return types.SimpleNamespace(decode=decode)


def test_right_answers_score_one(renderer, truth, codec, tiny_tokenizer):
    model = FakeModel(lambda image, prompt: truth[image.tobytes(), prompt], tiny_tokenizer, codec)
    metrics = evaluate(model, 40, seed=5, renderer=renderer, kinds=KINDS)
    assert metrics.pop("segment/mask iou") > 0.97  # resized there and back
    assert set(metrics.values()) == {1.0}
    assert set(metrics) > {
        *("ocr/exact", "ocr/exact/2 digits", "caption/exact", "caption/exact/de"),
        *("caption/tokens", "caption/tokens/vi", "answer/exact", "answer/exact/sum"),
        *("detect/recall", "detect/precision", "detect/iou", "detect/all right"),
        *("segment/box iou", "answer top-most/exact"),
    }
    assert "| ocr/exact | 1.000 |" in markdown_table(metrics)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "nonsense",
        " ; ".join([location_tokens((0, 0, 1, 1), 112, 112) + " star"] * 2),
        "<loc0005>" * 9,
    ],
)
def test_wrong_answers_score_nothing(renderer, codec, tiny_tokenizer, answer):
    model = FakeModel(lambda image, prompt: answer, tiny_tokenizer, codec)
    metrics = evaluate(model, 40, seed=5, renderer=renderer)
    assert metrics.pop("detect/all right") <= 0.05  # there may be nothing to detect
    assert max(metrics.values()) < 0.03  # a token may be right by chance
    assert np.isfinite(list(metrics.values())).all()


def test_half_right_boxes(renderer, truth, codec, tiny_tokenizer):
    def answer(image, prompt):
        right = truth[image.tobytes(), prompt]
        if prompt.startswith("detect"):
            return f"{right} ; {location_tokens((0, 0, 5, 5), 112, 112)} 9"
        return right.replace("<seg000>", "")  # too few codes are no mask

    model = FakeModel(answer, tiny_tokenizer, codec)
    kinds = ("detect", "segment")
    metrics = evaluate(model, 40, seed=5, renderer=renderer, kinds=kinds)
    assert metrics["detect/recall"] == metrics["detect/iou"] == 1
    assert 0.4 < metrics["detect/precision"] < 0.8
    assert metrics["detect/all right"] == 0
    assert metrics["segment/box iou"] == 1
    assert metrics["segment/mask iou"] == 0


@pytest.mark.slow
def test_a_model_is_evaluated(model, renderer):
    metrics = evaluate(model, 4, renderer=renderer, kinds=("ocr", "detect"), batch_size=4)
    assert metrics["ocr/exact"] == metrics["detect/recall"] == 0  # its weights are random


def test_evaluation_is_of_held_out_scans(tiny_tokenizer):
    renderer = SceneRenderer("train", ("shape",))
    with pytest.raises(ValueError, match="'train'"):
        evaluate(FakeModel(None, tiny_tokenizer), renderer=renderer)


def test_kinds_that_never_fit():
    renderer = SceneRenderer("test", ("shape",))
    with pytest.raises(ValueError, match="kind='detect moon'"):
        held_out_examples(renderer, "detect moon", 1, seed=0)
    (example,) = held_out_examples(renderer, "detect moon", 1, seed=0, shapes=("moon", "star"))
    assert parse_detections(example.suffix, 112, 112)[0].label == "moon"
