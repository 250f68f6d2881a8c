import copy
import io
import json
import struct
import threading

import numpy as np
import pytest
from keras import ops
from PIL import Image, ImageOps

from keras_pg2.preprocessing import Preprocessor, batch_examples, image_size

FILES = ("gradient_500x333", "gray_123x457", "noise_200x150", "rgba_300x200")
FILES += ("tall_97x1024", "wide_640x120")


@pytest.fixture(scope="module")
def preprocessor(tokenizer):
    return Preprocessor(tokenizer, image_size=56, sequence_length=65)


def _levels(image):
    return (image + 1) * 127.5


# Images against the goldens


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("size", [56, 224])
def test_bilinear_equals_big_vision(data, tokenizer, file, size):
    goldens = np.load(data / "preprocess" / "expected.npz")
    name = f"{file}/{size}/bv_antialias"
    if name not in goldens:
        pytest.skip("this size is not among the copied goldens")
    image = Preprocessor(tokenizer, size).load_image(data / "preprocess" / f"{file}.png")
    difference = np.abs(_levels(image) - goldens[name])
    assert difference.max() < 1.001  # levels of 255
    assert (difference > 0.5).mean() < 0.005


@pytest.mark.parametrize("file", [p for p in FILES if not p.startswith("rgba")])
def test_bicubic_equals_transformers(data, tokenizer, file):
    golden = np.load(data / "preprocess" / "expected.npz")[f"{file}/56/hf_pil_convertrgb_True"]
    preprocessor = Preprocessor(tokenizer, 56, interpolation="bicubic")
    image = preprocessor.load_image(data / "preprocess" / f"{file}.png")
    np.testing.assert_allclose(_levels(image), golden, atol=1e-4)


# Kinds of images


def test_path_image_and_array_agree(preprocessor, image, tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    expected = preprocessor.load_image(image)
    monkeypatch.setenv("HOME", str(tmp_path))
    np.testing.assert_array_equal(preprocessor.load_image("~/image.png"), expected)
    assert image_size("~/image.png") == image.shape[1::-1]
    assert expected.shape == (56, 56, 3)
    assert expected.dtype == np.float32
    assert -1 <= expected.min() < -0.5 < 0.5 < expected.max() <= 1
    for same in (path, str(path), Image.open(path), image.astype("float32") / 255, image / 255.0):
        np.testing.assert_array_equal(preprocessor.load_image(same), expected)


@pytest.mark.parametrize("dtype", ["uint8", "float32", "bfloat16"])
def test_tensors_are_arrays(preprocessor, image, dtype):
    tensor = ops.convert_to_tensor(image if dtype == "uint8" else image / 255, dtype)
    expected = preprocessor.load_image(image)
    tolerance = 0.01 if dtype == "bfloat16" else 0
    np.testing.assert_allclose(preprocessor.load_image(tensor), expected, atol=tolerance)
    ((first,), (second,)), *_ = batch_examples(ops.stack([tensor, tensor]), "x")
    np.testing.assert_allclose(preprocessor.load_image(second), expected, atol=tolerance)
    np.testing.assert_array_equal(first, second)


def test_a_little_overshoot_is_clipped(preprocessor, image):
    levels = preprocessor.load_image(image / 255 * 1.0005)
    assert levels.max() <= 1


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "RGBA", "RGBa", "CMYK", "YCbCr", "I", "I;16", "F"]
)
def test_every_pil_mode(preprocessor, mode):
    levels = np.tile(np.linspace(0, 255, 64).astype("uint8"), (64, 1))
    image = Image.fromarray(levels)
    if mode in ("I", "I;16"):
        image = Image.fromarray(levels.astype("uint16") * 257)
        image = image.convert("I") if mode == "I" else image
    else:
        image = image.convert({"F": "F", "La": "LA", "RGBa": "RGBA"}.get(mode, "RGB"))
        image = image.quantize(64) if mode == "P" else image.convert(mode)
    assert image.mode == mode
    row = _levels(preprocessor.load_image(image))[28, :, 1]
    if mode == "1":  # dithered
        assert row[:14].mean() < row[-14:].mean() - 100
    else:
        np.testing.assert_allclose(row, np.linspace(0, 255, 56), atol=6)


def test_dark_images_of_16_bits_stay_dark(preprocessor):
    image = Image.fromarray(np.full((8, 8), 255, "uint16"))
    np.testing.assert_array_equal(_levels(preprocessor.load_image(image)), 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(preprocessor, image, tmp_path, orientation):
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(path, exif=exif)
    with Image.open(path) as opened:
        expected = preprocessor.load_image(np.asarray(ImageOps.exif_transpose(opened)))
    np.testing.assert_array_equal(preprocessor.load_image(path), expected)


def test_odd_exif_tags_do_not_matter(preprocessor, image, tmp_path):
    """The resolution as text, where Pillow's `exif_transpose` fails."""
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2)
    exif += struct.pack(">HHIHH", 0x112, 3, 1, 6, 0) + struct.pack(">HHI4s", 0x11A, 2, 4, b"72\0\0")
    exif += bytes(4)  # no further tags
    path = tmp_path / "odd.jpg"
    Image.fromarray(image).save(path, exif=exif)
    with Image.open(path) as opened:
        expected = preprocessor.load_image(np.rot90(np.asarray(opened), -1))
    np.testing.assert_array_equal(preprocessor.load_image(path), expected)


def test_layouts_of_arrays(preprocessor, image):
    grey = image[..., 0]
    expected = preprocessor.load_image(np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(preprocessor.load_image(grey), expected)
    np.testing.assert_array_equal(preprocessor.load_image(grey[..., None]), expected)
    first = np.moveaxis(image, -1, 0)
    np.testing.assert_array_equal(preprocessor.load_image(first), preprocessor.load_image(image))
    np.testing.assert_array_equal(preprocessor.load_image(first[:1]), expected)
    assert image_size(first) == image_size(image)
    with_alpha = np.concatenate([image, image[..., :1]], -1)
    np.testing.assert_array_equal(
        preprocessor.load_image(with_alpha), preprocessor.load_image(image)
    )


def test_images_are_read_in_threads(preprocessor, image, monkeypatch):
    threads = set()
    load_image = Preprocessor.load_image

    def spy(self, one):
        threads.add(threading.current_thread().name)
        return load_image(self, one)

    monkeypatch.setattr(Preprocessor, "load_image", spy)
    images = preprocessor.load_images([[image, image], [image, image[::-1]]])
    assert images.shape == (2, 2, 56, 56, 3)
    assert threading.current_thread().name not in threads
    np.testing.assert_array_equal(images[1, 1], load_image(preprocessor, image[::-1]))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_bytes_of_a_file(preprocessor, image, tmp_path, format):
    """As the file: by themselves, in a file object, in a list, and in an array as of `tf.data`."""
    path = tmp_path / "image"
    Image.fromarray(image).save(path, format)
    content, expected = path.read_bytes(), preprocessor.load_image(path)
    with open(path, "rb") as opened:
        for file in (content, io.BytesIO(content), opened, opened, np.array(content, object)):
            np.testing.assert_array_equal(preprocessor.load_image(file), expected)
            assert image_size(file) == image_size(path)
            images, _, _, is_single = batch_examples(file, "ocr")
            assert is_single
            assert images == [[content]]
    for files in ([content] * 2, np.array([content] * 2, object)):
        images, *_ = batch_examples(files, "ocr")
        assert images == [[content]] * 2
    assert batch_examples(str(path).encode(), "ocr")[0] == [[str(path)]]


def test_stored_images(preprocessor, image, tmp_path):
    """As Hugging Face's data sets have them without decoding."""
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    expected = preprocessor.load_image(path)
    for stored in (
        {"bytes": path.read_bytes(), "path": "not_here.png"},
        {"bytes": None, "path": str(path)},
    ):
        np.testing.assert_array_equal(preprocessor.load_image(stored), expected)
        assert image_size(stored) == image_size(path)
        images, _, _, is_single = batch_examples(stored, "ocr")
        assert is_single
        assert batch_examples([stored, stored], "ocr")[0] == images * 2


# Bad images


def test_bytes_that_are_no_image(preprocessor, image):
    with pytest.raises(ValueError, match="of 10,000 bytes is no image") as error:
        preprocessor.load_image(bytes(10_000))
    assert len(str(error.value)) < 300
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    with pytest.raises(ValueError, match="image of 500 bytes is damaged"):
        preprocessor.load_image(buffer.getvalue()[:500])


def test_missing_file(preprocessor, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cat\.jpg"):
        preprocessor.load_image(tmp_path / "cat.jpg")
    with pytest.raises(FileNotFoundError, match=r"are not fetched: download the image first"):
        preprocessor.load_image("https://example.com/cat.jpg")


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_a_file_that_is_no_image(preprocessor, tmp_path, content):
    path = tmp_path / "cat.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cat\.jpg.* no image"):
        preprocessor.load_image(path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_truncated_file(preprocessor, image, tmp_path, format):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format)
    path = tmp_path / "cut.img"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(ValueError, match=r"cut\.img.*damaged"):
        preprocessor.load_image(path)
    if format == "PNG":  # whose orientation may stand after the pixels
        with pytest.raises(ValueError, match=r"cut\.img.*damaged"):
            image_size(path)
    path.write_bytes(buffer.getvalue()[:30])  # in the header
    with pytest.raises(ValueError, match=r"cut\.img.*damaged"):
        preprocessor.load_image(path)


def test_decompression_bomb(preprocessor, image, tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.fromarray(image).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 3,000 pixels are more than twice that
    with pytest.raises(ValueError, match=r"bomb\.png.*too large.*MAX_IMAGE_PIXELS"):
        preprocessor.load_image(path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 5, 3), "uint8"), "at least one pixel"),
        (np.zeros((5, 0), "uint8"), "at least one pixel"),
        (np.zeros((2, 50, 60), "uint8"), "1, 3 or 4 channels.*shape \\(2, 50, 60\\)"),
        (np.zeros((5,), "uint8"), "height, width"),
        (np.zeros((2, 2, 5, 5, 5, 3), "uint8"), "height, width"),
        (np.full((5, 5, 3), np.nan), "NaN"),
        (np.full((5, 5, 3), np.inf), "NaN or infinity"),
        (np.full((5, 5, 3), 255.0), "astype\\('uint8'\\)"),
        (np.full((5, 5, 3), -0.5), "in \\[0, 1\\].*\\(images \\+ 1\\) / 2"),
        (np.zeros((5, 5, 3), "int64"), "uint8 in \\[0, 255\\] or float.*int64"),
        (np.zeros((5, 5, 3), bool), "bool"),
        (np.zeros((5, 5, 3), complex), "complex128"),
        (None, "Received: None"),
        (7, "Received: 7"),
        (Image.new("RGB", (0, 5)), "at least one pixel"),
    ],
)
def test_bad_arrays(preprocessor, array, message):
    with pytest.raises(ValueError, match=message):
        preprocessor.load_image(array)


def test_images_per_example_must_agree(preprocessor, image):
    with pytest.raises(ValueError, match=r"same number of images.*\[1, 2\]"):
        preprocessor.load_images([[image], [image, image]])
    with pytest.raises(ValueError, match="at least one"):
        preprocessor.load_images([[], []])


# Texts against the goldens


def test_tokens_equal_big_vision(preprocessor, data):
    cases = json.loads((data / "tokenization_goldens.json").read_text())["cases"]
    for case in cases:
        prefix = case["prefix"]
        ids, suffix_mask = preprocessor.tokenize(prefix, case["suffix"], end=True)
        expected = case["bv_train"]["ids"]
        expected_mask = case["bv_train"]["mask_ar"]
        if prefix.endswith("\n"):  # a newline that the user put is not added again
            position = expected_mask.index(1) - 1
            expected = expected[:position] + expected[position + 1 :]
            expected_mask = expected_mask[:position] + expected_mask[position + 1 :]
        assert ids == expected
        assert suffix_mask == [bool(m) for m in expected_mask]
        assert preprocessor.tokenize(prefix)[0] == expected[: expected_mask.index(1)]


def test_newline_is_added_once(preprocessor):
    assert preprocessor.tokenize("caption en\n") == preprocessor.tokenize("caption en")
    assert preprocessor.tokenize("")[0] == [2, 5]


@pytest.mark.parametrize(("prompt", "response"), [(None, ""), (3, ""), ("a", b"b")])
def test_texts_must_be_strings(preprocessor, prompt, response):
    with pytest.raises(ValueError, match=r"must be strings\. Received"):
        preprocessor.tokenize(prompt, response)


# Batches


def test_for_training_equals_goldens(preprocessor, data, image):
    cases = json.loads((data / "tokenization_goldens.json").read_text())["cases"]
    cases = [case for case in cases if not case["prefix"].endswith("\n")]
    x, y, weight = preprocessor.for_training(
        [[image]] * len(cases), [c["prefix"] for c in cases], [c["suffix"] for c in cases]
    )
    assert x["images"].shape == (len(cases), 1, 56, 56, 3)
    for row, case in enumerate(cases):
        golden = case["bv_train"]["pad_to_65"]
        assert x["token_ids"][row].tolist() == golden["text"]
        assert x["suffix_mask"][row].tolist() == [bool(m) for m in golden["mask_loss"]]
        assert x["padding_mask"][row].sum() == len(case["bv_train"]["ids"])
        assert y[row].tolist() == [*golden["text"][1:], 0]
        is_target = np.array([*golden["mask_loss"][1:], 0], bool)
        np.testing.assert_array_equal(weight[row] > 0, is_target)
        np.testing.assert_allclose(weight[row][is_target], 1 / is_target.sum())


def test_for_training_cuts_the_end(tokenizer, image):
    preprocessor = Preprocessor(tokenizer, 56, sequence_length=8)
    x, y, weight = preprocessor.for_training([[image]], ["caption en"], ["a red ball"])
    full, _ = preprocessor.tokenize("caption en", "a red ball", end=True)
    assert x["token_ids"][0].tolist() == full[:8]
    assert y[0].tolist() == [*full[1:8], 0]
    assert weight[0].tolist() == [0, 0, 0, 0, 0, 0.5, 0.5, 0]


def test_for_generation_aligns_right(preprocessor, image):
    batch = preprocessor.for_generation([[image], [image]], ["caption en", "ocr"], ["a red", ""])
    long, _ = preprocessor.tokenize("caption en", "a red")
    short, _ = preprocessor.tokenize("ocr")
    padding = len(long) - len(short)
    assert batch["token_ids"].tolist() == [long, [0] * padding + short]
    assert batch["padding_mask"][1].tolist() == [False] * padding + [True] * len(short)
    assert batch["suffix_mask"].sum(axis=1).tolist() == [len(long) - 6, 0]


def test_default_sequence_length(tokenizer):
    lengths = [Preprocessor(tokenizer, size).sequence_length for size in (224, 448, 896)]
    assert lengths == [128, 512, 512]


@pytest.mark.parametrize(
    "options", [{"interpolation": "nearest"}, {"sequence_length": 1}, {"sequence_length": 2.5}]
)
def test_bad_options(tokenizer, options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
        Preprocessor(tokenizer, 56, **options)


def test_what_is_no_tokenizer(tokenizer, tmp_path):
    class Other:  # as those of transformers, which begin each text with `<bos>`
        vocab_size = 1664

        def encode(self, text):
            return [2, *tokenizer.encode(text)]

    for other in ("tokenizer.model", tmp_path, Other(), None):
        with pytest.raises(ValueError, match=r"must be a keras_pg2\.Tokenizer, .*Received: tokeni"):
            Preprocessor(other, 56)


def test_columns_of_text_may_be_arrays(preprocessor, image):
    prompts, responses = np.array(["ocr", "caption en"]), np.array(["a", ""])
    found = preprocessor.for_generation([[image]] * 2, prompts, responses)
    expected = preprocessor.for_generation([[image]] * 2, [*prompts], [*responses])
    np.testing.assert_array_equal(found["token_ids"], expected["token_ids"])


def test_copies(preprocessor, image):
    preprocessor.load_images([[image]])
    assert copy.deepcopy(preprocessor).get_config() == preprocessor.get_config()


# What users pass


def test_batches_are_lists_of_lists(preprocessor, image):
    for images, prompts, message in (
        ([image, image], ["a", "b"], "a list of lists"),
        (["cat.jpg"], ["a"], r"a list of lists.*'cat\.jpg'"),
        (
            [[image]],
            "caption en",
            r"1 examples of images, prompts='caption en'",
        ),
        ([[image], [image]], ["a"], r"2 examples of images, prompts=\['a'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            preprocessor.for_generation(images, prompts)
        with pytest.raises(ValueError, match=message):
            preprocessor.for_training(images, prompts, ["a"] * len(prompts))
    for method in (preprocessor.for_generation, preprocessor.for_training):
        with pytest.raises(ValueError, match="`responses` must be lists of one length"):
            method([[image]], ["a"], ["b", "c"])
        with pytest.raises(ValueError, match="lists of one length"):
            method([], [], [])


def test_sizes_of_a_preprocessor(tokenizer):
    preprocessor = Preprocessor(tokenizer, np.int64(56), np.int64(24))
    assert json.dumps(preprocessor.get_config())
    for name, value in (("image_size", 0), ("image_size", 56.0), ("sequence_length", 1)):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer .*={value}"):
            Preprocessor(tokenizer, **{"image_size": 56, name: value})


def test_examples_of_one_image_and_one_prompt(image):
    for single in ("cat.jpg", image, Image.fromarray(image)):
        images, prompts, responses, is_single = batch_examples(single, "ocr")
        assert (len(images), len(images[0]), prompts, responses) == (1, 1, ["ocr"], [""])
        assert is_single


def test_prompts_must_be_texts(image):
    with pytest.raises(ValueError, match=r"`prompts` must be a str or a list of str\..*: 5"):
        batch_examples(image, 5)


def test_examples_broadcast():
    assert batch_examples("a", ["x", "y"]) == ([["a"], ["a"]], ["x", "y"], ["", ""], False)
    assert batch_examples(["a", "b"], "x", "r") == ([["a"], ["b"]], ["x"] * 2, ["r"] * 2, False)
    assert batch_examples([["a", "b"]], "x") == ([["a", "b"]], ["x"], [""], False)
    pairs = np.zeros((3, 2, 4, 4, 3), "uint8")  # three examples of two images
    for form in (pairs, list(pairs), [list(pair) for pair in pairs]):
        images, *_ = batch_examples(form, "x")
        assert [[image.shape for image in images_of] for images_of in images] == [
            [(4, 4, 3)] * 2
        ] * 3


def test_examples_of_strings_of_any_kind(image):
    for form in (b"ocr", np.array("ocr"), np.array(b"ocr"), np.array("ocr", dtype=object)):
        assert batch_examples("a", form, form) == ([["a"]], ["ocr"], ["ocr"], True)
        assert batch_examples(form, "x") == ([["ocr"]], ["x"], [""], True)
    for form in (np.array(["a", "b"]), [b"a", b"b"], ("a", "b"), iter("ab")):
        assert batch_examples(form, "x") == ([["a"], ["b"]], ["x"] * 2, [""] * 2, False)
    assert batch_examples([np.array(["a", "b"])], "x") == ([["a", "b"]], ["x"], [""], False)
    assert batch_examples("a", np.array([b"x", b"y"]))[1] == ["x", "y"]
    tensorflow = pytest.importorskip("tensorflow")
    x, xy = tensorflow.constant("x"), tensorflow.constant(["x", "y"])
    assert batch_examples(x, x, x) == ([["x"]], ["x"], ["x"], True)
    assert batch_examples(xy, xy) == ([["x"], ["y"]], ["x", "y"], ["", ""], False)


def test_examples_from_arrays(image):
    images, *_ = batch_examples(np.stack([image, image]), "x")
    assert [len(item) for item in images] == [1, 1]
    images, *_ = batch_examples(np.stack([[image, image, image]]), "x")
    assert [len(item) for item in images] == [3]


@pytest.mark.parametrize(
    ("images", "prompts", "responses"),
    [
        (["a", "b"], ["x"], None),
        ([], [], None),
        ("a", [], None),
        ([], "x", None),
        (["a"], ["x"], ["r", "s"]),
    ],
)
def test_examples_must_be_as_many(images, prompts, responses):
    with pytest.raises(ValueError, match=r"as many.*Received: \d images, \d prompts"):
        batch_examples(images, prompts, responses)


def test_one_open_image_many_times(preprocessor, tmp_path):
    """PIL reads its pixels at the first use, which two threads cannot do at once."""
    levels = np.random.default_rng(0).integers(0, 256, (600, 600, 3), "uint8")
    Image.fromarray(levels).save(tmp_path / "noise.png")
    expected = preprocessor.load_image(tmp_path / "noise.png")
    for _ in range(3):
        opened = Image.open(tmp_path / "noise.png")
        loaded = preprocessor.load_images([[opened, opened], [opened, opened]])
        np.testing.assert_array_equal(loaded, np.broadcast_to(expected, loaded.shape))
