import json
import re
import sys
import types

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from PIL import Image

import keras_pg2
from keras_pg2 import Detection, Detections, Generation, _backend, parse_detections, tasks
from keras_pg2.preprocessing import image_size
from keras_pg2.tasks import read_detections
from keras_pg2.tiny import train
from tests.conftest import logits_of
from tests.test_data import COMPRESSED, COMPRESSED_STRIPES, MASK, STRIPES

WIDTH, HEIGHT = 1023 * 2, 1023  # so that places in the image are whole numbers
CAT = "<loc0100><loc0200><loc0300><loc0400>"
CAT_BOX = (400, 100, 800, 300)
ARABIC = "<loc\u0661\u0662\u0663\u0664>"  # digits to `\d`, but no location
CODES = "".join(f"<seg{i:03d}>" for i in range(16))


@pytest.fixture(scope="module")
def codec():
    return keras_pg2.SegmentationCodec.from_file(train.CODEC)


def parsed(text, codec=None):
    return parse_detections(text, WIDTH, HEIGHT, codec)


# Prompts


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (tasks.caption_prompt(), "caption en"),
        (tasks.caption_prompt("de", "short"), "cap de"),
        (tasks.caption_prompt("zh-TW", "detailed"), "describe zh-TW"),
        (tasks.answer_prompt(" what is it? "), "answer en what is it?"),
        (tasks.question_prompt("two", "fr"), "question fr two"),
        (
            tasks.region_prompt((400, 100, 800, 300), WIDTH, HEIGHT),
            "caption <loc0100><loc0200><loc0300><loc0400>",
        ),
    ],
)
def test_prompts(prompt, expected):
    assert prompt == expected


@pytest.mark.parametrize(
    ("things", "expected"),
    [
        ("cat", ["cat"]),
        ("cat ; red dog", ["cat", "red dog"]),
        ("cat;dog", ["cat", "dog"]),
        (["cat", " dog"], ["cat", "dog"]),
    ],
)
def test_lists_of_things(things, expected):
    assert tasks.list_of_things(things) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks.caption_prompt("english"), "lang='english'"),
        (lambda: tasks.caption_prompt(3), "lang=3"),
        (lambda: tasks.caption_prompt("en", "long"), "'long'"),
        (lambda: tasks.answer_prompt(" "), "`questions`"),
        (lambda: tasks.answer_prompt("one\ntwo"), "one line"),
        (lambda: tasks.question_prompt(2), "`answers`"),
        (lambda: tasks.list_of_things(""), "`things`"),
        (lambda: tasks.list_of_things("cat ; "), "`things`"),
        (lambda: tasks.list_of_things([]), "`things`"),
        (lambda: tasks.list_of_things(["cat;dog"]), "`things`"),
        (lambda: tasks.list_of_things([3]), "`things`"),
        (lambda: tasks.list_of_things(3), "`things`"),
        (lambda: tasks.list_of_things("<loc0001> cat"), "`things`"),
        (lambda: tasks.region_prompt((0, 0, float("inf"), 3), 10, 10), "4 numbers"),
        (lambda: tasks.region_prompt((1, 2, 1, 3), 10, 10), "x1 < x2"),
        (lambda: tasks.region_prompt((1, 2, 3), 10, 10), "4 numbers"),
        (lambda: tasks.region_prompt((1, 2, 3, [4, 5]), 10, 10), "4 numbers"),
        (lambda: tasks.region_prompt(("a", 2, 3, 4), 10, 10), "4 numbers"),
        (lambda: tasks.region_prompt(3, 10, 10), "4 numbers"),
        (lambda: tasks.region_prompt((11, 2, 13, 4), 10, 10), "overlap"),
        (lambda: tasks.region_prompt((50, 9, 50.02, 99), 100, 100), "location tokens"),
    ],
)
def test_prompts_of_bad_input(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# Parsing


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{CAT} cat", [("cat", CAT_BOX)]),
        (f"{CAT}cat", [("cat", CAT_BOX)]),
        (
            f"{CAT} a cat ; <loc0000><loc0000><loc1023><loc1023> dog",
            [("a cat", CAT_BOX), ("dog", (0, 0, WIDTH, HEIGHT))],
        ),
        (  # no separator
            f"{CAT} cat<loc0000><loc0000><loc1023><loc1023> dog",
            [("cat", CAT_BOX), ("dog", (0, 0, WIDTH, HEIGHT))],
        ),
        (CAT, [("", CAT_BOX)]),  # no label
        (f"{CAT} ; {CAT} cat", [("", CAT_BOX), ("cat", CAT_BOX)]),
        (f"{CAT} cat ; <loc0001><loc0002> dog", [("cat", CAT_BOX)]),  # cut short
        (f"cat ; {CAT}", [("", CAT_BOX)]),
        (f"{CAT} cat ; {CAT} cat", [("cat", CAT_BOX)]),  # said twice
        (f"{CAT} cat ; <loc0100><loc0200><loc0300><loc0402> cat", [("cat", CAT_BOX)]),
        (f"{CAT} {CODES} cat", [("cat", CAT_BOX)]),
        (f"{CODES} cat", []),
        ("<loc0100><loc0200><loc0100><loc0400> flat", []),
        ("<loc0300><loc0200><loc0100><loc0400> upside down", []),
        ("<loc0100><loc0400><loc0300><loc0200> mirrored", []),
        ("<loc0100><loc0200><loc0300> cat", []),
        (f"{CAT}<loc0500> cat", []),
        (f"{ARABIC * 4} cat", []),
        ("<loc0100><loc0200><loc0300><loc1024> beyond", []),
        ("<loc100><loc200><loc300><loc400> cat", []),
        ("a cat on a sofa", []),
        ("", []),
        (" ; ;; ", []),
    ],
)
def test_parse(text, expected):
    found = parsed(text)
    assert [item.label for item in found] == [label for label, _ in expected]
    for item, (_, box) in zip(found, expected):
        np.testing.assert_allclose(item.box, box)
    assert found.text == text
    assert (found.width, found.height) == (WIDTH, HEIGHT)


def test_two_of_a_kind_are_two():
    text = f"{CAT} cat ; <loc0100><loc0400><loc0300><loc0600> cat ; {CAT} dog"
    assert len(parsed(text)) == 3


@pytest.mark.parametrize(
    ("segments", "has_mask"),
    [
        (CODES, True),
        (CODES[:-8], False),
        (CODES + "<seg000>", False),
        ("", False),
        (CODES.replace("<seg015>", "<seg128>"), False),
    ],
)
def test_masks(codec, segments, has_mask):
    (found,) = parse_detections(f"{CAT}{segments} cat", 100, 50, codec)
    assert (found.mask is not None) == has_mask
    if has_mask:
        assert found.mask.shape == (50, 100)
        assert found.mask.dtype == bool
        expected = keras_pg2.segmentation.mask_from_codes(
            codec.decode(np.arange(16)[None])[0], found.box, 100, 50
        )
        np.testing.assert_array_equal(found.mask, expected)
        assert 0 < found.mask.sum() < 20 * 12


PIECES = [ARABIC, *(f"<loc{i:04d}>" for i in (0, 1, 500, 501, 1022, 1023, 1024, 9999))]
PIECES += [f"<seg{i:03d}>" for i in (0, 127, 128)] + [CAT, CODES, f"{CAT} cat", f"{CAT}{CODES} cat"]
PIECES += [" ; ", ";", " ", "\n", "cat", "dog", "<loc", ">", "<eos>", "é", "\0", "\ufffd", ""]


@pytest.mark.slow_if_compiled
@hypothesis.settings(max_examples=2000, deadline=None)
@hypothesis.given(strategies.lists(strategies.sampled_from(PIECES), max_size=30).map("".join))
def test_any_answer_is_read(text):
    found = parse_detections(text, 640, 480)
    assert len(found) <= text.count("<loc") // 4
    for item in found:
        x1, y1, x2, y2 = item.box
        assert 0 <= x1 < x2 <= 640
        assert 0 <= y1 < y2 <= 480
        # Box and label are what the text says, next to each other.
        places = (y1 / 480, x1 / 640, y2 / 480, x2 / 640)
        tokens = [f"<loc{round(place * 1023):04d}>" for place in places]
        assert re.search(r"\s*".join(tokens), item.text)
        assert item.text in text
        assert item.text.endswith(item.label)
        assert "<loc" not in item.label
        assert ";" not in item.label
    for one in found:
        for other in found:
            overlap = tasks.box_overlap(one.box, other.box)
            assert one is other or one.label != other.label or overlap < 0.8
    json.dumps(found.to_dict())
    sizes = map(np.int64, (found.width, found.height))
    assert json.dumps(parse_detections(text, *sizes).to_dict()) == json.dumps(found.to_dict())


@hypothesis.settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(strategies.data())
def test_any_tokens_are_read(tokenizer, data):
    """With locations that are spelled out, and pieces of characters, too."""
    ids = [*tokenizer.location_ids[::300], *tokenizer.segment_ids[:2], 1]
    for text in PIECES:
        ids += tokenizer.encode(text)
    token_ids = data.draw(strategies.lists(strategies.sampled_from(ids), min_size=1, max_size=40))
    spelled = data.draw(strategies.sampled_from(["", "<loc1024> ; ", "<loc0100>"]))
    token_ids = np.array([*map(int, tokenizer._pieces.encode(spelled)), *token_ids], "int32")
    answer = Generation(
        tokenizer.decode(token_ids), token_ids, np.full(len(token_ids), -0.5, "float32")
    )
    for item in read_detections(answer, tokenizer, ["cat"], 640, 480):
        np.testing.assert_allclose(item.score, np.exp(-0.5))


def test_a_score_is_of_its_own_tokens(tokenizer):
    """Locations that are none, and some that are spelled out, come before."""
    spelled = tokenizer._pieces.encode("<loc1024> ; <loc0100> ; ")
    token_ids = np.array([*spelled, *tokenizer.encode(f"{CAT} cat"), 1], "int32")
    log_probs = np.full(len(token_ids), -9, "float32")
    log_probs[len(spelled) : -1] = -0.25
    answer = Generation(tokenizer.decode(token_ids), token_ids, log_probs)
    (item,) = read_detections(answer, tokenizer, ["cat"], WIDTH, HEIGHT)
    np.testing.assert_allclose(item.score, np.exp(-0.25))


@pytest.mark.parametrize(
    ("text", "end", "labels"),
    [
        (f"{CAT} cat ; <loc0001><loc0001><loc0009><loc0009> red", [], ["cat"]),
        (f"{CAT} cat ; <loc0001><loc0001><loc0009><loc0009> red", [1], ["cat", "red"]),
        (f"{CAT} cat ; <loc0001><loc0001><loc0009><loc0009> red dog", [], ["cat", "red dog"]),
        (f"{CAT} cat ; <loc0001><loc0001>", [], ["cat"]),
        (f"{CAT} cat ;", [], ["cat"]),
        (f"{CAT}", [], []),
        ("<loc0001><loc0001>", [], []),
        ("", [], []),
    ],
)
def test_what_was_cut_off_is_left_out(tokenizer, caplog, text, end, labels):
    whole = f"{CAT} cat ; <loc0001><loc0001><loc0009><loc0009> red dog"
    token_ids = np.array([*tokenizer.encode(text), *end], "int32")
    answer = Generation(text, token_ids, np.zeros(len(token_ids), "float32"))
    found = read_detections(answer, tokenizer, ["cat", "red dog"], WIDTH, HEIGHT)
    assert [item.label for item in found] == labels
    assert len(caplog.records) == (text not in ("", whole) and not end)


def test_before_a_stop_string_nothing_is_cut_off(tokenizer, caplog):
    token_ids = np.array(tokenizer.encode(f"{CAT} tabby ; <loc0001>"), "int32")
    answer = Generation(f"{CAT} tabby", token_ids, np.zeros(len(token_ids), "float32"))
    (item,) = read_detections(answer, tokenizer, ["cat"], WIDTH, HEIGHT)
    assert item.label == "tabby"
    assert not caplog.records


@hypothesis.settings(max_examples=1000, deadline=None)
@hypothesis.given(strategies.text(max_size=60))
def test_any_text_is_read(text):
    assert len(parse_detections(text, 10, 10)) <= text.count("<loc") // 4


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    strategies.lists(
        strategies.tuples(
            strategies.lists(strategies.integers(0, 1023), min_size=4, max_size=4),
            strategies.sampled_from(["cat", "red dog", "8"]),
        ),
        max_size=6,
    )
)
def test_what_is_written_is_read(objects):
    boxes, labels = [], []
    for (a, b, c, d), label in objects:
        if a != b and c != d:
            boxes.append((2 * min(a, b), min(c, d), 2 * max(a, b), max(c, d)))
            labels.append(f"{label} {len(labels)}")
    text = keras_pg2.segmentation.encode_detection(boxes, labels, WIDTH, HEIGHT)
    found = parse_detections(text, WIDTH, HEIGHT)
    assert [item.label for item in found] == labels
    for item, box in zip(found, boxes):
        np.testing.assert_allclose(item.box, box)


# Scores


def generation(tokenizer, text, probabilities):
    token_ids = np.array([*tokenizer.encode(text), 1])
    log_probs = np.log(np.array(probabilities(len(token_ids)), "float32"))
    return Generation(text, token_ids, log_probs)


def test_scores_are_geometric_means(tokenizer):
    text = f"{CAT} cat ; <loc0000><loc0000><loc1023><loc1023> cat"
    num_label = len(tokenizer.encode(" cat"))
    assert tokenizer.decode(tokenizer.encode(" cat ; ")[num_label:]).strip() == ";"

    def probabilities(count):
        first = [0.5, 0.25, 0.5, 0.25, *[1.0] * num_label]
        separator = [0.001] * (len(tokenizer.encode(" cat ; ")) - num_label)
        second = [0.9] * (4 + num_label)
        return [*first, *separator, *second, 0.001]

    found = read_detections(generation(tokenizer, text, probabilities), tokenizer, ["cat"], 10, 10)
    expected = [0.125 ** (2 / (4 + num_label)), 0.9]
    np.testing.assert_allclose([item.score for item in found], expected, rtol=1e-5)


def test_a_score_counts_each_byte_of_a_character(tokenizer):
    text = f"{CAT} 猫"
    assert len(tokenizer.encode(text)) == 4 + 1 + 3  # locations, space, bytes

    def probabilities(count):
        return [0.5] * 4 + [0.001] + [0.25] * 3 + [0.001]

    (item,) = read_detections(generation(tokenizer, text, probabilities), tokenizer, [], 10, 10)
    np.testing.assert_allclose(item.score, (0.5**4 * 0.25**3) ** (1 / 7), rtol=1e-5)


def test_of_repetitions_the_likeliest_stays(tokenizer):
    text = f"{CAT} cat ; <loc0100><loc0200><loc0300><loc0402> cat"
    found = read_detections(
        generation(tokenizer, text, lambda n: np.linspace(0.1, 0.9, n)),
        tokenizer,
        ["cat"],
        WIDTH,
        HEIGHT,
    )
    (item,) = found
    np.testing.assert_allclose(item.box, (400, 100, 804, 300))


def test_without_probabilities_there_is_no_score(tokenizer):
    answer = Generation(f"{CAT} cat", np.array(tokenizer.encode(f"{CAT} cat")), None)
    (item,) = read_detections(answer, tokenizer, ["cat"], WIDTH, HEIGHT)
    assert item.score is None


# Results


@pytest.fixture
def detections():
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:5] = True
    return Detections(
        (
            Detection("cat", (2.0, 1.0, 5.0, 3.0), 0.5, mask, "text"),
            Detection("dog", (0.0, 0.0, 6.0, 4.0)),
        ),
        width=6,
        height=4,
        text="all",
    )


def test_detections_are_a_sequence(detections):
    assert len(detections) == 2
    assert detections[0].label == "cat"
    assert [item.label for item in detections] == ["cat", "dog"]


def test_json(detections):
    values = json.loads(json.dumps(detections.to_dict()))
    assert values["width"] == 6
    assert values["text"] == "all"
    cat, dog = values["detections"]
    assert cat["box"] == [2, 1, 5, 3]
    assert cat["mask"] == {"size": [4, 6], "counts": [9, 2, 2, 2, 2, 2, 5]}
    assert dog == {"label": "dog", "box": [0, 0, 6, 4], "score": None, "text": ""}


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(strategies.lists(strategies.booleans(), min_size=12, max_size=12))
def test_run_lengths(pixels):
    mask = np.array(pixels).reshape(3, 4)
    counts = tasks._run_lengths(mask)["counts"]
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    np.testing.assert_array_equal(values.reshape(4, 3).T, mask)


def test_compressed_run_lengths():
    """What COCO's own tool makes of masks, see `test_data.py`, read by our own reader."""
    for mask, expected in [(MASK, COMPRESSED), (STRIPES, COMPRESSED_STRIPES)]:
        assert tasks._compressed(tasks._run_lengths(mask)["counts"]) == expected


def test_coco(detections):
    (annotation,) = detections.to_coco(image_id=7, category_ids={"cat": 3})
    assert annotation == {
        "image_id": 7,
        "category_id": 3,
        "bbox": [2, 1, 3, 2],
        "score": 0.5,
        "segmentation": {"size": [4, 6], "counts": tasks._compressed([9, 2, 2, 2, 2, 2, 5])},
    }
    annotations = detections.to_coco(7, {"dog": 1, "cat": 3})
    assert [a["category_id"] for a in annotations] == [3, 1]
    assert annotations[1]["score"] == 1.0
    assert "segmentation" not in annotations[1]


def test_supervision(detections, monkeypatch):
    # The package is large; of it only this class is used.
    fake = types.SimpleNamespace(Detections=lambda **fields: fields)
    monkeypatch.setitem(sys.modules, "supervision", fake)
    fields = detections.to_supervision()
    np.testing.assert_array_equal(fields["xyxy"], [[2, 1, 5, 3], [0, 0, 6, 4]])
    assert fields["mask"].shape == (2, 4, 6)
    assert fields["mask"][0].sum() == 6
    assert not fields["mask"][1].any()  # it has none
    assert fields["data"]["class_name"].tolist() == ["cat", "dog"]
    np.testing.assert_array_equal(fields["class_id"], [0, 1])
    np.testing.assert_allclose(fields["confidence"], [0.5, 1])
    fields = detections.to_supervision(["dog", "bird", "cat"])
    np.testing.assert_array_equal(fields["class_id"], [2, 0])
    with pytest.raises(ValueError, match="'dog'"):
        detections.to_supervision(["cat"])
    assert Detections(detections.items[1:], 6, 4).to_supervision()["mask"] is None


def test_supervision_is_optional(detections, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        detections.to_supervision()


@pytest.mark.parametrize("ending", ["jpg", "tif", "png"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 9])
def test_image_size(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{ending}"
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    expected = (20, 30) if orientation == 6 else (30, 20)
    assert image_size(path) == image_size(Image.open(path)) == expected
    assert keras_pg2.preprocessing.image_pixels(path).shape[1::-1] == expected
    assert image_size(np.zeros((20, 30, 3), "uint8")) == image_size(np.zeros((20, 30))) == (30, 20)


# The model


def test_texts_are_those_of_generate(model, image, monkeypatch):
    calls = []

    def generate(images, prompts, **options):
        calls.append((prompts, options))
        return prompts

    monkeypatch.setattr(model, "generate", generate)
    assert model.caption(image, "de", style="short", seed=1) == "cap de"
    assert model.answer(image, ["one?", "two?"]) == ["answer en one?", "answer en two?"]
    assert model.ask(image, "red", lang="fr") == "question fr red"
    assert model.ocr(image) == "ocr"
    assert calls[0][1] == {"seed": 1}
    assert calls[-1][1] == {"max_new_tokens": 128}
    assert model.describe_region(image, (0, 0, 60, 50)) == (
        "caption <loc0000><loc0000><loc1023><loc1023>"
    )
    monkeypatch.setattr(model, "generate", lambda images, prompts: prompts)
    boxes = [(0, 0, 30, 25), (30, 25, 60, 50)]
    assert model.describe_region(image, boxes) == [
        "caption <loc0000><loc0000><loc0512><loc0512>",
        "caption <loc0512><loc0512><loc1023><loc1023>",
    ]
    with pytest.raises(ValueError, match="must be as many"):
        model.describe_region([image] * 3, boxes)
    with pytest.raises(ValueError, match=r"4 numbers.*Received: \(1, 2, 3\)"):
        model.describe_region(image, [(0, 0, 30, 25), (1, 2, 3)])
    with pytest.raises(ValueError, match="Each of `images` must be"):
        model.describe_region(np.zeros(5), (0, 0, 60, 50))


@pytest.mark.parametrize("sampler", ["greedy", "top_p", "beam"])
def test_constrained_detection(model, image, sampler):
    """Random weights say nothing sensible, but all of it is well-formed."""
    images = [image, image[::-1], image[:, ::-1]]
    found = model.detect(
        images, ["red cat", "dog"], constrained=True, sampler=sampler, seed=0, max_new_tokens=21
    )
    for detections in found:
        end = r"(?:<loc\d{4}>){0,4}.{0,6}"  # where the tokens ran out
        one = r"(?:<loc\d{4}>){4} (?:red cat|dog)"
        assert re.fullmatch(rf"(?:{one}(?: ; {one})*(?: ; {end}|{end})?)?|{end}", detections.text)
        assert (detections.width, detections.height) == (60, 50)
        objects = re.findall(r"(?:<loc\d{4}>){4} (?:red cat|dog)(?= ;|$)", detections.text)
        assert len(detections) <= len(objects) + 1
        for text in objects:
            y1, x1, y2, x2 = map(int, re.findall(r"\d{4}", text))
            assert x1 < x2
            assert y1 < y2
        assert all(0 < item.score <= 1 for item in detections)
        assert {item.label for item in detections} <= {"red cat", "dog"}


def test_constrained_segmentation(model, image, codec, monkeypatch):
    monkeypatch.setattr(model, "get_codec", lambda: codec)
    (found,) = model.segment(image, "cat", constrained=True, max_new_tokens=23)
    assert re.match(r"(?:<loc\d{4}>){4}(?:<seg\d{3}>){16} ca?", found.text)
    assert found.mask.shape == (50, 60)
    assert found.mask.any()
    assert found.label == "cat"
    assert 0 < found.score < 1


def test_each_image_has_its_things(model, image):
    found = model.detect(
        [image, image[::-1]], [["cat"], ["dog", "cow"]], constrained=True, max_new_tokens=9
    )
    labels = [set(re.findall(r"[a-z]+(?= |$)", d.text)) - {"loc"} for d in found]
    assert labels[0] <= {"cat"}
    assert labels[1] <= {"dog", "cow", "do", "d", "co", "c"}


def test_detect_bad_input(model, image):
    for things in (3, [3], None, [["cat"], 3]):
        with pytest.raises(ValueError, match="`things`"):
            model.detect(image, things)
    with pytest.raises(ValueError, match="one image at a time"):
        model.detect([[image, image]], "cat")
    for options in ({"responses": "<loc0001>"}, {"details": True}):
        with pytest.raises(ValueError, match=rf"leave \['{next(iter(options))}'\] out"):
            model.detect(image, "cat", **options)
    with pytest.raises(ValueError, match=r"leave \['grammar'\] out"):
        model.detect(image, "cat", constrained=True, grammar=keras_pg2.Grammar(9))
    with pytest.raises(ValueError, match="as many"):
        model.detect([image, image], [["cat"], ["dog"], ["cow"]])


def test_encoded_images(model, image):
    other = image[::-1].copy()
    one, two = model.encode([image, other])
    assert (one.width, one.height) == (60, 50)
    expected = model.generate([image, other], "ocr", max_new_tokens=6)
    assert model.generate([one, two], "ocr", max_new_tokens=6) == expected
    assert "".join(model.stream(two, "ocr", max_new_tokens=6)) == expected[1]
    assert model.generate(model.encode(image), "ocr", max_new_tokens=6) == expected[0]
    with pytest.raises(ValueError, match="either all images or none"):
        model.generate([one, other], "ocr")
    with pytest.raises(ValueError, match="`encode` looks at one image at a time"):
        model.encode([[image, other]])


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="torch alone has views")
def test_an_encoded_image_keeps_no_other(model, image):
    tokens = model.encode([image] * 4)[0].tokens
    assert tokens.untyped_storage().nbytes() == tokens.nbytes


def test_an_image_of_several_prompts_is_encoded_once(model, image, monkeypatch):
    prompts = ["ocr", "caption en", "answer en what?"]
    expected = [model.generate(image, prompt, max_new_tokens=6) for prompt in prompts]
    encoded = []
    encode = type(model).encode

    def count(self, images, *args):
        encoded.append(images)
        return encode(self, images, *args)

    monkeypatch.setattr(type(model), "encode", count)
    assert model.generate(image, prompts, max_new_tokens=6) == expected
    assert len(encoded) == 1
    other = image[::-1].copy()
    model.generate([image, other, image], "ocr", max_new_tokens=1)
    assert len(encoded) == 1  # several images may not fit
    scores = model.score(image, prompts, ["cat", "7"])
    assert len(encoded) == 2
    np.testing.assert_allclose(scores[1], model.score(image, prompts[1], ["cat", "7"]), rtol=1e-5)


CANDIDATES = ["cat", "a red dog", "7", "cats and cows"]


def test_score(model, image):
    """The sum of the log-probabilities of the full logits."""
    scores = model.score([image, image[::-1]], "answer en what?", CANDIDATES, batch_size=3)
    assert scores.shape == (2, 4)
    for row, candidate in enumerate(CANDIDATES):
        x, y, weight = model.preprocessor.for_training(
            [[image], [image[::-1]]], ["answer en what?"] * 2, [candidate] * 2
        )
        logits = logits_of(model, x).astype("float64")
        log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        log_probs = np.take_along_axis(log_probs, y[..., None], axis=-1)[..., 0]
        expected = (log_probs * (weight > 0)).sum(axis=1)
        np.testing.assert_allclose(scores[:, row], expected, rtol=1e-4)


def test_score_of_one(model, image):
    scores = model.score(model.encode(image), "answer en what?", CANDIDATES[:2])
    assert scores.shape == (2,)
    with pytest.raises(ValueError, match="`candidates`"):
        model.score(image, "ocr", "cat")
    for candidates in ([], ["a", 3], None):
        with pytest.raises(ValueError, match="`candidates`"):
            model.score(image, "ocr", candidates)
    assert model.score(image, "ocr", [""]).shape == (1,)


def test_a_grammar_for_yes_and_no(model, image):
    tokenizer = model.preprocessor.tokenizer
    grammar = keras_pg2.Grammar(tokenizer.vocab_size)
    start = grammar.add_state()
    grammar.starts.append(start)
    end = grammar.add_class([1])
    for word in ("yes", "no"):
        last = grammar.allow_tokens(start, tokenizer.encode(word))
        grammar.allow(last, end, last)
    answers = model.generate([image, image[::-1]], "answer en is it?", grammar=grammar)
    assert set(answers) <= {"yes", "no"}
    scores = model.score(image, "answer en is it?", ["yes", "no"])
    assert answers[0] == ["yes", "no"][int(np.argmax(scores))] or len(tokenizer.encode("yes")) > 1
    (answer,) = model.generate(
        [image], "answer en is it?", grammar=grammar, sampler="beam", max_new_tokens=1, details=True
    )
    assert answer.text
    assert "yes".startswith(answer.text) or "no".startswith(answer.text)
    grammar.starts.append(start)
    with pytest.raises(ValueError, match="`grammar`"):
        model.generate([image] * 3, "ocr", grammar=grammar)
    with pytest.raises(ValueError, match="`grammar` must be a Grammar or None"):
        model.generate(image, "ocr", grammar="yes")


def test_grammars_that_contradict_themselves(tokenizer):
    grammar = keras_pg2.Grammar(100)
    grammar.add_class([10, 11])
    grammar.add_class([])  # as of a tokenizer without segments
    with pytest.raises(ValueError, match=r"one class at most\. In another are \[11\]"):
        grammar.add_class([11, 12])
    with pytest.raises(ValueError, match=r"must be in \[0, 100\)\. Received: 99 to 100"):
        grammar.add_class([99, 100])
    state = grammar.add_state()
    with pytest.raises(ValueError, match=r"In the states \[0\] of the grammar nothing"):
        grammar.tables(100)
    grammar.allow(state, 1, 7)
    with pytest.raises(ValueError, match=r"has no states \[7\]"):
        grammar.tables(100)
    grammar.allow(state, 1, state)
    grammar.starts.append(3)
    with pytest.raises(ValueError, match=r"has no states \[3\]"):
        grammar.tables(100)
    with pytest.raises(ValueError, match="has 100 tokens, but the model only 99"):
        grammar.tables(99)


def test_slices_of_detections_are_detections():
    items = [Detection(name, (0.0, 0.0, 6.0, np.float32(4))) for name in ("dog", "cat")]
    found = Detections(tuple(items), 8, 9, "both")
    assert found[1:] == Detections(tuple(items[1:]), 8, 9, "both")
    assert found[0] is items[0]
    annotations = json.loads(json.dumps(found.to_coco(1, {"dog": 3})))
    assert annotations[0]["bbox"] == [0, 0, 6, 4]


def test_saving_needs_no_codec(model, codec, tmp_path, monkeypatch):
    """Keras looks at all properties of what it saves."""

    def download():
        raise AssertionError("the official codec is not needed")

    monkeypatch.setattr(keras_pg2.segmentation, "_download", download)
    plain = keras_pg2.PaliGemma2.from_config(model.get_config())
    plain.save_weights(tmp_path / "plain.weights.h5")
    plain.use_codec(codec)
    plain.load_weights(tmp_path / "plain.weights.h5")
    plain.save_weights(tmp_path / "own.weights.h5")
    sizes = [(tmp_path / f"{name}.weights.h5").stat().st_size for name in ("plain", "own")]
    assert sizes[0] == sizes[1]


@pytest.mark.slow_if_compiled
def test_the_codec_goes_with_the_preset(model, codec, tmp_path):
    copy = keras_pg2.PaliGemma2.from_preset
    model.save_to_preset(tmp_path / "plain")
    own = copy(tmp_path / "plain")
    own.use_codec(train.CODEC)
    assert own.count_params() == model.count_params()
    own.save_to_preset(tmp_path / "own")
    codes = np.arange(16)[None]
    loaded = copy(tmp_path / "own")
    np.testing.assert_array_equal(loaded.get_codec().decode(codes), codec.decode(codes))
    own.save(tmp_path / "own.keras")
    loaded = keras_pg2.paligemma.keras.saving.load_model(tmp_path / "own.keras")
    np.testing.assert_array_equal(loaded.get_codec().decode(codes), codec.decode(codes))
    own.preprocessor = None
    own.save(tmp_path / "own.keras")
    loaded = keras_pg2.paligemma.keras.saving.load_model(tmp_path / "own.keras")
    np.testing.assert_array_equal(loaded.get_codec().decode(codes), codec.decode(codes))
    with pytest.raises(ValueError, match="`codec`"):
        own.use_codec(3)
    with pytest.raises(FileNotFoundError):
        own.use_codec(tmp_path / "none.npz")
