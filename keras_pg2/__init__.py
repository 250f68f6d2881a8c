"""PaliGemma 2 for Keras 3: one model for JAX, TensorFlow and PyTorch."""

from keras_pg2 import data, recipes
from keras_pg2.config import GemmaConfig, PaliGemmaConfig, SiglipConfig
from keras_pg2.generation import Beam, Generation, Greedy, Sample
from keras_pg2.paligemma import PaliGemma2
from keras_pg2.preprocessing import Preprocessor
from keras_pg2.segmentation import SegmentationCodec
from keras_pg2.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "Beam",
    "GemmaConfig",
    "Generation",
    "Greedy",
    "PaliGemma2",
    "PaliGemmaConfig",
    "Preprocessor",
    "Sample",
    "SegmentationCodec",
    "SiglipConfig",
    "Tokenizer",
    "data",
    "recipes",
]
