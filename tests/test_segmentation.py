import json
import pathlib

import keras
import numpy as np
import pytest
import safetensors.numpy
from keras import ops

import keras_pg2
from keras_pg2 import SegmentationCodec, segmentation
from keras_pg2.checkpoints import names, presets
from keras_pg2.segmentation import encode_detection, encode_segmentation, mask_from_codes
from keras_pg2.tiny import train_codec

TINY_FILE = pathlib.Path(keras_pg2.__file__).parent / "tiny" / presets.TINY / presets.CODEC_FILE
# Few different shapes: jax compiles a program for each.
SMALL = {"widths": (8, 8, 8, 8), "num_residual_blocks": 1, "code_width": 6}


@pytest.fixture(scope="module")
def golden(data):
    """Codes and masks that big_vision computes. They must never be adjusted."""
    with np.load(data / "seg_vqvae_tiny_expected.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def official(data):
    """The official architecture with weights of our own. Tests must not change it."""
    return SegmentationCodec.from_file(data / "seg_vqvae_tiny.npz")


@pytest.fixture(scope="module")
def tiny():
    """The codec of the tiny model. Tests must not change it."""
    return SegmentationCodec.from_file(TINY_FILE)


@pytest.fixture(scope="module")
def small():
    """Random weights. Tests must not change it."""
    keras.utils.set_random_seed(0)
    return SegmentationCodec(**SMALL)


@pytest.fixture
def small_file(small, tmp_path):
    small.save_file(tmp_path / "codec.safetensors")
    return tmp_path / "codec.safetensors"


def values(codec):
    return {k: ops.convert_to_numpy(v) for k, v in codec._variables_by_path().items()}


# Masks and codes


def test_codes_of_big_vision(official, golden):
    assert official.encode(golden["encode_masks"]).tolist() == golden["encode_codes"].tolist()


def test_features_of_big_vision(official, golden):
    features = official._features(golden["encode_masks"][:2].astype("float32"))
    expected = golden["encoder_output"]
    np.testing.assert_allclose(ops.convert_to_numpy(features), expected, rtol=0, atol=1e-4)


def test_masks_of_big_vision(official, golden):
    masks = official.decode(golden["decode_codes"])
    expected = golden["decode_masks"][..., 0]
    assert masks.dtype == np.float32
    assert np.abs(masks - expected).max() < 2e-6 * np.abs(expected).max()


def test_suffix_of_big_vision(official, golden):
    mask = golden["refcoco_mask"] > 127
    height, width = mask.shape
    y1, x1, y2, x2 = golden["refcoco_bbox_yxyx"].astype("float64")
    box = (x1 * width, y1 * height, x2 * width, y2 * height)
    suffix = encode_segmentation(official, mask[None], [""], [box])
    assert suffix == str(golden["refcoco_suffix"])


def test_the_table_names_every_variable_once(official):
    rows = [line.split() for line in names.SEGMENTATION_CODEC.split("\n") if line]
    assert len({source for source, _ in rows}) == len(rows)
    assert sorted(path for _, path in rows) == sorted(official._variables_by_path())


def test_batches_equal_one_by_one(small):
    masks = np.random.default_rng(0).random((70, 64, 64)).astype("float32")
    codes = small.encode(masks)
    assert codes.shape == (70, 16)
    assert codes.dtype == np.int32
    assert len(np.unique(codes)) > 1
    np.testing.assert_array_equal(small.encode(masks[66:67, :, :, None]), codes[66:67])
    np.testing.assert_array_equal(small.encode(ops.convert_to_tensor(masks[:3])), codes[:3])
    decoded = small.decode(codes)
    assert decoded.shape == (70, 64, 64)
    np.testing.assert_allclose(small.decode(codes[66:67]), decoded[66:67], atol=1e-6)
    assert small.encode(np.zeros((0, 64, 64))).shape == (0, 16)
    assert small.decode(np.zeros((0, 16), int)).shape == (0, 64, 64)


def test_call_is_encode_and_decode(small):
    masks = np.random.default_rng(0).random((3, 64, 64)).astype("float32")
    decoded = ops.convert_to_numpy(small(masks))
    np.testing.assert_allclose(decoded, small.decode(small.encode(masks)), atol=1e-6)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.zeros((64, 64)), r"must be \(batch, 64, 64\).*Received: shape \(64, 64\)"),
        (np.zeros((1, 32, 32), bool), "`crop_masks` makes them so"),
        (np.full((1, 64, 64), 255, "uint8"), r"divide levels up to 255 by 255.*\[255"),
        (np.full((1, 64, 64), np.nan), r"must be in \[0, 1\]"),
    ],
)
def test_masks_that_cannot_be_encoded(small, masks, message):
    with pytest.raises(ValueError, match=message):
        small.encode(masks)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((1, 15), int), r"must be integers \(batch, 16\).*Received: shape \(1, 15\)"),
        (np.zeros(16, int), r"Received: shape \(16,\)"),
        (np.zeros((1, 16)), "dtype float64"),
        (np.full((1, 16), 128), r"must be in \[0, 128\).*\[128, 128\]"),
        (np.full((1, 16), -1), r"codes in \[-1, -1\]"),
    ],
)
def test_codes_that_cannot_be_decoded(small, codes, message):
    with pytest.raises(ValueError, match=message):
        small.decode(codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (16, 32, 64)}, "`widths` must be 4 positive integers"),
        ({"widths": (16, 32, 64, 0)}, r"Received: widths=\(16, 32, 64, 0\)"),
        ({"code_width": True}, "Received: code_width=True"),
        ({"num_residual_blocks": -1}, "Received: num_residual_blocks=-1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        SegmentationCodec(**options)


# Files


def test_a_file_holds_the_codec(small, small_file):
    loaded = SegmentationCodec.from_file(small_file)
    assert loaded.get_config() == small.get_config()
    for name, value in values(small).items():
        np.testing.assert_array_equal(values(loaded)[name], value, err_msg=name)
    assert ops.convert_to_numpy(loaded.usage).tolist() == [1] * 128
    # An array of NumPy in place of one would go to the accelerator at each call.
    assert all(ops.is_tensor(variable.value) for variable in loaded.variables)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_the_bytes(small, tmp_path, dtype):
    small.save_file(tmp_path / "half", dtype=dtype)
    stored = safetensors.numpy.load_file(tmp_path / "half")
    assert {array.dtype.name for array in stored.values()} == {dtype}
    codec = SegmentationCodec.from_file(tmp_path / "half")
    loaded = values(codec)
    for name, value in values(small).items():
        assert loaded[name].dtype == "float32"
        np.testing.assert_array_equal(loaded[name], value.astype(dtype).astype("float32"))
    masks = np.ones((2, 64, 64), "float32")
    np.testing.assert_allclose(
        ops.convert_to_numpy(codec(masks)), codec.decode(codec.encode(masks)), atol=1e-5
    )


def test_keras_file(small, tmp_path):
    small.save(tmp_path / "codec.keras")
    loaded = keras.saving.load_model(tmp_path / "codec.keras")
    for name, value in values(small).items():
        np.testing.assert_array_equal(values(loaded)[name], value, err_msg=name)


def test_nothing_is_overwritten_or_left_half(small, small_file, monkeypatch):
    before = small_file.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        small.save_file(small_file)

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            small.save_file(small_file, overwrite=True)
    assert small_file.read_bytes() == before
    assert [path.name for path in small_file.parent.iterdir()] == ["codec.safetensors"]
    small.save_file(small_file, dtype="float16", overwrite=True)
    assert len(small_file.read_bytes()) < len(before)


def test_wrong_dtype(small, tmp_path):
    with pytest.raises(ValueError, match="Received: dtype='int8'"):
        small.save_file(tmp_path / "codec", dtype="int8")


def test_the_official_file_is_downloaded(data, monkeypatch):
    def get_file(name, origin, cache_subdir):
        assert origin == "https://storage.googleapis.com/big_vision/paligemma/vae-oid.npz"
        return str(data / "seg_vqvae_tiny.npz")

    monkeypatch.setattr(keras.utils, "get_file", get_file)
    assert SegmentationCodec.from_file().count_params() > 2_000_000


def test_the_download_fails(monkeypatch):
    def get_file(*args, **kwargs):
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.utils, "get_file", get_file)
    with pytest.raises(OSError, match=r"vae-oid\.npz: URL fetch failure.*pass its path"):
        SegmentationCodec.from_file()


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Received: path='.*nowhere'"):
        SegmentationCodec.from_file(tmp_path / "nowhere")


@pytest.mark.parametrize("length", [0, 7, 1000, -1])
def test_cut_files(data, small_file, tmp_path, length):
    small_file.write_bytes(small_file.read_bytes()[:length])
    with pytest.raises(ValueError, match="is damaged"):
        SegmentationCodec.from_file(small_file)
    cut = tmp_path / "cut.npz"
    cut.write_bytes((data / "seg_vqvae_tiny.npz").read_bytes()[:length])
    with pytest.raises(ValueError, match=r"cut\.npz' is damaged"):
        SegmentationCodec.from_file(cut)


def test_damaged_bytes(data, tmp_path):
    content = bytearray((data / "seg_vqvae_tiny.npz").read_bytes())
    content[600_000:605_000] = bytes(5000)
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.npz' is damaged"):
        SegmentationCodec.from_file(tmp_path / "bad.npz")


def test_other_archives(data, tmp_path):
    with pytest.raises(ValueError, match="no segmentation codec") as caught:
        SegmentationCodec.from_file(data / "bv_tiny_paligemma2.npz")
    assert "Missing tensors (47): codebook" in str(caught.value)
    np.savez(tmp_path / "evil.npz", **{"encoder.0.bias": np.array([{}], dtype=object)})
    with pytest.raises(ValueError, match="Python object"):
        SegmentationCodec.from_file(tmp_path / "evil.npz")


def test_wrong_tensors_are_all_named(small_file):
    tensors = safetensors.numpy.load_file(small_file)
    with safetensors.safe_open(small_file, "np") as file:
        metadata = file.metadata()
    tensors["codebok"] = tensors.pop("codebook")
    tensors["decoder/output/bias"] = np.zeros(2, "float32")
    safetensors.numpy.save_file(tensors, small_file, metadata)
    with pytest.raises(ValueError, match="no segmentation codec") as caught:
        SegmentationCodec.from_file(small_file)
    message = str(caught.value)
    assert "Missing tensors (1): codebook" in message
    assert "Unknown tensors (1): codebok" in message
    assert "(1): decoder/output/bias: expected floats (1,), found float32 (2,)" in message


def test_nan_in_a_file(small_file):
    tensors = safetensors.numpy.load_file(small_file)
    with safetensors.safe_open(small_file, "np") as file:
        metadata = file.metadata()
    tensors["codebook"][0, 0] = np.nan
    safetensors.numpy.save_file(tensors, small_file, metadata)
    with pytest.raises(ValueError, match="damaged: codebook holds NaN"):
        SegmentationCodec.from_file(small_file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "pt"}, "must have the format 'keras_pg2.segmentation_codec'. Received: 'pt'"),
        ({"version": "2"}, "has version 2; this release reads version 1. Update"),
        ({"config": "{"}, "its config is no JSON object"),
        ({"config": "7"}, "its config is no JSON object"),
        ({"config": json.dumps({"widths": [1, 2]})}, "`widths` must be 4 positive integers"),
        ({"config": json.dumps({**SMALL, "depth": 3})}, "config of another kind.*depth"),
    ],
)
def test_wrong_metadata(small_file, changes, message):
    tensors = safetensors.numpy.load_file(small_file)
    with safetensors.safe_open(small_file, "np") as file:
        metadata = file.metadata()
    safetensors.numpy.save_file(tensors, small_file, {**metadata, **changes})
    with pytest.raises(ValueError, match=message):
        SegmentationCodec.from_file(small_file)


# Boxes and masks


def test_boxes_end_behind_the_last_pixel():
    masks = np.zeros((2, 6, 10), bool)
    masks[0, 2:4, 5:10] = masks[1, 0, 0] = True
    boxes = segmentation.boxes_of_masks(masks)
    assert boxes.tolist() == [[5, 2, 10, 4], [0, 0, 1, 1]]
    with pytest.raises(ValueError, match=r"none in masks\[1\]"):
        segmentation.boxes_of_masks(np.array([[[True]], [[False]]]))
    with pytest.raises(ValueError, match=r"`masks > 127`.*dtype uint8"):
        segmentation.boxes_of_masks(masks.astype("uint8"))


def test_crops():
    mask = np.zeros((1, 40, 40), bool)
    mask[0, 10:30, 10:20] = True  # the left half of its box
    (crop,) = segmentation.crop_masks(mask, [(10, 10, 30, 30)])
    assert crop.shape == (64, 64)
    np.testing.assert_allclose(crop[0, [0, 29, 34, 63]], [1, 1, 0, 0], atol=1e-6)
    assert 0 < crop[0, 32] < 1
    with pytest.raises(ValueError, match="Received: 1 masks, 2 boxes"):
        segmentation.crop_masks(mask, [(0, 0, 1, 1)] * 2)
    with pytest.raises(ValueError, match=r"none of masks\[0\] in x1, y1, x2, y2 = \[20"):
        segmentation.crop_masks(mask, [(20, 10, 30, 30)])


def test_masks_of_decoded_codes():
    decoded = np.ones((64, 64), "float32")
    decoded[:, 32:] = -1
    mask = mask_from_codes(decoded, (2, 1, 6, 3), width=8, height=4)
    assert mask.astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    for empty in [(6, 1, 2, 3), (2, 1, 2, 3), (9, 0, 12, 3)]:
        assert not mask_from_codes(decoded, empty, 8, 4).any()
    assert mask_from_codes(np.ones((64, 64)), (7.9, 3.9, 8, 4), 8, 4).sum() == 1
    assert mask_from_codes(decoded, (-8, -5, 80, 50), 8, 4).sum() == 16  # clipped first
    with pytest.raises(ValueError, match=r"one mask \(64, 64\).*shape \(1, 64, 64\)"):
        mask_from_codes(decoded[None], (0, 0, 1, 1), 8, 4)
    with pytest.raises(ValueError, match="`box` must be 4 numbers"):
        mask_from_codes(decoded, (0, 0, 1, np.nan), 8, 4)


# Strings


@pytest.mark.parametrize(
    ("boxes", "labels", "suffix"),
    [
        ([(50, 30, 160, 90)], ["cat"], "<loc0256><loc0256><loc0767><loc0818> cat"),
        ([(0, 0, 200, 120)], ["sofa"], "<loc0000><loc0000><loc1023><loc1023> sofa"),
        ([(-9, -9, 999, 60)], ["a b"], "<loc0000><loc0000><loc0512><loc1023> a b"),
        ([(20, 0, 40, 12)], [""], "<loc0000><loc0102><loc0102><loc0205>"),
        (
            [(0, 0, 100, 120), (100, 0, 200, 120)],
            ["cat", "dog"],
            "<loc0000><loc0000><loc1023><loc0512> cat ; <loc0000><loc0512><loc1023><loc1023> dog",
        ),
        ([], [], ""),
    ],
)
def test_detection(boxes, labels, suffix):
    assert encode_detection(boxes, labels, width=200, height=120) == suffix


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        ([(5, 5, 5, 9)], ["a"], r"x1 < x2 and y1 < y2.*Received: \[5.0, 5.0, 5.0, 9.0\]"),
        ([(200, 5, 300, 9)], ["a"], "overlap its image of height 120 and width 200"),
        ([(9, 5, 9.01, 9)], ["a"], r"a width and a height in location tokens.*9\.01"),
        ([(1, 2, 3)], ["a"], r"must be numbers \(count, 4\)"),
        ([(1, 2, 3, np.inf)], ["a"], r"must be numbers \(count, 4\)"),
        ([(1, 2, 3, 4)], ["a", "b"], "a list of 1 strings"),
        ([(1, 2, 3, 4)], "a", "Received: labels='a'"),
        ([(1, 2, 3, 4)], ["a ; b"], "without ';'.*Received: 'a ; b'"),
        ([(1, 2, 3, 4)], [3], "Received: 3"),
        ([(1, 2, 3, 4)], ["a<b"], "without ';', '<' and line breaks.*Received: 'a<b'"),
        ([(1, 2, 3, 4)], ["a\nb"], "line breaks"),
    ],
)
def test_wrong_objects(boxes, labels, message):
    with pytest.raises(ValueError, match=message):
        encode_detection(boxes, labels, width=200, height=120)


def test_segmentation(tiny):
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 10:30, 0:30] = masks[1, 5:35, 20:60] = True
    codes = tiny.encode(np.ones((1, 64, 64)))[0]
    full = "".join(f"<seg{code:03d}>" for code in codes)
    suffix = encode_segmentation(tiny, masks, ["cat", "dog"])
    assert suffix == (
        f"<loc0256><loc0000><loc0767><loc0512>{full} cat ; "
        f"<loc0128><loc0341><loc0895><loc1023>{full} dog"
    )
    batch = encode_segmentation(tiny, [masks, [], masks[:1]], [["cat", "dog"], [], ["cat"]])
    assert batch == [suffix, "", suffix.split(" ; ")[0]]
    assert encode_segmentation(tiny, masks, np.array(["cat", "dog"])) == suffix
    assert encode_segmentation(tiny, [], []) == ""
    with pytest.raises(ValueError, match="Received: 1, 2, 1"):
        encode_segmentation(tiny, [masks], [["cat", "dog"], []])
    with pytest.raises(ValueError, match="a list of 2 strings"):
        encode_segmentation(tiny, masks, ["cat"])


def test_strings_are_tokens(tiny, tokenizer):
    suffix = encode_segmentation(tiny, np.ones((1, 8, 8), bool), ["cat"])
    ids = tokenizer.encode(suffix)
    assert tokenizer.decode(ids) == suffix
    assert len(ids) == 20 + len(tokenizer.encode(" cat"))


# Training


def test_the_tiny_codec_keeps_shapes(tiny):
    assert TINY_FILE.stat().st_size < 1.2e6
    masks = train_codec.shape_masks(48, seed=123)
    assert len(np.unique(tiny.encode(train_codec.inside_boxes(masks)))) > 80
    ious = train_codec.round_trip_iou(tiny, masks)
    assert ious.mean() > 0.92
    assert ious.min() > 0.7


def test_the_tiny_codec_keeps_digits_it_never_saw(tiny):
    pytest.importorskip("sklearn")
    _, held_out = train_codec.digit_scans()
    ious = train_codec.round_trip_iou(tiny, train_codec.digit_masks(held_out, 60, seed=123))
    assert ious.mean() > 0.9
    assert ious.min() > 0.6


def test_the_command_does_not_train_in_vain(tmp_path, capsys):
    (tmp_path / "codec").write_text("")
    with pytest.raises(SystemExit):
        train_codec.main([str(tmp_path / "codec")])
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command(tmp_path):
    pytest.importorskip("sklearn")
    train_codec.main([str(tmp_path / "codec"), "--masks", "60", "--epochs", "1"])
    assert SegmentationCodec.from_file(tmp_path / "codec").widths == (8, 24, 48, 64)


def test_the_codebook_follows_the_features():
    codec = SegmentationCodec(**SMALL)
    rng = np.random.default_rng(0)
    usage, codebook = rng.uniform(0.5, 2, 128), rng.normal(size=(128, 6))
    codec.usage.assign(usage)
    codec.codebook.assign(codebook)
    masks = rng.random((2, 64, 64)).astype("float32")
    features = ops.convert_to_numpy(codec._features(masks))
    codes = ops.convert_to_numpy(codec._nearest(features))
    codec(masks, training=False)
    np.testing.assert_allclose(codec.codebook, codebook, rtol=1e-6)
    codec(masks, training=True)
    for row in range(128):
        mine = features[codes == row]
        new_usage = 0.98 * usage[row] + 0.02 * 128 * len(mine) / 32
        total = 0.98 * usage[row] * codebook[row] + 0.02 * 128 / 32 * mine.sum(axis=0)
        np.testing.assert_allclose(codec.usage[row], new_usage, rtol=1e-5)
        np.testing.assert_allclose(codec.codebook[row], total / new_usage, rtol=1e-4, atol=1e-5)


def test_dead_codes_start_again_where_features_are():
    codec = SegmentationCodec(**SMALL)
    codec.codebook.assign(np.full((128, 6), 1e6))
    features = np.random.default_rng(0).normal(size=(2, 4, 4, 6)).astype("float32")
    codec._move_codebook(ops.convert_to_tensor(features), ops.full((2, 4, 4), 7, dtype="int32"))
    rows = {tuple(row) for row in features.reshape(-1, 6).tolist()}
    codebook = ops.convert_to_numpy(codec.codebook).tolist()
    restarted = {tuple(row) for i, row in enumerate(codebook) if i != 7}
    assert restarted <= rows
    assert len(restarted) > 8
    assert ops.convert_to_numpy(codec.usage)[:7].tolist() == [1] * 7


def test_mixed_precision_keeps_the_codebook_in_float32():
    codec = SegmentationCodec(**SMALL, dtype="mixed_bfloat16")
    codec.codebook.assign(np.full((128, 6), 1 + 2**-20))
    codec(np.zeros((1, 64, 64), "float32"), training=True)
    codebook = ops.convert_to_numpy(codec.codebook)
    assert codebook.dtype == np.float32
    assert np.abs(codebook - 1).max() > 0.01  # dead rows moved


@pytest.mark.slow
def test_training():
    masks = train_codec.inside_boxes(train_codec.shape_masks(32, seed=0))
    codec = train_codec.train(masks, epochs=12, batch_size=8, learning_rate=5e-3, **SMALL)
    losses = codec.history.history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    keras.utils.set_random_seed(0)
    before = values(SegmentationCodec(**SMALL))
    for name, value in values(codec).items():  # gradients pass through the codebook
        assert np.abs(value - before[name]).max() > 0, name
