import json

import numpy as np
import pytest
from PIL import Image

from keras_pg2 import Tokenizer, cli
from keras_pg2.checkpoints import io, presets


@pytest.fixture
def picture(tmp_path, image):
    path = tmp_path / "picture.png"
    Image.fromarray(image).save(path)
    return str(path)


def test_generate(data, picture, capsys):
    preset = str(data / "hf_tiny_paligemma2")
    assert cli.main(["generate", picture, "ocr", "--preset", preset, "--max-new-tokens", "4"]) == 0
    first = capsys.readouterr().out
    assert first.strip()
    cli.main(["generate", picture, "ocr", "--preset", preset, "--max-new-tokens", "2"])
    assert first.startswith(capsys.readouterr().out.rstrip("\n"))


def test_errors_are_one_line(data, picture, capsys):
    assert (
        cli.main(["generate", "nowhere.jpg", "ocr", "--preset", str(data / "hf_tiny_paligemma2")])
        == 1
    )
    captured = capsys.readouterr()
    assert captured.err == "keras-pg2: No such image file: 'nowhere.jpg'\n"
    assert cli.main(["generate", picture, "ocr", "--preset", "nowhere"]) == 1
    assert "`preset` must be" in capsys.readouterr().err


def test_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    assert "usage: keras-pg2" in capsys.readouterr().err


def test_generate_from_npz(data, picture, capsys):
    options = ["--preset", str(data / "bv_tiny_paligemma2.npz"), "--max-new-tokens", "2"]
    assert cli.main(["generate", picture, "ocr", *options]) == 1
    tokenizer = str(data / "tok" / "base.model")
    assert cli.main(["generate", picture, "ocr", *options, "--tokenizer", tokenizer]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("format", ["preset", "hf", "keras-hub", "big-vision"])
@pytest.mark.parametrize(
    "source", ["hf_tiny_paligemma2", "keras_hub_tiny_paligemma2", "bv_tiny_paligemma2.npz"]
)
def test_convert(data, tmp_path, source, format):
    """Every format to every other, bit for bit."""
    destination = tmp_path / ("out.npz" if format == "big-vision" else "out")
    tokenizer = ["--tokenizer", str(data / "tok" / "base.model")] if source[:2] == "bv" else []
    command = ["convert", str(data / source), str(destination), "--to", format, *tokenizer]
    assert cli.main(command) == 0
    expected = presets.find_checkpoint(data / source).weights()
    checkpoint = presets.find_checkpoint(destination)
    assert checkpoint.format == format
    weights = checkpoint.weights()
    assert set(weights) == set(expected)
    for path, tensor in weights.items():
        assert tensor.dtype == "float32"
        np.testing.assert_array_equal(tensor.read(), expected[path].read())
    if format != "big-vision":
        tokens = Tokenizer.from_file(checkpoint.tokenizer).encode("<loc0012> cat")
        assert tokens == Tokenizer.from_file(data / "tok" / "tokenizer.model").encode(
            "<loc0012> cat"
        )
    assert [path.name for path in tmp_path.iterdir()] == [destination.name]


@pytest.mark.parametrize("format", ["preset", "hf", "keras-hub", "big-vision"])
def test_convert_to_bfloat16_and_back(data, tmp_path, format):
    destination = tmp_path / ("out.npz" if format == "big-vision" else "out")
    source = str(data / "hf_tiny_paligemma2")
    assert (
        cli.main(["convert", source, str(destination), "--to", format, "--dtype", "bfloat16"]) == 0
    )
    weights = presets.find_checkpoint(destination).weights()
    expected = presets.find_checkpoint(source).weights()
    for path, tensor in weights.items():
        assert tensor.dtype == "bfloat16"
        np.testing.assert_array_equal(tensor.read(), expected[path].read().astype("bfloat16"))


def test_convert_does_not_overwrite(data, tmp_path, capsys):
    source, destination = str(data / "hf_tiny_paligemma2"), tmp_path / "out"
    destination.mkdir()
    (destination / "precious").write_text("data")
    command = ["convert", source, str(destination), "--to", "hf"]
    assert cli.main(command) == 1
    assert "--force" in capsys.readouterr().err
    assert (destination / "precious").read_text() == "data"
    assert cli.main([*command, "--force"]) == 0
    assert not (destination / "precious").exists()


def test_interrupted_conversion_leaves_nothing(data, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    destination = tmp_path / "out"
    command = ["convert", str(data / "hf_tiny_paligemma2"), str(destination), "--to", "preset"]
    assert cli.main(command) == 0
    before = sorted(path.name for path in destination.iterdir())
    monkeypatch.setattr(io, "_write_values", fail)
    assert cli.main([*command, "--force"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in destination.iterdir()) == before


def test_info(data, capsys):
    assert cli.main(["info", "paligemma2-3b", "--image-size", "448"]) == 0
    text = capsys.readouterr().out
    assert "3,032,979,696" in text
    assert "image_size=448" in text
    assert cli.main(["info", str(data / "hf_tiny_paligemma2_bf16"), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["kind"] == "hf checkpoint"
    assert info["parameters"]["total"] == 158_556
    assert info["stored_parameters"] == {"bfloat16": 158_556}
    assert info["weight_bytes"]["bfloat16"] == 317_112
