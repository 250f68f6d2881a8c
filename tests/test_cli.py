import functools
import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import keras_pg2
from keras_pg2 import PaliGemma2, Tokenizer, cli
from keras_pg2.checkpoints import io, presets


@pytest.fixture(scope="module", autouse=True)
def shared_models():
    """A preset is loaded, and its programs compiled, once: a command changes no model."""
    load = functools.cache(PaliGemma2.from_preset)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PaliGemma2, "from_preset", load)
        yield


@pytest.fixture
def image_path(tmp_path, image):
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    return str(path)


def test_generate(data, image_path, capsys):
    preset = str(data / "hf_tiny_paligemma2")
    command = ["generate", image_path, "ocr", "--preset", preset, "--max-new-tokens"]
    assert cli.main([*command, "4"]) == 0
    first = capsys.readouterr().out
    assert first.strip()
    cli.main([*command, "2"])
    assert first.startswith(capsys.readouterr().out.rstrip("\n"))


@pytest.fixture
def folder(tmp_path, image):
    """Three images, the second of which is damaged, and another file."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abc":
        Image.fromarray(image).save(folder / f"{name}.png")
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:2000])
    (folder / "notes.txt").write_text("no image")
    return folder


def run(capsys, data, *command, code=0):
    preset = str(data / "hf_tiny_paligemma2")
    assert cli.main([*command, "--preset", preset, "--max-new-tokens", "4"]) == code
    return capsys.readouterr()


def test_tasks_ask_in_the_words_of_the_training(data, image_path, capsys):
    for command, prompt in [
        (("caption", image_path, "--lang", "de", "--style", "short"), "cap de"),
        (("answer", image_path, "what?", "--lang", "fr"), "answer fr what?"),
        (("ocr", image_path), "ocr"),
    ]:
        expected = run(capsys, data, "generate", image_path, prompt).out
        assert run(capsys, data, *command).out == expected
        assert run(capsys, data, *command, "--stream").out == expected
        line = json.loads(run(capsys, data, *command, "--json").out)
        assert line == {"image": image_path, "text": expected.removesuffix("\n")}


@pytest.mark.parametrize("pattern", ["", "*.png"])
def test_folders_and_patterns(data, folder, capsys, pattern):
    name = str(folder / pattern) if pattern else str(folder)
    captured = run(capsys, data, "ocr", name, "--json", "--batch-size", "1", code=1)
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["image"] for line in lines] == [str(folder / "a.png"), str(folder / "c.png")]
    assert lines[0]["text"] == lines[1]["text"]
    assert "b.png" in captured.err
    assert "1 of 3 images could not be read" in captured.err
    (folder / "folder.png").mkdir()  # is no image
    text = run(capsys, data, "ocr", name, code=1).out
    assert text.startswith(f"{folder / 'a.png'}\t")


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="has no such names of pipes")
def test_an_image_from_a_pipe(data, folder, capsys):
    expected = run(capsys, data, "ocr", str(folder / "a.png")).out
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as file:
        file.write((folder / "a.png").read_bytes())
    try:
        assert run(capsys, data, "ocr", f"/dev/fd/{reader}").out == expected
    finally:
        os.close(reader)


def test_endings_of_images(tmp_path):
    names = ["a.JPG", "b.jfif", "c.avif", "d.jp2", "e.ppm", "f.webp", "notes.txt"]
    for name in names:
        (tmp_path / name).touch()
    assert cli._image_paths([str(tmp_path)]) == [str(tmp_path / name) for name in names[:-1]]


@pytest.mark.slow_if_compiled
def test_detect(data, folder, capsys, tmp_path):
    command = ["detect", str(folder), "cat ; dog", "--constrained", "--max-new-tokens", "9"]
    captured = run(capsys, data, *command, "--json", "--draw", str(tmp_path / "drawn"), code=1)
    lines = [json.loads(line) for line in captured.out.splitlines()]
    for line in lines:
        assert (line["width"], line["height"]) == (60, 50)
        for found in line["detections"]:
            assert found["label"] in "cat dog"
            assert len(found["box"]) == 4
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["a.png", "c.png"]
    assert Image.open(tmp_path / "drawn" / "a.png").size == (480, 400)
    run(capsys, data, *command, "--draw", str(tmp_path / "drawn"), code=1)  # exists
    one = str(folder / "a.png")
    out = tmp_path / "new" / "one.png"
    captured = run(capsys, data, "detect", one, "cat", "--constrained", "--draw", str(out))
    assert out.exists()
    assert captured.out.startswith(("cat\t", "nothing found", "\t", "c"))
    out = tmp_path / "pattern.png"
    run(capsys, data, "detect", str(folder / "a*.png"), "cat", "--draw", str(out))
    assert Image.open(out).size == (480, 400)


def test_bad_images_and_patterns(data, folder, capsys, tmp_path):
    for image, message in [
        (folder / "b.png", "b.png"),
        (tmp_path / "*.jpg", "No file is like"),
        (tmp_path / "images" / "none.png", "No such image file"),
    ]:
        captured = run(capsys, data, "ocr", str(image), code=1)
        assert message in captured.err
        assert captured.out == ""
    (tmp_path / "empty").mkdir()
    assert "has no images" in run(capsys, data, "ocr", str(tmp_path / "empty"), code=1).err
    assert "--stream" in run(capsys, data, "ocr", str(folder), "--stream", code=1).err
    same = tmp_path / "same"
    same.mkdir()
    Image.new("RGB", (9, 9)).save(same / "a.png")
    two = [str(same / "a.png"), str(folder / "a.png")]
    captured = run(capsys, data, "detect", *two, "cat", "--draw", str(tmp_path / "d"), code=1)
    assert "different names" in captured.err


def test_errors_are_one_line(data, image_path, capsys):
    assert (
        cli.main(["generate", "nowhere.jpg", "ocr", "--preset", str(data / "hf_tiny_paligemma2")])
        == 1
    )
    captured = capsys.readouterr()
    assert captured.err == "keras-pg2: No such image file: 'nowhere.jpg'\n"
    assert cli.main(["generate", image_path, "ocr", "--preset", "nowhere"]) == 1
    assert "`preset` must be" in capsys.readouterr().err
    assert cli.main(["ocr", "https://example.com/cat.jpg?size=1"]) == 1
    assert "download 'https://example.com/cat.jpg?size=1' first" in capsys.readouterr().err


def test_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2
    assert "usage: keras-pg2" in capsys.readouterr().err


@pytest.mark.slow_if_compiled
def test_generate_from_npz(data, image_path, capsys):
    options = ["--preset", str(data / "bv_tiny_paligemma2.npz"), "--max-new-tokens", "2"]
    assert cli.main(["generate", image_path, "ocr", *options]) == 1
    tokenizer = str(data / "tok" / "base.model")
    assert cli.main(["generate", image_path, "ocr", *options, "--tokenizer", tokenizer]) == 0
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


def test_convert_tells_what_is_lost(data, tmp_path, caplog):
    source = str(data / "hf_tiny_paligemma2")  # queries scaled by another number than head_dim
    assert cli.main(["convert", source, str(tmp_path / "x.npz"), "--to", "big-vision"]) == 0
    assert "`from_preset(..., query_pre_attn_scalar=10)`" in caplog.text


def test_convert_does_not_overwrite(data, tmp_path, capsys):
    source, destination = str(data / "hf_tiny_paligemma2"), tmp_path / "out"
    destination.mkdir()
    (destination / "precious").write_text("data")
    command = ["convert", source, str(destination), "--to", "hf"]
    assert cli.main(command) == 1
    assert "--force" in capsys.readouterr().err
    assert cli.main([*command, "--force"]) == 1
    assert "other things than a checkpoint" in capsys.readouterr().err
    assert (destination / "precious").read_text() == "data"
    (destination / "precious").unlink()
    assert cli.main([*command, "--force"]) == 0  # an empty folder
    assert cli.main(command) == 1
    assert cli.main([*command, "--force"]) == 0


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


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["caption", "--lang", "?"], "`lang`"),
        (["answer", " "], "`questions`"),
        (["detect", ";"], "`things`"),
        (["ocr", "--max-new-tokens", "0"], "--max-new-tokens must be positive"),
        (["ocr", "none.png"], "No such image file: 'none.png'"),
        (["detect", __file__, "cat", "--draw", __file__], "--draw needs a folder"),
        (["detect", __file__, "cat", "--draw", "a.png"], "--draw needs a folder"),
        (["detect", "cat", "--draw", f"{__file__}/a/b.png"], "takes no files"),
        (["segment", "cat", "--codec", "nowhere.npz"], "No such file for --codec: 'nowhere.npz'"),
    ],
)
def test_arguments_are_checked_before_a_model_is_loaded(image_path, capsys, command, message):
    name, *rest = command
    assert cli.main([name, image_path, *rest, "--preset", "no such preset"]) == 1
    assert message in capsys.readouterr().err


def test_convert_with_the_tokenizer_of_another_model(data, tmp_path, capsys):
    folder = os.path.join(os.path.dirname(keras_pg2.tiny.__file__), "paligemma2-tiny-digits-112")
    tokenizer = os.path.join(folder, "tokenizer.model")
    source, destination = str(data / "bv_tiny_paligemma2.npz"), str(tmp_path / "out")
    command = ["convert", source, destination, "--to", "preset", "--tokenizer", tokenizer]
    assert cli.main(command) == 1
    assert "it is another model's tokenizer" in capsys.readouterr().err
    assert not os.path.exists(destination)


def test_npz_without_a_tokenizer(data, image_path, tmp_path, capsys):
    path = str(tmp_path / "model.npz")
    cli.main(["convert", str(data / "hf_tiny_paligemma2"), path, "--to", "big-vision"])
    assert cli.main(["ocr", image_path, "--preset", path]) == 1
    assert "pass the path of paligemma_tokenizer.model as --tokenizer" in capsys.readouterr().err


@pytest.mark.slow_if_compiled
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_and_quantization(data, image_path, monkeypatch, dtype):
    loaded = []
    load = PaliGemma2.from_preset

    def record(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(PaliGemma2, "from_preset", record)
    command = ["ocr", image_path, "--preset", str(data / "hf_tiny_paligemma2"), "--dtype", dtype]
    assert cli.main([*command, "--quantize", "int8", "--max-new-tokens", "1"]) == 0
    assert loaded[-1].compute_dtype == dtype
    assert loaded[-1].text.embedding.quantized.mode == "int8"


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"keras-pg2 {keras_pg2.__version__}\n"


def test_interruption(image_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(PaliGemma2, "from_preset", interrupt)
    assert cli.main(["ocr", image_path]) == 130


def test_an_interruption_ends_the_process(monkeypatch):
    codes = []
    monkeypatch.setattr(cli, "main", lambda: 130)
    monkeypatch.setattr(cli.os, "_exit", codes.append)
    with pytest.raises(SystemExit):
        cli.run()
    assert codes == [130]


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_closed_streams(image_path, data, monkeypatch, capsys, name):
    monkeypatch.setattr(sys, name, None)
    command = ["ocr", image_path, "--max-new-tokens", "2", "--json"]
    assert cli.main([*command, "--preset", str(data / "hf_tiny_paligemma2")]) == 0
    output = capsys.readouterr()
    assert not (output.out if name == "stdout" else output.err)
    if name == "stderr":
        assert list(json.loads(output.out)) == ["image", "text"]


def test_draw_in_the_home_folder(folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    command = ["detect", str(folder / "a.png"), "cat", "--max-new-tokens", "2", "--draw=~/drawn/"]
    assert cli.main([*command, "--preset", str(data / "hf_tiny_paligemma2")]) == 0
    assert (tmp_path / "home" / "drawn" / "a.png").exists()
    assert not (tmp_path / "~").exists()
    assert cli.main([*command, "--preset", "not loaded"]) == 1
    assert "exists already. Choose another path for --draw" in capsys.readouterr().err


def test_nobody_reads_on(image_path, monkeypatch):
    """As with `| head`."""

    def write(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr(PaliGemma2, "from_preset", write)
    with open(os.devnull, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        assert cli.main(["ocr", image_path]) == 141


def test_long_answers(data, image_path, monkeypatch):
    """The command line gives a task as many tokens as the method of its name."""
    found = []
    monkeypatch.setattr(
        PaliGemma2, "generate", lambda self, *args, **options: found.append(options) or ["a"]
    )
    preset = str(data / "hf_tiny_paligemma2")
    model = PaliGemma2.from_preset(preset)
    model.ocr(image_path)
    model.caption(image_path, style="detailed")
    cli.main(["ocr", image_path, "--preset", preset])
    cli.main(["caption", image_path, "--style", "detailed", "--preset", preset])
    assert [options["max_new_tokens"] for options in found] == [128] * 4
    cli.main(["caption", image_path, "--preset", preset])
    assert "max_new_tokens" not in found[-1]


def test_info_of_a_hub_needs_no_weights(data, tmp_path, monkeypatch, capsys):
    shutil.copy(data / "hf_tiny_paligemma2" / "config.json", tmp_path)
    hub = pytest.importorskip("huggingface_hub")

    def download(repository, revision, allow_patterns):
        assert allow_patterns == ["config.json"]
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert cli.main(["info", "hf://me/mine", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["parameters"]["total"] == 158_556
    assert info["stored_parameters"] == {}


def test_info(data, capsys):
    assert cli.main(["info", "paligemma2-3b", "--image-size", "448"]) == 0
    text = capsys.readouterr().out
    assert "3,032,979,696" in text
    assert "image_size=448" in text
    assert cli.main(["info", "paligemma2-3b", "--image-size", "0"]) == 1
    assert "image_size" in capsys.readouterr().err
    assert cli.main(["info", str(data / "hf_tiny_paligemma2_bf16"), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["kind"] == "hf checkpoint"
    assert info["parameters"]["total"] == 158_556
    assert info["stored_parameters"] == {"bfloat16": 158_556}
    assert info["weight_bytes"]["bfloat16"] == 317_112
