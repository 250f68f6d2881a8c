import json
import logging
import os
import pickle
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

import keras_pg2
from keras_pg2 import SegmentationCodec, batches, data, parse_detections
from keras_pg2.segmentation import crop_masks
from keras_pg2.tiny.train import CODEC

# Pixels 1 of a mask of 9 × 7, and what COCO's own tool compresses it to.
MASK = np.zeros((9, 7), bool)
MASK[2:6, 1:5] = True
MASK[3, 3] = False
MASK[8, 6] = True
COMPRESSED = ";4500ML142?M"
STRIPES = np.zeros((120, 90), bool)
STRIPES[5:110, 3:80] = True
STRIPES[40:44] = False
COMPRESSED_STRIPES = "];S14o0;" + "QOEo0;" * 75 + "QOEo0fU1"


def _save(path, content):
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{line}\n" for line in content))
    else:
        path.write_text(json.dumps(content))
    return path


def _row(number, **changes):
    row = {"image": f"{number % 2}.png", "prefix": "caption en", "suffix": f"image {number}"}
    return json.dumps({**row, **changes})


def _suffixes(examples):
    return [example["suffix"] for example in examples]


@pytest.fixture
def folder(tmp_path):
    """Images 0.png and 1.png of 9 × 7, and big.png of 120 × 90."""
    for name, (height, width) in {"0": (9, 7), "1": (9, 7), "big": (120, 90)}.items():
        Image.fromarray(np.full((height, width, 3), 9, "uint8")).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def rows(folder):
    return _save(folder / "rows.jsonl", [_row(number) for number in range(7)])


# JSONL


def test_rows_become_examples(rows, folder):
    examples = data.jsonl(rows)
    assert len(examples) == 7
    assert examples[3] == {
        "image": str(folder / "1.png"),
        "prefix": "caption en",
        "suffix": "image 3",
    }
    assert examples[-1]["suffix"] == "image 6"
    assert examples[np.int64(2)]["suffix"] == "image 2"
    assert _suffixes(examples) == [f"image {number}" for number in range(7)]
    with pytest.raises(IndexError):
        examples[7]


def test_image_folder_and_prefix(folder):
    path = _save(folder / "rows.jsonl", ['{"image": "0.png", "suffix": "a"}'])
    (folder / "texts").mkdir()
    path = path.rename(folder / "texts" / "rows.jsonl")
    (example,) = data.jsonl(path, folder, prefix="ocr")
    assert example == {"image": str(folder / "0.png"), "prefix": "ocr", "suffix": "a"}
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: There is no image '.*texts.0\.png'"):
        data.jsonl(path, prefix="ocr")
    assert data.jsonl(path, prefix="ocr", check_images=False)[0]["suffix"] == "a"


def test_several_images_in_an_example(folder):
    path = _save(folder / "rows.jsonl", [_row(0, image=["0.png", "1.png"])])
    assert data.jsonl(path)[0]["image"] == [str(folder / "0.png"), str(folder / "1.png")]


def test_what_text_editors_do(folder):
    """Blank lines, Windows' line ends, a mark of the byte order, no line end at the end."""
    text = "\n\r\n".join([_row(0, suffix="é <seg000> \u2028 漢"), "", _row(1)])
    (folder / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    examples = data.jsonl(folder / "rows.jsonl")
    assert _suffixes(examples) == ["é <seg000> \u2028 漢", "image 1"]


BAD_ROWS = [
    ("{", "This is no JSON"),
    ("[1]", r"must be a JSON object. Received: \[1\]"),
    ('{"image": "0.png", "prefix": "a"}', r"`suffix` is missing; there are \['image', 'prefix'\]"),
    (_row(0, suffix=3), "`suffix` must be a string. Received: 3"),
    (_row(0, suffix="half \ud83d"), "`suffix` is no valid Unicode: .*surrogates"),
    (_row(0, prefix=None), "`prefix` must be a string. Received: None"),
    (_row(0, image=7), "`image` must be a string or a list"),
    (_row(0, image=[]), "`image` must be a name or a list of them"),
    (_row(0, image="no.png"), "There is no image"),
    (_row(0, image=["0.png", "no.png"]), "There is no image"),
]


@pytest.mark.parametrize(("line", "message"), BAD_ROWS)
def test_bad_rows(folder, caplog, line, message):
    path = _save(folder / "rows.jsonl", [_row(0), "", line, _row(1)])
    with pytest.raises(ValueError, match=rf'rows\.jsonl:3: .*{message}.*on_error="skip"'):
        data.jsonl(path)
    with caplog.at_level(logging.WARNING):
        assert _suffixes(data.jsonl(path, on_error="skip")) == ["image 0", "image 1"]
    assert re.search(rf"(?s)Left out 1 bad rows of .*rows\.jsonl:3: .*{message}", caplog.text)


def test_a_warning_is_short(folder, caplog):
    path = _save(folder / "rows.jsonl", [_row(0), *["{"] * 50])
    data.jsonl(path, on_error="skip")
    assert "Left out 50" in caplog.text
    assert caplog.text.count("This is no JSON") == 5


def test_changes_after_the_check(rows, folder):
    examples = data.jsonl(rows)
    (folder / "1.png").unlink()
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: There is no image .*changed"):
        examples[1]
    assert examples[0]["suffix"] == "image 0"
    rows.write_text(rows.read_text().replace('"prefix"', '"Prefix"'))
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: The field `prefix` is missing"):
        examples[0]


@pytest.mark.parametrize("lines", [[], ["", ""], ["{"]])
def test_no_examples_at_all(folder, lines):
    path = _save(folder / "rows.jsonl", lines)
    with pytest.raises(ValueError, match="has no examples"):
        data.jsonl(path, on_error="skip")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl"):
        data.jsonl(tmp_path / "no.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no\.json"):
        data.coco_captions(tmp_path / "no.json")


def test_rows_stay_on_disk(rows):
    examples = data.jsonl(rows)
    assert len(pickle.dumps(examples)) < 1000
    assert _suffixes(pickle.loads(pickle.dumps(examples))) == _suffixes(examples)


# Parts


def test_shards_cover_all_without_overlap(rows):
    shards = [_suffixes(data.jsonl(rows, shard=(index, 3))) for index in range(3)]
    assert [len(shard) for shard in shards] == [3, 2, 2]
    assert sorted([*shards[0], *shards[1], *shards[2]]) == [
        f"image {number}" for number in range(7)
    ]
    assert shards[1] == ["image 1", "image 4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": (3, 3)}, "`shard` must be .*Received: shard=\\(3, 3\\)"),
        ({"shard": (-1, 3)}, "`shard` must be"),
        ({"shard": 2}, "`shard` must be"),
        ({"shard": (0, 1, 2)}, "`shard` must be"),
        ({"shard": (0.5, 2)}, "`shard` must be"),
        ({"shard": (7, 8)}, "7 examples, too few for shard=\\(7, 8\\)"),
        ({"on_error": "ignore"}, "`on_error` must be 'raise' or 'skip'. Received: 'ignore'"),
    ],
)
def test_bad_options(rows, options, message):
    with pytest.raises(ValueError, match=message):
        data.jsonl(rows, **options)


def test_slices_and_take(rows):
    examples = data.jsonl(rows)
    assert _suffixes(examples[1:6:2]) == ["image 1", "image 3", "image 5"]
    assert _suffixes(examples[::-1][:2]) == ["image 6", "image 5"]
    assert _suffixes(examples.take(2)) == ["image 0", "image 1"]
    assert len(examples.take(99)) == 7
    assert len(examples.take(0)) == 0


def test_split(rows):
    examples = data.jsonl(rows)
    train, validation = examples.split(0.3, seed=1)
    assert (len(train), len(validation)) == (5, 2)
    assert sorted(_suffixes(train) + _suffixes(validation)) == _suffixes(examples)
    assert _suffixes(train) == sorted(_suffixes(train))
    assert _suffixes(examples.split(0.3, seed=1)[1]) == _suffixes(validation)
    drawn = {tuple(_suffixes(examples.split(0.3, seed=seed)[1])) for seed in range(5)}
    assert len(drawn) > 1
    assert len(examples.split(0.01)[1]) == len(examples.split(0.99)[0]) == 1
    for fraction in (0, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"`fraction` must be in \(0, 1\)"):
            examples.split(fraction)
    with pytest.raises(ValueError, match=r"at least 2 examples\. Received: 1"):
        examples.take(1).split(0.5)


# Writing


def test_write_and_read(folder, image):
    path = folder / "new" / "train.jsonl"
    part = Image.fromarray(image[:9])
    examples = [
        {"image": image, "prefix": "caption en", "suffix": "é\n\u2028"},
        {"image": [image / 255, part], "prefix": "", "suffix": ""},
        {"image": folder / "0.png", "prefix": "p", "suffix": "s"},
    ]
    data.write_jsonl(path, (example for example in examples))
    first, second, third = data.jsonl(path)
    assert (first["prefix"], first["suffix"]) == ("caption en", "é\n\u2028")
    np.testing.assert_array_equal(np.asarray(Image.open(first["image"])), image)
    assert second["image"][0] == first["image"]  # equal images are saved once
    np.testing.assert_array_equal(np.asarray(Image.open(second["image"][1])), image[:9])
    assert len(list((folder / "new" / "train_images").iterdir())) == 2
    assert json.loads(path.read_text().split("\n")[2])["image"] == "../0.png"
    assert third["suffix"] == "s"
    copy = folder / "copy.jsonl"
    data.write_jsonl(copy, data.jsonl(path))
    assert _suffixes(data.jsonl(copy)) == _suffixes([first, second, third])


def test_links_and_the_home_folder(folder, image, monkeypatch):
    deep = folder / "real" / "deep" / "dir"
    deep.mkdir(parents=True)
    (folder / "link").symlink_to(deep)
    examples = [{"image": folder / "0.png", "prefix": "p", "suffix": "s"}]
    data.write_jsonl(folder / "link" / "t.jsonl", examples)
    (example,) = data.jsonl(folder / "link" / "t.jsonl")
    assert os.path.samefile(example["image"], folder / "0.png")
    (deep.parent / "0.png").write_bytes((folder / "1.png").read_bytes())
    examples = [{"image": folder / "link" / ".." / "0.png", "prefix": "p", "suffix": "s"}]
    data.write_jsonl(folder / "up.jsonl", examples)
    (example,) = data.jsonl(folder / "up.jsonl")
    assert os.path.samefile(example["image"], deep.parent / "0.png")
    monkeypatch.setenv("HOME", str(folder))
    data.write_jsonl("~/home.jsonl", [{"image": image, "prefix": "p", "suffix": "s"}])
    (example,) = data.jsonl("~/home.jsonl")
    np.testing.assert_array_equal(np.asarray(Image.open(example["image"])), image)
    assert (folder / "home_images").is_dir()
    data.write_jsonl("~/deep.jsonl", [{"image": "~/0.png", "prefix": "p", "suffix": "s"}])
    assert data.jsonl("~/deep.jsonl")[0]["image"] == str(folder / "0.png")


def test_a_file_is_whole_or_as_before(folder, image):
    path = folder / "train.jsonl"
    good = {"image": image, "prefix": "p", "suffix": "s"}
    data.write_jsonl(path, [good])
    before = path.read_text()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        data.write_jsonl(path, [good])
    for bad, message in [
        ({**good, "image": "no.png"}, r"examples\[1\]: There is no image 'no\.png'"),
        ({**good, "image": []}, r"examples\[1\]: `image` must not be empty"),
        ({**good, "image": 3}, r"examples\[1\]: .*Received: 3"),
        ({**good, "suffix": None}, r"examples\[1\]: `suffix` must be a string"),
        ({"image": image}, r"examples\[1\]: The field `prefix` is missing"),
    ]:
        with pytest.raises(ValueError, match=message):
            data.write_jsonl(path, [good, bad], overwrite=True)
    assert path.read_text() == before
    assert sorted(p.name for p in folder.glob("*train*")) == ["train.jsonl", "train_images"]
    data.write_jsonl(path, [good, good], overwrite=True)
    assert len(data.jsonl(path)) == 2


# COCO


def _annotation(id, image_id=1, category_id=1, bbox=(0, 0, 7, 9), **values):
    fields = {"id": id, "image_id": image_id, "category_id": category_id, "bbox": list(bbox)}
    return {**fields, "iscrowd": 0, "caption": f" caption {id} ", **values}


def _coco(folder, annotations):
    images = [
        {"id": 1, "file_name": "0.png", "height": 9, "width": 7},
        {"id": 2, "file_name": "big.png", "height": 120, "width": 90},
        {"id": 3, "file_name": "missing.png", "height": 1, "width": 1},
    ]
    categories = [{"id": 5, "name": "dog"}, {"id": 1, "name": "cat"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return _save(folder / "coco.json", content)


@pytest.fixture
def coco(folder):
    return _coco(
        folder,
        [
            _annotation(10, 2, 1, (9, 30, 45, 60)),
            _annotation(11, 2, 5, (-9, 12, 200, 12)),
            _annotation(12, 2, 1, (9, 6, 9, 6)),
            _annotation(13, 2, 1, iscrowd=1, segmentation={"size": [9, 7], "counts": [63]}),
            _annotation(14, 1, 5),
        ],
    )


DOG = "<loc0102><loc0000><loc0205><loc1023> dog"
CATS = [
    "<loc0051><loc0102><loc0102><loc0205> cat",
    "<loc0256><loc0102><loc0767><loc0614> cat",
]
WHOLE_DOG = "<loc0000><loc0000><loc1023><loc1023> dog"


def test_detection_of_the_categories_in_an_image(coco, folder):
    first, second = data.coco_detection(coco)
    assert first == {"image": str(folder / "0.png"), "prefix": "detect dog", "suffix": WHOLE_DOG}
    assert second["image"] == str(folder / "big.png")
    assert second["prefix"] == "detect dog ; cat"  # in the order of the file's categories
    assert second["suffix"] == " ; ".join([DOG, *CATS])


def test_detection_of_one_category(coco):
    examples = data.coco_detection(coco, prompt="category")
    assert [(example["prefix"], example["suffix"]) for example in examples] == [
        ("detect dog", WHOLE_DOG),
        ("detect dog", DOG),
        ("detect cat", " ; ".join(CATS)),
    ]


def test_detection_of_all_classes_in_random_order(coco):
    suffixes = set()
    for seed in range(40):
        _, example = data.coco_detection(coco, prompt="all classes", seed=seed)
        assert example["prefix"] == "detect all classes"
        assert sorted(example["suffix"].split(" ; ")) == sorted([DOG, *CATS])
        assert data.coco_detection(coco, prompt="all classes", seed=seed)[1] == example
        suffixes.add(example["suffix"])
    assert len(suffixes) == 6


def test_boxes_without_a_width_or_a_height_are_left_out(folder, caplog):
    """COCO's training annotations have two, such as this one, 918."""
    empty = _annotation(918, image_id=2, bbox=(29.665, 38.833, 1.03, 0.0))
    boxes = [_annotation(1), empty, _annotation(3, image_id=2, bbox=(1, 2, 0, 4))]
    boxes += [_annotation(4, image_id=2, bbox=(10.2, 10.2, 0.02, 5))]  # <loc0116> twice
    with caplog.at_level("INFO"):
        (example,) = data.coco_detection(_coco(folder, boxes))
    assert example["image"] == str(folder / "0.png")
    assert "left out 3 boxes without a width or a height in location tokens" in caplog.text


def test_an_id_of_two_images(folder):
    content = json.loads(_coco(folder, [_annotation(1)]).read_text())
    content["images"].append({**content["images"][0]})  # says the same
    content["images"].append({"id": 99})  # of no annotation
    (example,) = data.coco_detection(_save(folder / "coco.json", content))
    assert example["image"] == str(folder / "0.png")
    content["images"][-2]["file_name"] = "1.png"
    with pytest.raises(ValueError, match=r"image 1: `id` 1 belongs to '0\.png' already"):
        data.coco_detection(_save(folder / "coco.json", content))


def test_crowds(folder):
    crowd = _annotation(1, iscrowd=1)
    assert len(data.coco_detection(_coco(folder, [crowd]), keep_crowds=True)) == 1
    with pytest.raises(ValueError, match=r"coco\.json has no examples"):
        data.coco_detection(_coco(folder, [crowd]))


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (_annotation(7, image_id=99), "annotation 7: `image_id` 99 is not in `images`"),
        (_annotation(7, image_id=[1]), "annotation 7: `image_id` must be an integer or a string"),
        (_annotation(7, category_id=99), "annotation 7: `category_id` 99 is not in `categories`"),
        (_annotation(7, bbox=(1, 2, 3)), "annotation 7: `bbox` must be 4 numbers"),
        (_annotation(7, bbox=(1, 2, 3, "4")), "annotation 7: `bbox` must be 4 numbers"),
        (_annotation(7, bbox=(1, 2, 3, float("nan"))), "annotation 7: `bbox` must be 4 numbers"),
        (_annotation(7, bbox=(1, 2, 3, 10**400)), "annotation 7: `bbox` must be 4 numbers"),
        (_annotation(7, bbox=(1, 2, -1, 4)), "annotation 7: `bbox` must have a width"),
        (_annotation(7, bbox=(8, 2, 3, 4)), "inside of its image of 7 × 9. Received"),
        (_annotation(7, image_id=3), r"image 3: There is no image '.*missing\.png'"),
        (_annotation(7, iscrowd="0"), "annotation 7: `iscrowd` must be 0 or 1. Received: '0'"),
        ("what", "annotation number 2: There must be a JSON object. Received: 'what'"),
        ({"id": 7}, "annotation 7: The field `image_id` is missing"),
    ],
)
def test_bad_annotations(folder, caplog, annotation, message):
    path = _coco(folder, [_annotation(1), annotation])
    with pytest.raises(ValueError, match=message):
        data.coco_detection(path)
    (example,) = data.coco_detection(path, on_error="skip")
    assert example["suffix"] == "<loc0000><loc0000><loc1023><loc1023> cat"
    assert re.search(rf"(?s)Left out 1 bad rows of .*coco\.json.*{message}", caplog.text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"coco\.json: There must be a JSON object"),
        ({"images": []}, r"coco\.json: The field `annotations` is missing"),
        ({"images": {}, "annotations": []}, r"coco\.json: `images` must be a list"),
        ({"images": [], "annotations": []}, r"coco\.json: The field `categories` is missing"),
    ],
)
def test_other_json_files(folder, content, message):
    with pytest.raises(ValueError, match=message):
        data.coco_detection(_save(folder / "coco.json", content))


def test_bad_categories_and_prompts(coco):
    content = json.loads(coco.read_text())
    content["categories"][1]["name"] = "cat ; mat"
    _save(coco, content)
    with pytest.raises(ValueError, match=r"category 1: `name` must be .*without ';'"):
        data.coco_detection(coco)
    content["categories"][1]["name"] = "cat <loc0001>"
    _save(coco, content)
    with pytest.raises(ValueError, match=r"category 1: `name` must be .*without ';', '<'"):
        data.coco_detection(coco)
    content["categories"][1] = {**content["categories"][0], "name": "mat"}
    _save(coco, content)
    with pytest.raises(ValueError, match=r"`id` \d+ belongs to another category already"):
        data.coco_detection(coco)
    with pytest.raises(ValueError, match=r"`prompt` must be one of .*Received: prompt='boxes'"):
        data.coco_detection(coco, prompt="boxes")
    with pytest.raises(ValueError, match="`prompt` must be one of"):
        data.coco_segmentation(coco, codec=str, prompt="all classes")


def test_blank_captions(folder, caplog):
    path = _coco(folder, [_annotation(1), _annotation(7, caption=" ")])
    with pytest.raises(ValueError, match=r"annotation 7: `caption` must not be blank"):
        data.coco_captions(path)
    assert _suffixes(data.coco_captions(path, on_error="skip")) == ["caption 1"]
    assert "Left out 1 bad rows" in caplog.text
    with pytest.raises(ValueError, match=r"`prefix` must be a string\. Received: prefix=5"):
        data.coco_captions(path, prefix=5)


def test_captions(coco, folder):
    examples = data.coco_captions(coco)
    assert _suffixes(examples) == [f"caption {id}" for id in (14, 10, 11, 12, 13)]
    assert examples[1]["image"] == str(folder / "big.png")
    assert examples[1]["prefix"] == "caption en"
    drawn = set()
    for seed in range(20):
        first, second = data.coco_captions(coco, one_per_image=True, seed=seed, prefix="cap en")
        assert (first["suffix"], second["prefix"]) == ("caption 14", "cap en")
        drawn.add(second["suffix"])
    assert drawn == {f"caption {id}" for id in (10, 11, 12, 13)}


# Masks


class Codec:
    """Keeps the masks it gets."""

    def __init__(self):
        self.calls = []

    def __call__(self, masks, labels, boxes):
        self.calls.append((masks, labels, boxes))
        return " ; ".join(f"{int(mask.sum())} {label}" for mask, label in zip(masks, labels))


def _masks(folder, *segmentations, size=1, **values):
    annotations = [
        _annotation(id, size, segmentation=segmentation, **values)
        for id, segmentation in enumerate(segmentations)
    ]
    codec = Codec()
    examples = data.coco_segmentation(_coco(folder, annotations), codec=codec)
    (example,) = examples
    assert example["prefix"] == "segment cat"
    ((masks, labels, boxes),) = codec.calls
    assert labels == ["cat"] * len(segmentations)
    assert boxes.shape == (len(segmentations), 4)
    assert examples[0] == example
    assert len(codec.calls) == 1  # the suffix is kept
    return masks


def test_masks_by_a_real_codec(folder):
    """COCO's masks to a suffix, and back to masks."""
    segmentation = {"size": [120, 90], "counts": COMPRESSED_STRIPES}
    annotation = _annotation(1, image_id=2, bbox=(3, 5, 77, 105), segmentation=segmentation)
    codec = SegmentationCodec.from_file(CODEC)
    (example,) = data.coco_segmentation(_coco(folder, [annotation]), codec=codec)
    (found,) = parse_detections(example["suffix"], 90, 120, codec)
    assert found.label == "cat"
    np.testing.assert_allclose(found.box, (3, 5, 80, 110), atol=0.1)
    assert (found.mask & STRIPES).sum() / (found.mask | STRIPES).sum() > 0.9


def test_run_lengths(folder):
    columns = MASK.T.ravel()
    changes = np.flatnonzero(np.diff(columns)) + 1
    counts = np.diff([0, *changes, columns.size]).tolist()
    for form in (counts, COMPRESSED):
        (mask,) = _masks(folder, {"size": [9, 7], "counts": form})
        np.testing.assert_array_equal(mask, MASK)
    stripes = {"size": [120, 90], "counts": COMPRESSED_STRIPES}
    (mask,) = _masks(folder, stripes, size=2, bbox=(0, 0, 90, 120))
    np.testing.assert_array_equal(mask, STRIPES)
    (mask,) = _masks(folder, {"size": [9, 7], "counts": [0, 63]})
    assert mask.all()


def test_polygons(folder):
    square = [1, 2, 5, 2, 5, 6, 1, 6]
    (mask,) = _masks(folder, [square])
    expected = np.zeros((9, 7), bool)
    expected[2:6, 1:5] = True
    np.testing.assert_array_equal(mask, expected)
    (mask,) = _masks(folder, [square, [5.6, 7, 9, 7, 9, 20, 5.6, 20]])  # leaves the image
    expected[7:, 6] = True
    np.testing.assert_array_equal(mask, expected)
    (mask,) = _masks(folder, [[], square, [5.6, 7, 9, 7]])  # scraps that are none
    np.testing.assert_array_equal(mask[2:6, 1:5], True)
    assert mask.sum() == 16
    (mask,) = _masks(folder, [[0, 0, 7, 0, 0, 9]])
    rows, columns = np.mgrid[:9, :7] + 0.5
    np.testing.assert_array_equal(mask, rows / 9 + columns / 7 < 1)


def test_polygons_look_like_pillow_draws_them(folder):
    angles = np.sort(np.random.default_rng(0).uniform(0, 2 * np.pi, 40))
    radii = np.random.default_rng(1).uniform(20, 44, 40)
    points = np.stack([45 + radii * np.cos(angles), 60 + radii * np.sin(angles)], axis=-1)
    (mask,) = _masks(folder, [points.ravel().tolist()], size=2, bbox=(0, 0, 90, 120))
    drawn = Image.new("1", (90 * 16, 120 * 16))
    ImageDraw.Draw(drawn).polygon([tuple(point) for point in points * 16], fill=1)
    centres = np.asarray(drawn)[8::16, 8::16]
    assert mask.sum() > 2000
    assert (mask != centres).mean() < 0.002  # Pillow rounds to its own pixels
    assert abs(int(mask.sum()) - int(centres.sum())) <= 12


def test_a_sliver_fills_its_box(folder):
    (mask,) = _masks(folder, [[1.1, 2, 1.2, 2, 1.2, 4]], bbox=(1.1, 2, 0.1, 2))
    assert np.argwhere(mask).tolist() == [[2, 1], [3, 1]]


def test_rectangles_fill_their_boxes(folder):
    """Between the centres of pixels, too, and thinner than one."""
    rng = np.random.default_rng(0)
    boxes = [rng.integers(0, 12, 2).tolist() + rng.integers(1, 6, 2).tolist() for _ in range(20)]
    boxes = [[value / 2 for value in box] for box in boxes]
    boxes += np.round(rng.uniform([0, 0, 0.5, 0.5], [4, 6, 3, 3], (20, 4)), 2).tolist()
    for x, y, width, height in boxes:
        right, bottom = x + width, y + height
        polygon = [x, y, right, y, right, bottom, x, bottom]
        masks = _masks(folder, [polygon], bbox=(x, y, width, height))
        crops = crop_masks(masks, [[x, y, right, bottom]])
        np.testing.assert_array_equal(crops, 1, err_msg=str((x, y, width, height)))


def test_segmentation_texts(folder):
    square = [[1, 2, 5, 2, 5, 6, 1, 6]]
    annotations = [
        _annotation(1, segmentation=square, bbox=(1, 2, 4, 4)),
        _annotation(2, segmentation={"size": [9, 7], "counts": COMPRESSED}, category_id=5),
    ]
    codec = Codec()
    (example,) = data.coco_segmentation(_coco(folder, annotations), folder, codec=codec)
    assert example["prefix"] == "segment dog ; cat"
    assert example["suffix"] == "16 dog ; 16 cat"
    np.testing.assert_array_equal(codec.calls[0][2], [[0, 0, 7, 9], [1, 2, 5, 6]])
    examples = data.coco_segmentation(_coco(folder, annotations), codec=codec, prompt="category")
    assert [example["prefix"] for example in examples] == ["segment dog", "segment cat"]
    assert _suffixes(examples[1:]) == ["16 cat"]
    with pytest.raises(ValueError, match=r"`codec` must be a SegmentationCodec.*codec=None"):
        data.coco_segmentation(_coco(folder, annotations), codec=None)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "must be a list of polygons, or an object"),
        ([], "must be a list of polygons"),
        ([[1, 2, 3, 4]], "at least 3 points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "A polygon must be a list of numbers"),
        ([[1, 2, 3, 4, 5, None]], "A polygon must be"),
        ([[8, 2, 9, 2, 9, 4]], "`segmentation` must overlap `bbox`"),
        ({"size": [7, 9], "counts": [0, 63]}, r"`size` .* be the image's, \[9, 7\].*\[7, 9\]"),
        ({"size": [9, 7], "counts": [0, 62]}, "must add up to its 63 pixels"),
        ({"size": [9, 7], "counts": [63]}, "some must be inside"),
        ({"size": [9, 7], "counts": [64, -1]}, "must add up"),
        ({"size": [9, 7], "counts": COMPRESSED[:-1]}, "must add up"),
        ({"size": [9, 7], "counts": "~~"}, "or COCO's compressed string. Received: '~~'"),
        ({"size": [9, 7]}, "`counts` of a mask must be .*Received: None"),
    ],
)
def test_bad_masks(folder, segmentation, message):
    path = _coco(folder, [_annotation(7, segmentation=segmentation)])
    with pytest.raises(ValueError, match=rf"coco\.json: annotation 7: .*{message}"):
        data.coco_segmentation(path, codec=Codec())


# Visual question answering


def _answers(*texts):
    return [{"answer": text, "answer_confidence": "yes"} for text in texts]


@pytest.fixture
def vqav2(folder):
    for id in (1, 42):
        Image.open(folder / "0.png").save(folder / f"COCO_val2014_{id:012d}.jpg")
    questions = [
        {"question_id": 420, "image_id": 42, "question": "What is it? "},
        {"question_id": 10, "image_id": 1, "question": "How many {birds}?"},
    ]
    answers = [
        {"question_id": 10, "image_id": 1, "answers": _answers("two", "2", "2", "two", "few")},
        {"question_id": 420, "image_id": 42, "answers": _answers("a cat", "dog", "dog")},
    ]
    return (
        _save(folder / "questions.json", {"data_subtype": "val2014", "questions": questions}),
        _save(folder / "annotations.json", {"annotations": answers}),
    )


def test_vqav2(vqav2, folder):
    first, second = data.vqa(*vqav2)
    assert first == {
        "image": str(folder / "COCO_val2014_000000000042.jpg"),
        "prefix": "answer en What is it?",
        "suffix": "dog",
    }
    assert second["prefix"] == "answer en How many {birds}?"
    assert second["suffix"] == "two"  # as many as "2", but first
    assert data.vqa(*vqav2, prefix="{question}")[0]["prefix"] == "What is it?"


def test_random_answers(vqav2):
    drawn = [_suffixes(data.vqa(*vqav2, answer="random", seed=seed)) for seed in range(30)]
    assert {second for _, second in drawn} == {"two", "2", "few"}
    assert {first for first, _ in drawn} == {"a cat", "dog"}
    assert _suffixes(data.vqa(*vqav2, answer="random", seed=3)) == drawn[3]
    (shard,) = data.vqa(*vqav2, answer="random", seed=3, shard=(1, 2))
    assert shard["suffix"] == drawn[3][1]


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"data": rows, "version": 1}])
def test_questions_and_answers_in_one_file(folder, wrap):
    rows = [
        {"image": "0.png", "question": "a?", "answer": "yes"},
        {"image": "1.png", "question": "b?", "answers": ["x", "y", "y"], "questionId": 3},
        {"image": "1.png", "question": "c?", "answers": _answers("", "z", "")},
        {"image": "1.png", "question": "d?", "answers": ["no", "no", "yes ", " yes", "yes\n"]},
    ]
    examples = data.vqa(_save(folder / "vqa.json", wrap(rows)))
    assert _suffixes(examples) == ["yes", "y", "z", "yes"]
    assert [example["image"] for example in examples[1:]] == [str(folder / "1.png")] * 3


def test_names_of_images(folder):
    rows = [{"image_id": "big", "question": "a?", "answer": "b"}]
    path = _save(folder / "vqa.json", rows)
    (example,) = data.vqa(path, image_name="{image_id}.png")
    assert example["image"] == str(folder / "big.png")
    rows = [{"image": "http://a/b", "image_id": "big", "question": "how many?", "answer": 3}]
    (example,) = data.vqa(_save(folder / "counts.json", rows), image_name="{image_id}.png")
    assert example["image"] == str(folder / "big.png")
    assert example["suffix"] == "3"
    with pytest.raises(ValueError, match=r"question number 1: .*pass `image_name`"):
        data.vqa(path)
    with pytest.raises(ValueError, match=r"'{id}' cannot be made from the fields \['answer'"):
        data.vqa(path, image_name="{id}")
    with pytest.raises(ValueError, match=r"'{image_id\.x}' cannot be made from"):
        data.vqa(path, image_name="{image_id.x}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question_id": 5, "image": "0.png", "answer": "a"},
            "question 5: .*`question` is missing",
        ),
        ({"question": "q", "image": "0.png"}, "question number 2: .*`answers` is missing"),
        ({"question": "q", "image": "0.png", "answers": []}, "Answers must be strings or numbers"),
        ({"question": "q", "image": "0.png", "answers": [[3]]}, r"Received: \[\[3\]\]"),
        ({"question": " ", "image": "0.png", "answer": "a"}, "`question` must not be blank"),
        ({"question": "q", "image": "0.png", "answer": ""}, r"not blank\. Received: \[''\]"),
        ({"question": "q", "image": "0.png", "answers": ["", " "]}, "not blank"),
        ({"question": "q", "image": "no.png", "answer": "a"}, "There is no image"),
        (["q"], "question number 2: There must be a JSON object"),
        (
            {"question": "q", "image": "0.png", "answer": 10**400},
            "Answers must be strings or numbers",
        ),
    ],
)
def test_bad_questions(folder, caplog, row, message):
    good = {"image": "0.png", "question": "a?", "answer": "b"}
    path = _save(folder / "vqa.json", [good, row])
    with pytest.raises(ValueError, match=rf"vqa\.json: .*{message}"):
        data.vqa(path)
    assert len(data.vqa(path, on_error="skip")) == 1
    assert re.search(message, caplog.text)


def test_odd_ids_and_names(folder, caplog):
    rows = [{"question_id": [1], "question": "q"}, {"question_id": 2, "question": "a?"}]
    rows += [{"question_id": 3, "question": "b?", "image_id": None}]
    rows = [{"image_id": 1} | row for row in rows]
    questions = _save(folder / "questions.json", {"questions": rows, "data_subtype": "x"})
    answers = [None, *({"question_id": id, "answers": ["a"]} for id in (2, 3))]
    answers = _save(folder / "answers.json", {"annotations": answers})
    (folder / "0.png").rename(folder / "COCO_x_000000000001.jpg")
    examples = data.vqa(questions, answers, on_error="skip")
    assert [example["prefix"] for example in examples] == ["answer en a?"]
    assert "There must be a JSON object. Received: None" in caplog.text
    assert "question [1]: It has no answer" in caplog.text
    assert "cannot be made from the fields" in caplog.text


def test_questions_without_answers(vqav2):
    questions, annotations = vqav2
    content = json.loads(annotations.read_text())
    content["annotations"].pop()
    _save(annotations, content)
    with pytest.raises(ValueError, match=r"question 420: It has no answer in .*annotations\.json"):
        data.vqa(questions, annotations)
    assert len(data.vqa(questions, annotations, on_error="skip")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": "answer en"}, "`prefix` must hold '{question}'"),
        ({"prefix": 5}, "`prefix` must hold '{question}'. Received: prefix=5"),
        ({"image_name": 5}, "`image_name` must be a str.* or None. Received: image_name=5"),
        ({"answer": "all"}, "`answer` must be 'most common' or 'random'. Received: answer='all'"),
    ],
)
def test_bad_vqa_options(vqav2, options, message):
    with pytest.raises(ValueError, match=message):
        data.vqa(*vqav2, **options)


def test_a_file_of_something_else(folder):
    with pytest.raises(ValueError, match=r"vqa\.json must hold a list, or an object with a list"):
        data.vqa(_save(folder / "vqa.json", {"what": 1}))
    (folder / "vqa.json").write_text("{")
    with pytest.raises(ValueError, match=r"vqa\.json: This is no JSON"):
        data.vqa(folder / "vqa.json")


# Towards `fit`


def test_examples_suit_the_preprocessor(rows, tokenizer):
    examples = data.jsonl(rows).take(2)
    preprocessor = keras_pg2.Preprocessor(tokenizer, 56, sequence_length=16)
    x, _, weight = preprocessor.for_training(
        [[example["image"]] for example in examples],
        *([example[name] for example in examples] for name in ("prefix", "suffix")),
    )
    assert x["images"].shape == (2, 1, 56, 56, 3)
    np.testing.assert_allclose(weight.sum(axis=1), 1, rtol=1e-6)


def test_an_error_is_not_the_end(folder):
    """An IndexError of a codec does not end the data early, nor make it empty."""
    annotations = [
        _annotation(i, segmentation=[[1, 1, 5, 1, 5, 5]], category_id=(1, 5)[i]) for i in range(2)
    ]
    examples = data.coco_segmentation(
        _coco(folder, annotations), codec=lambda masks, labels, boxes: labels[9]
    )
    with pytest.raises(IndexError):
        list(examples)
    with pytest.raises(IndexError):
        batches.Batches(examples, None, 10)
    with pytest.raises(ValueError, match="The data is empty"):
        batches.Batches(examples[:0], None, 10)


def test_home_folder(coco, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    captions = data.coco_captions("~/coco.json", check_images=False, on_error="skip")
    assert captions[0]["image"].startswith(str(folder))
    path = folder / "home.jsonl"
    path.write_text(json.dumps({"image": "~/0.png", "prefix": "p", "suffix": "s"}))
    (folder / "elsewhere").mkdir()
    (example,) = data.jsonl(path, folder / "elsewhere")
    assert example["image"] == str(folder / "0.png")


def test_masks_outside_of_their_boxes(folder):
    codec = SegmentationCodec.from_file(CODEC)
    annotation = _annotation(1, 2, bbox=(50, 90, 20, 20))
    annotation["segmentation"] = {"size": [120, 90], "counts": [0, 240, 120 * 88]}
    with pytest.raises(ValueError, match=r"annotation 1: `segmentation` must overlap `bbox`"):
        data.coco_segmentation(_coco(folder, [annotation]), codec=codec)
    # A polygon beside the box that touches it fills the box, as one that is too thin.
    (mask,) = _masks(folder, [[0, 0, 2, 0, 2, 2, 0, 2]], bbox=(2, 2, 3, 3))
    assert mask[2:5, 2:5].all()


def test_several_annotations_of_a_question(vqav2):
    questions, annotations = vqav2
    rows = [
        {"question_id": id, "answers": [{"answer": answer}]}
        for id, answer in [(10, "2"), (420, "dog"), (10, "2"), (10, "two")]
    ]
    _save(annotations, {"annotations": rows})
    assert _suffixes(data.vqa(questions, annotations)) == ["dog", "2"]
