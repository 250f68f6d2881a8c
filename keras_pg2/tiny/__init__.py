"""The tiny PaliGemma 2: images and texts that it learns from, and how well it learned them."""

import pathlib

_FOLDER = pathlib.Path(__file__).parent / "samples"
# Paths of images to try it on, by name. They show held-out digits.
SAMPLES = {
    name: str(_FOLDER / f"{name}.png")
    for name in ("mixed", "digits", "shapes", "star", "two_digits")
}
