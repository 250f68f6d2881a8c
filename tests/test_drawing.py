import numpy as np
import pytest
from PIL import Image, ImageFont

from keras_pg2 import Detection, Detections, draw, drawing
from keras_pg2.drawing import _color, _edge


def scene(width=640, height=480):
    mask = np.zeros((height, width), bool)
    mask[100:200, 100:250] = True
    mask[120:140, 120:150] = False
    items = (
        Detection("star", (100.0, 100.0, 250.0, 200.0), 0.87, mask),
        Detection("star", (110.0, 105.0, 260.0, 210.0), 0.5),
        Detection("", (300.0, 50.0, 400.0, 90.0)),
    )
    return Detections(items, width, height)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_boxes_are_seen_on_every_ground(level):
    image = np.full((480, 640, 3), level, "uint8")
    drawn = np.asarray(draw(image, scene()))
    assert drawn.shape == image.shape
    color = _color(scene()[2])
    # The sides of the last box: its colour between two black lines.
    line = drawn[70, 300:310]
    assert (line[0] == 0).all()
    assert (line[1:3] == color).all()
    assert (drawn[70, 340] == level).all()  # the inside is as it was
    assert (image == level).all()


def test_masks_are_tinted_inside():
    image = np.full((480, 640, 3), 100, "uint8")
    drawn = np.asarray(draw(image, scene())).astype(int)
    color = np.array(_color(scene()[0]))
    np.testing.assert_allclose(drawn[170, 150], 100 + 0.45 * (color - 100), atol=1)
    assert (drawn[130, 130] == 100).all()  # in the hole


def test_edges():
    mask = np.zeros((7, 8), bool)
    mask[1:6, 1:7] = True
    expected = mask.copy()
    expected[2:5, 2:6] = False
    np.testing.assert_array_equal(_edge(mask, 1), expected)
    np.testing.assert_array_equal(_edge(mask, 4), mask)
    full = np.ones((4, 4), bool)  # the image's own border is an edge too
    assert _edge(full, 1).sum() == 12


def test_labels_avoid_each_other():
    """Three boxes on one another: three labels, none of which covers another."""
    items = tuple(Detection(name, (200.0, 200.0, 300.0, 260.0)) for name in ("a", "b", "c"))
    drawn = np.asarray(draw(np.full((480, 640, 3), 128, "uint8"), Detections(items, 640, 480)))
    sizes = [(drawn == _color(item)).all(axis=-1).sum() for item in items]
    alone = np.asarray(draw(np.full((480, 640, 3), 128, "uint8"), Detections(items[:1], 640, 480)))
    frame = (alone == _color(items[0])).all(axis=-1)
    frame[200:260, 200:300] = False
    assert min(sizes) >= 0.9 * frame.sum()  # the label of each is there as a whole


def test_colors_belong_to_labels():
    names = ["cat", "dog", "sofa", "star", "red star", "7", "8"]
    colors = [_color(Detection(name, (0, 0, 1, 1))) for name in names]
    assert len(set(colors)) == len(colors)
    assert colors[0] == _color(Detection("cat", (5, 5, 9, 9), 0.3))


def test_small_images_are_enlarged():
    drawn = draw(np.zeros((112, 112, 3), "uint8"), Detections((), 112, 112))
    assert drawn.size == (448, 448)
    assert drawn.mode == "RGB"


def test_boxes_at_the_border():
    items = (
        Detection("everything", (0.0, 0.0, 640.0, 480.0), 1.0),
        Detection("a corner", (630.0, 470.0, 640.0, 480.0)),
        Detection("a very long name that is wider than the image itself " * 2, (0, 0, 1, 1)),
    )
    drawn = np.asarray(draw(Image.new("L", (640, 480), 128), Detections(items, 640, 480)))
    assert (drawn[300, 0] == 0).all()
    assert (drawn[479, 300] == 0).all()


def test_another_image():
    with pytest.raises(ValueError, match="640 × 480"):
        draw(np.zeros((10, 10, 3), "uint8"), scene())
    with pytest.raises(TypeError, match=r"the Detections of one image.* Received: list"):
        draw(Image.new("L", (640, 480)), [scene()])


def test_an_image_looks_as_it_did(data):
    """The golden was looked at. Letters may differ a little between versions of Pillow."""
    expected = np.asarray(Image.open(data / "drawn.png"), "float32")
    y, x = np.mgrid[:480, :640]
    image = np.stack([x * 255 / 639, y * 255 / 479, (x + y) * 255 / 1118], axis=-1)
    drawn = np.asarray(draw(image.astype("uint8"), scene()), "float32")
    assert np.abs(drawn - expected).mean() < 0.5


def test_letters_that_the_font_lacks(monkeypatch, caplog):
    """Whichever fonts are installed: Pillow's own has English letters alone."""
    read, own = ImageFont.truetype, ImageFont.load_default(20)
    image = np.zeros((480, 640, 3), "uint8")
    cat = Detections((Detection("кошка", (9.0, 9.0, 99.0, 99.0)),), 640, 480)
    installed = []

    class Full:
        lacks = ""

        def getmask(self, letter):
            return own.getmask("i" if letter in self.lacks + "\uffff" else "m")

    class Most(Full):
        lacks = "ш"

    def truetype(font, *args, **kwargs):
        if not isinstance(font, str):  # Pillow's own is no file
            return read(font, *args, **kwargs)
        if font not in installed:
            raise OSError(font)
        return Most() if font == drawing._FONTS[0] else Full()

    monkeypatch.setattr(ImageFont, "truetype", truetype)
    assert drawing._font(None, 20, "cat 87%").getname() == own.getname()
    draw(image, cat)
    assert "the letters 'акош': pass `font` to `draw`" in caplog.text
    installed.append(drawing._FONTS[0])
    assert isinstance(drawing._font(None, 20, "кошка"), Most)
    assert "the letters 'ш': pass `font` to `draw`" in caplog.text
    installed += [drawing._FONTS[1], "mine.ttf"]
    assert isinstance(drawing._font(None, 20, "кошка"), Full)
    assert isinstance(drawing._font("mine.ttf", 20, "cat"), Full)


def test_a_font_that_is_not_there():
    image = np.zeros((480, 640, 3), "uint8")
    with pytest.raises(OSError, match=r"path of a TrueType font. Received: font='mine\.ttf'"):
        draw(image, scene(), font="mine.ttf")
