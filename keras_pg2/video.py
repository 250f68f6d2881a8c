"""Images of a video."""

import os

import numpy as np

from keras_pg2.config import check_positive


def frames_from_video(path, count=16):
    """Images at equal distances in time, from the first to the last.

    Args:
        path: path of a video file.
        count: int, number of images.

    Returns:
        list of `count` PIL images; an image of a shorter video comes several times.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if PyAV is missing.
        ValueError: if the file is no video that can be read, or `count` is not positive.

    Example:
        >>> frames = keras_pg2.frames_from_video("cat.mp4", 8)
        >>> model.generate([frames], "caption en")  # several images for one prompt
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("`frames_from_video` needs `pip install av`.") from error
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"`path` must be the path of a file. Received: {type(path).__name__}")
    path = os.path.expanduser(os.fspath(path))
    check_positive(count=count)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"No such video file: {path!r}")
    try:
        # Frames need not be equally long, and files lie about their number: times come first.
        times = [frame.time for frame in _decoded(av, path)]
        if None in times or times != sorted(times):  # as in files joined to one
            times = range(len(times))
        wanted = []
        if times:
            moments = np.linspace(times[0], times[-1], count)
            wanted = (np.searchsorted(times, moments + 1e-6, side="right") - 1).tolist()
        frames = {}
        for index, frame in enumerate(_decoded(av, path)):
            if index in wanted:
                frames[index] = _upright(frame)
    except av.FFmpegError as error:
        raise ValueError(f"The file {path!r} is no video that can be read: {error}") from error
    if not frames:
        raise ValueError(f"The video {path!r} has no images.")
    return [frames[index] for index in wanted]


def _decoded(av, path):
    with av.open(path) as container:
        if not container.streams.video:
            raise ValueError(f"The file {path!r} is no video that can be read: it has no images.")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield from container.decode(stream)


def _upright(frame):
    """PIL image, turned as it is to be shown."""
    image = frame.to_image()
    turns = round(frame.rotation / 90) % 4
    return image.rotate(90 * turns, expand=True) if turns else image
