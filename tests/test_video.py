import fractions
import struct

import av
import numpy as np
import pytest

from keras_pg2 import frames_from_video


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Path of 25 images, each brighter than the one before."""
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(0, 250, 10):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, "uint8"))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("count", "levels"),
    [(5, [0, 60, 120, 180, 240]), (1, [0]), (2, [0, 240]), (30, None)],
)
def test_frames_are_evenly_spaced(video, count, levels):
    frames = frames_from_video(video, np.int64(count))
    assert len(frames) == count
    assert {frame.size for frame in frames} == {(64, 48)}
    means = [np.asarray(frame).mean() for frame in frames]
    if levels is None:
        levels = 10 * np.floor(np.linspace(0, 24, count) + 1e-3)
    np.testing.assert_allclose(means, levels, atol=4)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((0, 1, -1, 0, 48, 0), (lambda image: np.rot90(image, -1))),  # clockwise
        ((-1, 0, 0, -1, 64, 48), (lambda image: np.rot90(image, 2))),
        ((0, -1, 1, 0, 0, 64), np.rot90),
    ],
)
def test_a_turned_video(tmp_path, matrix, expected):
    image = np.zeros((48, 64, 3), "uint8")
    image[:16, :32] = 255
    path = tmp_path / "video.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())

    def stored(a, b, c, d, x, y):  # 16 bits after the point, but 30 in the last column
        return struct.pack(">9i", *(round(v * 65536) for v in (a, b, 0, c, d, 0, x, y)), 1 << 30)

    content = path.read_bytes()
    assert stored(1, 0, 0, 1, 0, 0) in content[content.index(b"tkhd") :]
    head, tail = content.split(b"tkhd")
    tail = tail.replace(stored(1, 0, 0, 1, 0, 0), stored(*matrix), 1)
    path.write_bytes(head + b"tkhd" + tail)
    (frame,) = frames_from_video(path, 1)
    difference = np.asarray(frame).astype(int) - expected(image)
    assert np.abs(difference).mean() < 6


def test_frames_are_of_different_length(tmp_path):
    """Ten images in the first second, then one at ten seconds."""
    path = tmp_path / "video.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = fractions.Fraction(1, 10)
        for number, pts in enumerate([*range(10), 100]):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * number, "uint8"))
            frame.pts, frame.time_base = pts, fractions.Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    means = [np.asarray(frame).mean() for frame in frames_from_video(path, 3)]
    np.testing.assert_allclose(means, [0, 180, 200], atol=4)


def test_videos_joined_to_one(tmp_path):
    """The times of the second begin anew."""
    content = b""
    for first in (0, 100):
        with av.open(tmp_path / "part.mpg", "w") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for level in range(first, first + 100, 10):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, "uint8"))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        content += (tmp_path / "part.mpg").read_bytes()
    (tmp_path / "joined.mpg").write_bytes(content)
    frames = frames_from_video(tmp_path / "joined.mpg", 3)
    np.testing.assert_allclose([np.asarray(x).mean() for x in frames], [0, 90, 190], atol=12)


def test_frames_go_into_the_model(model, video):
    text = model.generate([frames_from_video(video, 2)], "ocr", max_new_tokens=2)
    assert len(text) == 1


def test_paths_in_the_home_folder(video, monkeypatch):
    monkeypatch.setenv("HOME", str(video.parent))
    monkeypatch.setenv("USERPROFILE", str(video.parent))
    (frame,) = frames_from_video("~/video.mp4", 1)
    assert frame.size == (64, 48)


def test_bad_videos(tmp_path, video):
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        frames_from_video(tmp_path / "none.mp4")
    path = tmp_path / "noise.mp4"
    path.write_bytes(b"no video at all" * 100)
    with pytest.raises(ValueError, match=r"noise\.mp4"):
        frames_from_video(path)
    av = pytest.importorskip("av")
    with av.open(tmp_path / "sound.wav", "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), "int16"), "s16", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match=r"sound\.wav.*it has no images"):
        frames_from_video(tmp_path / "sound.wav")
    with pytest.raises(ValueError, match="count=0"):
        frames_from_video(video, 0)
