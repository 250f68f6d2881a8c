"""PaliGemma 2 for Keras 3: one model for JAX, TensorFlow and PyTorch."""

from importlib.util import find_spec

try:
    import keras  # noqa: F401  before all that needs it
except (ImportError, ValueError) as error:
    raise ImportError(
        f"Keras cannot import its backend: {error}. Set the environment variable KERAS_BACKEND "
        "before the first import of keras to one that is installed, here: "
        f"{', '.join(filter(find_spec, ('jax', 'tensorflow', 'torch'))) or 'none of them'}."
    ) from error

from keras_pg2 import data, recipes, tiny
from keras_pg2.config import GemmaConfig, PaliGemmaConfig, SiglipConfig
from keras_pg2.distribution import layout_map
from keras_pg2.drawing import draw
from keras_pg2.generation import Beam, Generation, Grammar, Greedy, Sample
from keras_pg2.linear import LoraOptions
from keras_pg2.paligemma import EncodedImage, PaliGemma2
from keras_pg2.preprocessing import Preprocessor
from keras_pg2.segmentation import SegmentationCodec
from keras_pg2.tasks import Detection, Detections, parse_detections
from keras_pg2.tokenizer import Tokenizer
from keras_pg2.video import frames_from_video

__version__ = "0.1.0"

__all__ = [
    "Beam",
    "Detection",
    "Detections",
    "EncodedImage",
    "GemmaConfig",
    "Generation",
    "Grammar",
    "Greedy",
    "LoraOptions",
    "PaliGemma2",
    "PaliGemmaConfig",
    "Preprocessor",
    "Sample",
    "SegmentationCodec",
    "SiglipConfig",
    "Tokenizer",
    "data",
    "draw",
    "frames_from_video",
    "layout_map",
    "parse_detections",
    "recipes",
    "tiny",
]
