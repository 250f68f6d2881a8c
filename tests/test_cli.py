import pytest
from PIL import Image

from keras_pg2 import cli


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
