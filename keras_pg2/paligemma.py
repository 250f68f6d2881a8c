"""The model: vision tower, projector and decoder joined, and what users call."""

import collections.abc
import contextlib
import dataclasses
import functools
import itertools
import json
import numbers
import os
import re

import keras
import numpy as np
from keras import ops
from keras.src.utils import file_utils, io_utils, summary_utils

from keras_pg2 import _backend, batches, generation, tasks
from keras_pg2.attention import attention_mask, block_ids, sliding_window_mask, token_positions
from keras_pg2.checkpoints import adapters, io, presets
from keras_pg2.config import PaliGemmaConfig, check_positive
from keras_pg2.gemma import GemmaDecoder
from keras_pg2.linear import Linear, LoraOptions, activation_dtype, renew_seeds, step_seeds
from keras_pg2.losses import token_losses
from keras_pg2.preprocessing import (
    Preprocessor,
    batch_examples,
    checked_preprocessor,
    image_size,
    is_stored_image,
)
from keras_pg2.quantization import QuantizedMatrix, scheme_of, scheme_of_preset, unlocked
from keras_pg2.segmentation import SegmentationCodec
from keras_pg2.siglip import SiglipTower
from keras_pg2.tokenizer import EOS_ID, Tokenizer

_TEXT_INPUTS = ("token_ids", "padding_mask", "suffix_mask", "loss_mask")
_LORA_PATTERNS = {
    "attention": r"^text/.*/(query|key|value|output)$",
    "all-linear": r"^text/.*/(query|key|value|output|gate|up|down)$",
    "vision-attention": r"^vision/.*/(query|key|value|output)$",
    "vision-all-linear": r"^vision/.*/(query|key|value|output|up|down)$",
}


def _not_in_fit(method):
    """The method of a model, which a callback of `fit` cannot call."""

    @functools.wraps(method)
    def checked(self, *args, **kwargs):
        if self._is_in_fit:
            raise RuntimeError(
                f"`{method.__name__}` cannot be called while `fit` runs, as by a callback: the "
                "program of its steps is made. Call it between two calls of `fit`."
            )
        return method(self, *args, **kwargs)

    return checked


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image that went through the vision tower, see `PaliGemma2.encode`.

    Attributes:
        tokens: tensor, float (P, D), image tokens in the decoder's space.
        width, height: int, of the image in pixels.
    """

    tokens: object = dataclasses.field(repr=False)
    width: int
    height: int


@keras.saving.register_keras_serializable("keras_pg2")
class PaliGemma2(keras.Model):
    """PaliGemma 1 and 2: images and text in, text out.

    Args:
        config: PaliGemmaConfig.
        preprocessor: Preprocessor or None. Without one the model reads token ids alone.
        dtype: dtype policy or its name: "float32", "bfloat16", "float16", "mixed_bfloat16"
            or "mixed_float16". Defaults to `keras.config.dtype_policy()`.
        name: str.

    Call arguments:
        inputs: dict of
            - "images": float (B, M, I, I, 3) or (B, I, I, 3) in [-1, 1]; or "image_tokens": float
                (B, M · P, D), what `encode_images` made of them;
            - "token_ids": int32 (B, T), `<bos> prefix "\\n" suffix <eos>`, padding anywhere;
            - "padding_mask": bool (B, T), True on real tokens; all, if missing;
            - "suffix_mask": bool (B, T), True on suffix tokens; none, if missing;
            - "loss_mask": bool (B, T), True on tokens to learn; asks for losses, not logits.
        training: bool, whether dropout acts.

    Returns:
        float32 (B, T, V), logits at the text positions: position t predicts token t + 1.
        With "loss_mask" a dict of float32 tensors: "loss", scalar, the mean over examples of the
        mean over their tokens to learn; and (B,) each "example_losses", "num_tokens" and
        "num_correct". Examples with no token to learn count nowhere.

    Raises:
        ValueError: if an input is missing or has another rank or size.

    Example:
        >>> config = keras_pg2.PaliGemmaConfig.from_variant("paligemma2-3b")
        >>> model = keras_pg2.PaliGemma2(config, dtype="bfloat16")  # random weights
        >>> model.count_params()
        3032094960

    Source: big_vision `models/proj/paligemma/paligemma.py`; papers arXiv 2407.07726, 2412.03555.
    """

    def __init__(self, config, preprocessor=None, dtype=None, name="paligemma2", **kwargs):
        super().__init__(dtype=dtype, name=name, **kwargs)
        _check_arguments(config, self.dtype_policy)
        self.autocast = False  # each layer casts where it is safe in float16
        self.config = config
        self.preprocessor = preprocessor
        self.programs = _backend.Programs()
        self.label_smoothing, self._is_in_fit = 0.0, False
        self._own_codec = _Holder()
        self.vision = SiglipTower(config.vision, name="vision", dtype=self.dtype_policy)
        self.projector = Linear(config.text.width, name="projector", dtype=self.dtype_policy)
        self.text = GemmaDecoder(config.text, name="text", dtype=self.dtype_policy)
        self.build()

    @property
    def preprocessor(self):
        return self._preprocessor

    @preprocessor.setter
    def preprocessor(self, preprocessor):
        self._preprocessor = checked_preprocessor(preprocessor, self.config)

    @classmethod
    def from_preset(
        cls,
        preset,
        *,
        dtype="auto",
        quantize=None,
        image_size=None,
        tokenizer=None,
        compilation_cache=None,
        **changes,
    ):
        """A model with the weights of a checkpoint, recognised by its content.

        What a subclass adds to the model, in `build` after `super().build()`, keeps its initial
        values.

        Args:
            preset: an official name ("paligemma2-3b-mix-224"), "hf://org/repo",
                "kaggle://owner/model/framework/variation", or the path of our own, a Hugging
                Face or a keras_hub folder, or of a big_vision `.npz`.
            dtype: dtype policy or its name; weights are cast while they are read. "auto" is
                bfloat16 on accelerators (float16 on GPUs without it) and with torch on a CPU, and
                float32 with JAX and TensorFlow on a CPU, where their bfloat16 products are over
                ten times slower.
            quantize: None, "int8", "int4" or a `QuantizationConfig`: how to quantize each weight
                as soon as it is read, see `quantize`. The whole model is never in memory
                unquantized.
            image_size: int or None. If it differs from the checkpoint's, the position embedding
                is resampled, as big_vision does before training at another resolution.
            tokenizer: Tokenizer, path of a `tokenizer.model` or `tokenizer.json`, or None for
                the checkpoint's own.
            compilation_cache: path of a folder, or None. Programs that jax compiles in this process
                from now on are kept there and read by later processes; with torch those of
                `enable_torch_compile`. TensorFlow has nothing like it that works.
            **changes: config fields to change, such as `final_logit_softcap=None`.

        Returns:
            PaliGemma2. Its `preprocessor` is None if no tokenizer was found.

        Raises:
            ConnectionError: if a download fails.
            FileNotFoundError: if there is no checkpoint, or a file of it is missing.
            ImportError: if the package of a hub is missing.
            PermissionError: if a licence must be accepted first; the message says where.
            ValueError: if it is damaged, of another model, or does not fit its config.

        Example:
            >>> model = keras_pg2.PaliGemma2.from_preset("paligemma2-3b-mix-224")
            >>> model = keras_pg2.PaliGemma2.from_preset("paligemma2-10b-mix-448", quantize="int4")
        """
        if quantize:
            scheme_of_preset(quantize)  # raises before anything is downloaded
        if dtype in ("int8", "int4"):
            raise ValueError(
                "`dtype` is that of activations and of weights that are not quantized: pass "
                f"`quantize={dtype!r}`. Received: dtype={dtype!r}"
            )
        if compilation_cache is not None:
            _backend.compilation_cache(compilation_cache)
        checkpoint = presets.find_checkpoint(preset)
        weights = checkpoint.weights()
        config = checkpoint.config
        if image_size is not None:
            resized = config.replace(image_size=image_size)
            weights = io.resize_positions(weights, config, image_size)
            config = resized
        config = config.replace(**changes)
        preprocessor = checkpoint.make_preprocessor(config.vision.image_size, tokenizer)
        policy = keras.dtype_policies.get(_backend.fastest_dtype() if dtype == "auto" else dtype)
        # Reading begins while the model is made, unless only its layers know how to read.
        is_plain = not quantize and not isinstance(policy, keras.dtype_policies.DTypePolicyMap)
        reading = _read(weights, dict.fromkeys(weights, policy.variable_dtype)) if is_plain else ()
        with _backend.variables_without_values():
            model = cls(config, preprocessor, dtype=policy)
            if quantize:
                argument = "mode" if isinstance(quantize, str) else "config"
                model.quantize(**{argument: quantize})
        model._assign(weights, reading)
        if checkpoint.codec is not None:
            model.use_codec(checkpoint.codec)
        return model

    def _assign(self, weights, reading):
        """Sets all variables to `weights`, or to what `reading` of them gives.

        Nothing is changed if paths or shapes differ.
        """
        variables, layers = self.variables_by_path(), self._quantized_layers()
        shapes = {k: tuple(v.shape) for k, v in variables.items() if not _is_never_trained(k)}
        shapes |= {f"{k}/{layer.matrix_name}": layer.matrix_shape for k, layer in layers.items()}
        added = {path for path in variables if path not in weights}  # by a subclass
        wrong = sorted((set(shapes) ^ set(weights)) - added) + [
            f"{path}: expected {shapes[path]}, found {weights[path].shape}"
            for path in sorted(set(shapes) & set(weights))
            if shapes[path] != weights[path].shape
        ]
        if wrong:
            raise ValueError(f"These weights do not fit the model: {', '.join(wrong)}")

        dtypes = {path: variable.dtype for path, variable in variables.items()}
        for path, value in reading or _read(weights, dtypes, layers):
            if path in variables:
                _backend.set_value(variables[path], value)
            else:
                layers[path.rpartition("/")[0]].quantized.assign(*value)
        self._initialize_the_rest()  # seeds, and what a subclass added

    def _initialize_the_rest(self):
        for variable in self.variables:
            if variable._value is None:
                variable._deferred_initialize()
        _backend.track_variables(self)

    def weights_by_path(self):
        """The weights as `checkpoints.io.LazyTensor` by path, for writing; LoRA is folded in.

        Raises:
            ValueError: if the model is quantized.
        """
        _backend.sync_values(self)
        layers = self._linear_layers()
        kernels = {f"{path}/kernel": layer for path, layer in layers.items()}
        if self._quantized_layers():
            raise ValueError(
                "A quantized model cannot be written in this format. Save it before `quantize`, "
                "or write a `.keras` file with `model.save`."
            )

        def read(path, variable):
            layer = kernels.get(path)
            return layer.merged_kernel() if layer else _backend.to_numpy(variable)

        return {
            path: io.LazyTensor(
                shape=tuple(variable.shape),
                dtype=variable._dtype,
                read=functools.partial(read, path, variable),
            )
            for path, variable in self.variables_by_path().items()
            if not _is_extra(path)
        }

    def get_weights(self):
        """NumPy arrays of all variables, as in files.

        So kernels are without LoRA that is merged, and "int4" is the same on every backend.
        """
        _backend.sync_values(self)
        files = {id(matrix.codes): matrix.codes_in_file for matrix in self._int4_matrices()}
        merged = [layer for layer in self.lora_layers().values() if layer.is_merged]
        files |= {id(layer.kernel): layer.unmerged_kernel.copy for layer in merged}
        values = (files.get(id(v), functools.partial(_backend.to_numpy, v)) for v in self.weights)
        return [value() for value in values]

    def set_weights(self, weights):
        """Sets all variables to what `get_weights` gave. Merged LoRA is merged anew.

        Args:
            weights: list of NumPy arrays.

        Raises:
            ValueError: if numbers or shapes differ.
        """
        _backend.sync_values(self)
        weights = [*weights]
        places = {id(variable): place for place, variable in enumerate(self.weights)}
        if len(weights) != len(places):
            return super().set_weights(weights)  # which says so
        for matrix in self._int4_matrices():
            place = places[id(matrix.codes)]
            weights[place] = matrix.laid_out(np.array(weights[place], order="C"))
        wrong = [
            f"{variable.path}: expected {tuple(variable.shape)}, found {np.shape(array)}"
            for variable, array in zip(self.weights, weights)
            if tuple(variable.shape) != np.shape(array)
        ]
        if wrong:  # else those before it would be set
            raise ValueError(
                f"These `weights` have other shapes than those of the model: {', '.join(wrong)}"
            )
        merged = [layer for layer in self.lora_layers().values() if layer.is_merged]
        for layer in merged:
            layer.unmerge_lora()
        try:
            super().set_weights(weights)
        finally:
            for layer in merged:
                layer.merge_lora()

    def _int4_matrices(self):
        layers = self._flatten_layers()
        return [x for x in layers if isinstance(x, QuantizedMatrix) and x.mode == "int4"]

    def save_to_preset(self, folder, *, dtype=None, overwrite=False):
        """Writes weights, config, tokenizer and preprocessing to a folder for `from_preset`.

        A codec set by `use_codec` is written too. The folder is complete or not there
        at all: files are written under a temporary name first.

        Args:
            folder: path.
            dtype: "float32", "bfloat16", "float16", or None for that of the variables.
            overwrite: bool, whether to replace what is there.

        Raises:
            FileExistsError: if `folder` exists and `overwrite` is False.
            ValueError: if the model is quantized, or a subclass added weights.
        """
        self._save(folder, "preset", dtype, overwrite)

    def save_hf(self, folder, *, dtype=None, overwrite=False):
        """Writes a folder that transformers' `from_pretrained` loads, with processor files.

        `from_preset` reads no `sequence_length`, interpolation, dropout or `sliding_window=4096`
        from such a folder: transformers writes that window, without which PaliGemma was trained.
        A model to train on is better kept by `save_to_preset`.

        Args:
            folder: path.
            dtype: "float32", "bfloat16", "float16", or None for that of the variables.
            overwrite: bool, whether to replace what is there.

        Raises:
            FileExistsError: if `folder` exists and `overwrite` is False.
            ValueError: if transformers cannot express the config, the model is quantized, or a
                subclass added weights.
        """
        self._save(folder, "hf", dtype, overwrite)

    def save_keras_hub(self, folder, *, dtype=None, overwrite=False):
        """Writes a folder that `keras_hub.models.PaliGemmaCausalLM.from_preset` loads.

        keras_hub 0.32 ignores its own 28B query scale; see README. `from_preset` reads no
        `sequence_length`, interpolation, dropout, `max_positions` or `sliding_window=4096` from it.

        Args: those of `save_hf`.

        Raises:
            FileExistsError, ValueError: as `save_hf`, with keras_hub in place of transformers.
        """
        self._save(folder, "keras-hub", dtype, overwrite)

    def save_big_vision(self, path, *, dtype=None, overwrite=False):
        """Writes a `.npz` that big_vision loads. It holds neither config nor tokenizer.

        `from_preset` reads sizes off the shapes and takes the published values of all else. If
        the model has others, as `final_logit_softcap=None`, a warning names the arguments that
        give them back.

        Args:
            path: path of the file.
            dtype, overwrite: see `save_hf`.

        Raises:
            FileExistsError: if `path` exists and `overwrite` is False.
            ValueError: if `path` does not end in `.npz`, `norm_eps` is not 1e-6, the model is
                quantized, or a subclass added weights.
        """
        self._save(path, "big-vision", dtype, overwrite)

    def upload_preset(self, target, *, format="preset", dtype=None):
        """Writes the model to a temporary folder and uploads it to Hugging Face or Kaggle.

        Files of a model that was there, and that this one lacks, are deleted; others, such as a
        README, stay on Hugging Face.

        Args:
            target: "hf://org/repo", which everybody may read if it is new, or
                "kaggle://owner/model/framework/variation".
            format: "preset" (ours), "hf" or "keras-hub".
            dtype: see `save_hf`.

        Raises:
            ImportError: if the hub's package is missing.
            ValueError: if `target` or `format` is none of these.
        """
        if format not in ("preset", "hf", "keras-hub"):
            raise ValueError(
                f"`format` must be 'preset', 'hf' or 'keras-hub'. Received: format={format!r}"
            )
        presets.upload(target, lambda path: self._save(path, format, dtype), presets.MODEL_FILES)

    def save(self, filepath, overwrite=True, zipped=None, **kwargs):
        """As `keras.Model.save`, but what a file held before stays until the new one is whole.

        Args:
            filepath: path that ends in ".keras"; or, with `zipped=False`, of a folder.
            overwrite: bool, whether a file is replaced without asking.
            zipped: see `keras.Model.save`.

        Raises:
            OSError: if the disk is too full.
            ValueError: if `filepath` has another ending.
        """
        if str(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(
                "`filepath` must end in '.keras'. The older format has no tokenizer and cannot be "
                "read again; for weights alone call `save_weights('….weights.h5')`. "
                f"Received: filepath={filepath!r}"
            )
        options = {"zipped": zipped, **kwargs}
        self._save_aside(super().save, filepath, overwrite, ".keras", **options)

    def save_weights(self, filepath, overwrite=True, max_shard_size=None):
        """As `keras.Model.save_weights`, but a file that is replaced stays until the new one is
        whole.

        Args:
            filepath: path that ends in ".weights.h5". Others are left to Keras.
            overwrite: bool, whether a file is replaced without asking.
            max_shard_size: see `keras.Model.save_weights`.

        Raises:
            OSError: if the disk is too full.
        """
        if max_shard_size is None:
            self._save_aside(super().save_weights, filepath, overwrite, ".weights.h5")
        else:  # several files
            super().save_weights(filepath, overwrite, max_shard_size)

    def _save_aside(self, save, filepath, overwrite, ending, **options):
        """Calls a method of Keras that writes one file, but so that an older one is not lost.

        Args:
            save: callable with the arguments `filepath`, `overwrite` and `options`.
            filepath: what the user passed, perhaps a path of a remote file system.
            overwrite: bool, whether a file is replaced without asking.
            ending: str, of paths that are not left to Keras.
            **options: what else `save` takes.
        """
        name = str(filepath)
        if not name.endswith(ending) or file_utils.is_remote_path(name):
            save(filepath, overwrite=overwrite, **options)
            return
        path = os.path.expanduser(name)
        must_ask = os.path.exists(path) and not overwrite
        if must_ask and not io_utils.ask_to_proceed_with_overwrite(path):
            return
        optimizer = getattr(self, "optimizer", None)
        variables = [*self.variables, *(optimizer.variables if optimizer else [])]
        num_bytes = int(summary_utils.weight_memory_size(variables))
        with io.replace_when_done(path, overwrite=True, num_bytes=num_bytes) as new:
            save(new + ending, **options)
            os.replace(new + ending, new)

    def export(
        self, filepath, format="tf_saved_model", verbose=None, input_signature=None, **kwargs
    ):
        """As `keras.Model.export`: writes the program from inputs to logits, for serving.

        Args:
            filepath: path of a folder; for "onnx" and "litert" of a file, and for "torch" of one
                that ends in ".pt2".
            format, verbose: see `keras.Model.export`. With torch "onnx" or "torch".
            input_signature: see `keras.Model.export`. By default a list of one dict: "images" with
                one image for each example, and texts of the preprocessor's `sequence_length`, or
                128 tokens without one, padded. Of any number of examples, or of one with torch,
                from which Keras exports fixed shapes alone.
            **kwargs: see `keras.Model.export`.

        Raises:
            ValueError: if Keras cannot write the format with this backend.
        """
        if _backend.BACKEND == "torch" and format == "tf_saved_model":
            raise ValueError(
                "With torch pass format='onnx', or format='torch' and a path that ends in '.pt2'. "
                f"Received: format={format!r}"
            )
        if input_signature is None:
            size = self.config.vision.image_size
            length = self.preprocessor.sequence_length if self.preprocessor else 128
            num_examples = 1 if _backend.BACKEND == "torch" else None
            shapes = {"images": ((size, size, 3), "float32"), "token_ids": ((length,), "int32")}
            shapes |= dict.fromkeys(("padding_mask", "suffix_mask"), ((length,), "bool"))
            input_signature = [
                {
                    name: keras.InputSpec(shape=(num_examples, *shape), dtype=dtype, name=name)
                    for name, (shape, dtype) in shapes.items()
                }
            ]
        super().export(filepath, format, verbose, input_signature, **kwargs)

    def _save(self, path, format, dtype=None, overwrite=False):
        presets.save_checkpoint(
            path,
            format,
            self.config,
            self.weights_by_path(),
            self.preprocessor,
            dtype=dtype,
            overwrite=overwrite,
            codec=self._codec_content(),
            verbose=self.count_params() > 10**8,
        )

    def _codec_content(self):
        """The bytes of the codec's file, or None for the official one."""
        codec = self._own_codec.value
        return codec and codec.to_bytes()

    def variables_by_path(self):
        """dict of path without the model's name, as "text/block_3/mlp/up/kernel", to variable."""
        return {v.path.removeprefix(f"{self.path}/"): v for v in self.variables}

    def build(self, input_shape=None):
        self.vision.build()
        self.projector.build((None, None, self.config.vision.width))
        self.text.build()
        self.built = True

    # One forward pass: training, prefill and decode differ in mask, positions and cache.

    def call(self, inputs, training=None):
        inputs = _given(inputs)
        x, sequence = self._embed(inputs, training)
        masks = self._masks(sequence, sequence)
        start = self.num_image_tokens(inputs)
        hidden, _ = self.text(
            x, sequence["positions"], masks, output_start=start, training=training
        )
        if "loss_mask" in inputs:
            return self._suffix_losses(hidden, inputs["token_ids"], inputs["loss_mask"])
        return self.text.logits(hidden)

    def _suffix_losses(self, hidden, token_ids, loss_mask):
        """What `call` returns for hidden states (B, T, D) with a loss mask."""
        # Position t predicts token t + 1. Those that count move to the front of each row.
        counts = ops.cast(loss_mask[:, 1:], "bool")
        length = counts.shape[1]
        places = ops.arange(length, dtype="int32")
        order = ops.sort(ops.where(counts, places, places + length), axis=-1) % length
        counts = ops.cast(ops.take_along_axis(counts, order, axis=1), "float32")
        num_tokens = ops.sum(counts, axis=1)
        num_examples = ops.sum(ops.cast(num_tokens > 0, "float32"))
        shares = counts / ops.maximum(num_tokens, 1)[:, None]  # of the mean of an example
        embedding = self.text.embedding
        loss, losses, hits = token_losses(
            _backend.take_rows(hidden, order),
            embedding.quantized or embedding.matrix(),
            ops.take_along_axis(ops.cast(token_ids[:, 1:], "int32"), order, axis=1),
            shares / ops.maximum(num_examples, 1),
            softcap=self.config.text.final_logit_softcap,
            label_smoothing=self.label_smoothing,
            train_embeddings=embedding.is_trainable,
        )
        return {
            "loss": loss,
            "example_losses": ops.sum(shares * losses, axis=1),
            "num_tokens": num_tokens,
            "num_correct": ops.sum(hits, axis=1),
        }

    def suffix_log_likelihoods(self, hidden, token_ids, weights):
        """Log-likelihoods of suffixes.

        Args:
            hidden: float (B, T, D), after the final norm; its position t predicts token t.
            token_ids: int32 (B, T).
            weights: float32 (B, T), 1 on the tokens of a suffix, then 0.

        Returns:
            float32 (B,).
        """
        matrix = self.text.embedding.quantized or self.text.embedding.matrix()
        softcap = self.config.text.final_logit_softcap
        _, losses, _ = token_losses(hidden, matrix, token_ids, weights, softcap=softcap)
        return -ops.sum(losses, axis=1)

    def encode_images(self, images, training=None):
        """Images to tokens in the decoder's space.

        Args:
            images: float (B, M, I, I, 3) or (B, I, I, 3) in [-1, 1].
            training: bool, see `SiglipTower`.

        Returns:
            float (B, M · P, D), image by image.
        """
        if training:
            renew_seeds(self.projector)
        size, num_tokens = self.config.vision.image_size, self.config.vision.num_tokens
        num_images = images.shape[1] if len(images.shape) == 5 else 1
        images = ops.reshape(images, (-1, size, size, 3))
        tokens = self.projector(self.vision(images, training=training), training=training)
        tokens = ops.cast(tokens, activation_dtype(self.compute_dtype))
        return ops.reshape(tokens, (-1, num_images * num_tokens, self.config.text.width))

    def num_image_tokens(self, inputs):
        """int, how many image tokens each row of the inputs has, see `call`."""
        if "image_tokens" in inputs:
            return inputs["image_tokens"].shape[1]
        shape = inputs["images"].shape
        return (shape[1] if len(shape) == 5 else 1) * self.config.vision.num_tokens

    def prefill(self, inputs, cache_length):
        """Reads image, prefix and the beginning of a suffix, and fills a cache with them.

        Args:
            inputs: as in `call`; padding comes first, so that all rows end together.
            cache_length: int, S, at least the number of image and text tokens.

        Returns:
            logits: float32 (B, V), of the token after the last one.
            hidden: float (B, T, D), after the final norm, at the text positions.
            cache: dict of "layers", a list of `(key, value)` per block, each (B, K, S, H), and
                "blocks" int32, "positions" int32 and "valid" bool of the S tokens, each (B, S).
        """
        x, sequence = self._embed(inputs)
        length = x.shape[1]
        # The tokens to come are real, and each is a block of its own.
        added = ops.ones((x.shape[0], cache_length - length), "int32")
        offsets = ops.cumsum(added, axis=-1)
        last = {name: sequence[name][:, -1:] for name in ("blocks", "positions")}
        cached = {
            "blocks": ops.concatenate([sequence["blocks"], last["blocks"] + offsets], 1),
            "positions": ops.concatenate([sequence["positions"], last["positions"] + offsets], 1),
            "valid": ops.concatenate([sequence["valid"], ops.cast(added, "bool")], 1),
        }
        hidden, layers = self.text(
            x,
            sequence["positions"],
            self._masks(sequence, sequence),
            cache=self.text.empty_cache(x.shape[0], cache_length),
            cache_index=0,
            output_start=self.num_image_tokens(inputs),
        )
        return self.text.logits(hidden[:, -1]), hidden, {"layers": layers, **cached}

    def decode(self, token_ids, cache, index):
        """Reads one more token of each row.

        Args:
            token_ids: int32 (B,).
            cache: as `prefill` returns it. Must not be used again.
            index: int32 scalar, place of the token among the S of the cache.

        Returns:
            logits: float32 (B, V), of the next token.
            hidden: float (B, D), after the final norm.
            cache: with the token written into it.
        """
        hidden, cache = self.extend(token_ids[:, None], cache, index)
        return self.text.logits(hidden[:, 0]), hidden[:, 0], cache

    def extend(self, token_ids, cache, index):
        """Reads more tokens of each suffix.

        Args:
            token_ids: int32 (B, T).
            cache: as `prefill` returns it. Must not be used again.
            index: int32 scalar, place of the first of the tokens among the S of the cache.

        Returns:
            hidden: float (B, T, D), after the final norm.
            cache: with the tokens written into it.
        """
        places = index + ops.arange(token_ids.shape[1], dtype="int32")
        query = {name: ops.take(cache[name], places, axis=1) for name in ("blocks", "positions")}
        hidden, layers = self.text(
            self.text.embed(token_ids),
            query["positions"],
            self._masks(query, cache),
            cache=cache["layers"],
            cache_index=index,
        )
        return hidden, {**cache, "layers": layers}

    def _embed(self, inputs, training=None):
        """Image and text tokens float (B, M · P + T, D), and their blocks, positions, validity."""
        self._check_inputs(inputs)
        token_ids = inputs["token_ids"]
        real = inputs.get("padding_mask")
        real = ops.ones_like(token_ids, "bool") if real is None else ops.cast(real, "bool")
        suffix = inputs.get("suffix_mask")
        suffix = ops.zeros_like(token_ids, "bool") if suffix is None else ops.cast(suffix, "bool")
        if "image_tokens" in inputs:
            images = ops.cast(inputs["image_tokens"], activation_dtype(self.compute_dtype))
        else:
            images = self.encode_images(inputs["images"], training)
        in_image = ops.ones_like(images[:, :, 0], "bool")
        valid = ops.concatenate([in_image, real], axis=1)
        suffix = ops.concatenate([ops.logical_not(in_image), suffix], axis=1)
        x = ops.concatenate([images, self.text.embed(token_ids)], axis=1)
        blocks, positions = block_ids(suffix), token_positions(valid)
        return x, {"blocks": blocks, "positions": positions, "valid": valid}

    def _masks(self, query, key):
        """Masks of the even and of the odd blocks, see `GemmaDecoder`."""
        mask = attention_mask(query["blocks"], key["blocks"], key["valid"])
        window = self.config.text.sliding_window
        if window is None:
            return mask, mask
        positions = query["positions"], key["positions"]
        return sliding_window_mask(mask, query["blocks"], *positions, window), mask

    def _check_inputs(self, inputs):
        images_name = "image_tokens" if "image_tokens" in inputs else "images"
        missing = {images_name, "token_ids"} - set(inputs)
        unknown = set(inputs) - {images_name, *_TEXT_INPUTS}
        if missing or unknown:
            raise ValueError(
                "The model reads a dict with 'images' (or 'image_tokens') and "
                f"{list(_TEXT_INPUTS)}. Missing: {sorted(missing)}. Unknown: {sorted(unknown)}"
            )
        size = self.config.vision.image_size
        shape = tuple(inputs[images_name].shape)
        if images_name == "image_tokens":
            width = self.config.text.width
            if len(shape) != 3 or shape[2] != width or shape[1] % self.config.vision.num_tokens:
                raise ValueError(
                    "`image_tokens` must be what `encode_images` returns, (B, M · "
                    f"{self.config.vision.num_tokens}, {width}). Received: shape {shape}"
                )
        elif len(shape) not in (4, 5) or shape[-3:] != (size, size, 3) or shape[1] == 0:
            raise ValueError(
                f"`images` must be (B, M, {size}, {size}, 3) or (B, {size}, {size}, 3) in "
                f"[-1, 1]. Received: images of shape {shape}. `preprocessor.load_images` makes "
                "such arrays from images of any size."
            )
        text_shape = (shape[0], tuple(inputs["token_ids"].shape)[-1])
        for name in _TEXT_INPUTS:
            found = tuple(inputs[name].shape) if name in inputs else text_shape
            if len(found) != 2 or any(
                isinstance(a, int) and isinstance(b, int) and a != b
                for a, b in zip(found, text_shape)
            ):
                raise ValueError(
                    f"`{name}` must be (B, T), here {text_shape}. Received: shape {found}"
                )

    # Text generation

    def generate(
        self,
        images,
        prompts=None,
        responses=None,
        *,
        max_new_tokens=64,
        sampler="greedy",
        seed=None,
        stop=(),
        batch_size=16,
        details=False,
        grammar=None,
    ):
        """Completes prompts about images.

        Args:
            images: an image (a path, the bytes of an image file, a PIL image, or an array of uint8
                in [0, 255] or float in [0, 1]), a list of images, or a list of lists for several
                images per prompt. What `encode` returns counts as an image. Or a dict with
                "images", "prompts" and "responses"; or one with "images" in [-1, 1], "token_ids",
                "padding_mask" and "suffix_mask", see `call`.
            prompts: str, or list of str. One prompt goes with all images, one image with all
                prompts; it is encoded once then.
            responses: None, str, or list of str, the beginnings of the answers.
            max_new_tokens: int, most tokens to generate.
            sampler: "greedy", "random", "top_k" (of the 40 likeliest), "top_p" (0.9) or "beam" (4
                beams); a `Greedy`, `Sample` or `Beam` object; or a `keras_hub.samplers.Sampler`,
                with which jax and TensorFlow compile anew for each `max_new_tokens`.
            seed: int or None, for `Sample`: the same seed draws the same random numbers, on
                every backend and with every `batch_size`.
            stop: str or tuple of str; an answer ends before the first of them.
            batch_size: int, examples in one batch; the next batch is read meanwhile. Token ids
                form one batch as they are.
            details: bool, whether to return `Generation` objects instead of texts.
            grammar: Grammar or None, the only answers that are possible, for all examples or,
                with as many `starts`, for each.

        Returns:
            The answer alone, without prompt and `responses`: str for one image and one
            prompt, else list of str. `Generation` objects if `details`, or if token ids came in.

        Raises:
            ValueError: if an argument is out of range, or numbers of images and prompts differ.

        Example:
            >>> model.generate("cat.jpg", "caption en")
            'a cat lying on a sofa'
            >>> model.generate(["1.jpg", "2.jpg"], "answer en how many people?")
            ['2', '0']
            >>> model.generate("cat.jpg", "describe en", sampler=keras_pg2.Sample(0.7), seed=1)
        """
        check_positive(max_new_tokens=max_new_tokens, batch_size=batch_size)
        sampler, stop = self._sampler_and_stop(sampler, stop)
        options = (sampler, max_new_tokens, stop)
        examples = _as_examples(images, prompts, responses)
        if isinstance(examples, dict):
            inputs = self._align(examples)
            count = len(inputs["token_ids"])
            seeds, starts = generation.row_seeds(seed, count), _starts(grammar, count)
            return generation.generate_batch(self, inputs, *options, seeds, grammar, starts)
        *columns, is_single = examples
        self._require_preprocessor()
        columns[0] = self._encode_once(columns[0])
        count = len(columns[0])
        rows = list(range(count))
        if count > batch_size:  # a smaller last batch would be compiled anew
            rows += rows[-1:] * (-count % batch_size)
        rows_of_batches = [rows[i : i + batch_size] for i in range(0, count, batch_size)]
        seeds, starts = generation.row_seeds(seed, len(rows)), _starts(grammar, count)

        def prepare(rows):
            return rows, self._inputs(*([column[row] for row in rows] for column in columns))

        results = []
        for rows, inputs in _backend.prefetch(prepare, [(rows,) for rows in rows_of_batches]):
            of_rows = [seeds[row] for row in rows], grammar, [starts[row] for row in rows]
            results += generation.generate_batch(self, inputs, *options, *of_rows)
        results = results[:count] if details else [result.text for result in results[:count]]
        return results[0] if is_single else results

    def _encode_once(self, images):
        """The images of the examples, encoded if all are one."""
        first = images[0]
        is_one = len(first) == 1 and all(row[0] is first[0] and len(row) == 1 for row in images)
        if len(images) == 1 or not is_one or isinstance(first[0], EncodedImage):
            return images
        return [[self.encode(first[0])]] * len(images)

    def _inputs(self, images, prompts, responses):
        """A batch for `generation`, of images that may be encoded already."""
        is_encoded = {isinstance(image, EncodedImage) for row in images for image in row}
        if True not in is_encoded:
            return self.preprocessor.for_generation(images, prompts, responses)
        if False in is_encoded or len({len(row) for row in images}) > 1:
            raise ValueError(
                "In one batch either all images or none must come from `encode`, and each example "
                "must have as many."
            )
        tokens = [ops.concatenate([image.tokens for image in row]) for row in images]
        texts = self.preprocessor.texts_for_generation(prompts, responses)
        return {"image_tokens": ops.stack(tokens), **texts}

    def encode(self, images, *, batch_size=16):
        """Runs the vision tower once, for many prompts about the same images.

        Args:
            images: an image, see `Preprocessor.load_image`, or a list of images.
            batch_size: int, images in one batch.

        Returns:
            EncodedImage, or list of EncodedImage. `generate`, `stream`, `score`, `predict` and the
            tasks take them in place of images.

        Raises:
            ValueError: if an argument is out of range, or the model has no preprocessor.

        Example:
            >>> cat = model.encode("cat.jpg")
            >>> model.caption(cat), model.ocr(cat), model.detect(cat, "cat")
        """
        images, *_, is_single = batch_examples(images, "")
        _check_one_each("encode", images)
        check_positive(batch_size=batch_size)
        images = [image for (image,) in images]
        program = self.programs.get(
            self, ("encode",), self.encode_images, in_parts=True, record=True
        )
        load = self._require_preprocessor().load_images
        starts = range(0, len(images), batch_size)
        parts = [([[image] for image in images[i : i + batch_size]],) for i in starts]
        encoded = []
        for arrays in _backend.prefetch(load, parts):
            # Copies: views would keep the whole batch with torch.
            encoded += [ops.copy(x) for x in program(_backend.to_tensors(arrays))]
        results = [EncodedImage(x, *image_size(image)) for x, image in zip(encoded, images)]
        return results[0] if is_single else results

    def stream(
        self,
        images,
        prompts=None,
        responses=None,
        *,
        max_new_tokens=64,
        sampler="greedy",
        seed=None,
        stop=(),
    ):
        """Like `generate`, piece by piece.

        Args: those of `generate` but the last three; all examples form one batch.

        Returns:
            iterator over str for one image and one prompt, else over list of str: what was
            added to each answer.

        Raises:
            ValueError: as `generate`, or if the model has no preprocessor.

        Example:
            >>> for piece in model.stream("cat.jpg", "describe en"):
            ...     print(piece, end="", flush=True)
        """
        check_positive(max_new_tokens=max_new_tokens)
        sampler, stop = self._sampler_and_stop(sampler, stop)
        if self.preprocessor is None:
            raise ValueError(
                "`stream` gives text, so the model needs a preprocessor: set `model.preprocessor "
                "= keras_pg2.Preprocessor(tokenizer, image_size)`. `generate` gives token ids too."
            )
        examples = _as_examples(images, prompts, responses)
        if isinstance(examples, dict):
            inputs, is_single = self._align(examples), False
        else:
            *columns, is_single = examples
            columns[0] = self._encode_once(columns[0])
            inputs = self._inputs(*columns)
        seeds = generation.row_seeds(seed, len(inputs["token_ids"]))
        pieces = generation.stream_batch(self, inputs, sampler, max_new_tokens, stop, seeds)
        return (piece[0] for piece in pieces) if is_single else pieces

    def _align(self, inputs):
        inputs = {name: ops.convert_to_numpy(array) for name, array in _given(inputs).items()}
        self._check_inputs(inputs)
        return generation.align_inputs(inputs, self.config.text.vocab_size)

    def _sampler_and_stop(self, sampler, stop):
        """A sampler, and a tuple of strings, from what `generate` takes."""
        if not isinstance(stop, (list, tuple)):
            stop = () if stop is None else (stop,)
        if not all(isinstance(string, str) and string for string in stop):
            raise ValueError(f"`stop` must be one or more non-empty strings. Received: {stop!r}")
        if stop:
            self._require_preprocessor()
        sampler, vocab_size = generation.get_sampler(sampler), self.config.text.vocab_size
        if isinstance(sampler, generation.Beam) and sampler.num_beams >= vocab_size:
            raise ValueError(
                f"`num_beams` must be less than the vocabulary, {vocab_size}. Received: "
                f"num_beams={sampler.num_beams}"
            )
        return sampler, tuple(stop)

    def _require_preprocessor(self):
        if self.preprocessor is None:
            raise ValueError(
                "The model has no preprocessor, so it reads token ids alone. Set "
                "`model.preprocessor = keras_pg2.Preprocessor(tokenizer, image_size)`, or pass a "
                "dict with 'images', 'token_ids' and 'padding_mask'."
            )
        return self.preprocessor

    # Tasks

    def caption(self, images, lang="en", style="coco", **options):
        """Says what images show.

        Args:
            images: an image, see `generate`, or a list of images.
            lang: str, code of a language of the training, such as "en" or "de".
            style: "short" (a few words), "coco" (a sentence) or "detailed". Checkpoints named
                "mix" know the last two.
            **options: options of `generate`, such as `max_new_tokens`.

        Returns:
            str, or list of str.

        Raises:
            ValueError: if an argument is out of range.

        Example:
            >>> model.caption("cat.jpg", lang="fr")
            'Un chat allongé sur un canapé.'
        """
        prompt = tasks.caption_prompt(lang, style)
        return self.generate(images, prompt, **{**tasks.longest_answer(prompt), **options})

    def answer(self, images, questions, lang="en", **options):
        """Answers questions about images in a few words.

        Args:
            images: an image, see `generate`, or a list of images.
            questions: str, or list of str. One question goes with all images, and one image with
                all questions.
            lang: str, language of the answers.
            **options: options of `generate`.

        Returns:
            str, or list of str.

        Raises:
            ValueError: if an argument is out of range, or the numbers differ.

        Example:
            >>> model.answer("cat.jpg", "what color is the cat?")
            'grey'
        """
        return self.generate(images, _each(tasks.answer_prompt, questions, lang), **options)

    def ask(self, images, answers, lang="en", **options):
        """Asks questions about images whose answers are given: `answer` the other way round.

        Args:
            images: an image, see `generate`, or a list of images.
            answers: str, or list of str, in English.
            lang: str, language of the questions.
            **options: options of `generate`.

        Returns:
            str, or list of str.

        Raises:
            ValueError: if an argument is out of range, or the numbers differ.
        """
        return self.generate(images, _each(tasks.question_prompt, answers, lang), **options)

    def ocr(self, images, **options):
        """Reads the text in images, from left to right and top to bottom.

        Args:
            images: an image, see `generate`, or a list of images.
            **options: options of `generate`.

        Returns:
            str, or list of str.
        """
        return self.generate(images, "ocr", **{**tasks.longest_answer("ocr"), **options})

    def detect(self, images, things, *, constrained=False, **options):
        """Finds things in images, with boxes.

        Args:
            images: an image, see `generate`, or a list of images.
            things: str, such as "cat" or "cat ; dog", or list of str: what to look for in each
                image. Or a list of such lists, one for each image.
            constrained: bool, whether the model can only give well-formed objects with one of
                the names in `things`.
            **options: options of `generate` but `responses` and `details`, and but `grammar` if
                `constrained`.

        Returns:
            Detections, or list of Detections: sequences of `Detection` with label, box in pixels
            of the image as it came, and score. An object that `max_new_tokens` cut off is left
            out, with a warning in the log.

        Raises:
            ValueError: if an argument is out of range, or the numbers differ.

        Example:
            >>> for found in model.detect("cat.jpg", "cat ; sofa"):
            ...     print(found.label, found.box, found.score)
        """
        return self._detect("detect", images, things, constrained, options)

    def segment(self, images, things, *, constrained=False, **options):
        """Finds things in images, with boxes and masks, which `get_codec()` makes.

        Args: those of `detect`.

        Returns:
            as `detect`; each `Detection` has a `mask`, bool (height, width), if the model gave
            one.

        Raises:
            OSError: if the official codec cannot be downloaded; see `get_codec`.
            ValueError: if an argument is out of range, or the numbers differ.
        """
        return self._detect("segment", images, things, constrained, options)

    def _detect(self, task, images, things, constrained, options):
        things = things.tolist() if isinstance(things, np.ndarray) else things
        is_each = isinstance(things, (list, tuple)) and any(
            isinstance(names, (list, tuple)) for names in things
        )
        things = [tasks.list_of_things(names) for names in (things if is_each else [things])]
        prompts = [f"{task} {' ; '.join(names)}" for names in things]
        images, prompts, _, is_single = batch_examples(images, prompts if is_each else prompts[0])
        _check_one_each(task, images)
        own = ("responses", "details", *(["grammar"] if constrained else []))
        if given := [name for name in own if options.get(name)]:
            raise ValueError(f"`{task}` decides on {own} itself: leave {given} out.")
        tokenizer = self._require_preprocessor().tokenizer
        codec = self.get_codec() if task == "segment" else None
        if constrained:
            options["grammar"] = tasks.detection_grammar(tokenizer, things, task == "segment")
        options = {"max_new_tokens": tasks.MAX_OBJECT_TOKENS, **options, "details": True}
        answers = self.generate(images, prompts, **options)
        things = things if is_each else things * len(images)
        found = [
            tasks.read_detections(answer, tokenizer, names, *image_size(image), codec)
            for answer, names, (image,) in zip(answers, things, images)
        ]
        return found[0] if is_single else found

    def describe_region(self, images, boxes, **options):
        """Says what is in a box.

        Args:
            images: an image, see `generate`, or a list of images.
            boxes: 4 numbers, (x1, y1, x2, y2) in pixels of the image; or a list of such, one
                for each image, or all for one image.
            **options: options of `generate`.

        Returns:
            str, or list of str.

        Raises:
            ValueError: if a box is empty or outside of its image, or the numbers differ.

        Example:
            >>> model.describe_region("cat.jpg", (31, 14, 402, 330))
            'cat'
        """
        is_each = np.iterable(boxes) and any(map(np.iterable, boxes))
        prompts = [""] * len(boxes) if is_each else ""
        images, _, _, is_single = batch_examples(images, prompts)
        _check_one_each("describe_region", images)
        boxes = boxes if is_each else [boxes] * len(images)
        prompts = [
            tasks.region_prompt(box, *image_size(image)) for (image,), box in zip(images, boxes)
        ]
        answers = self.generate(images, prompts, **options)
        return answers[0] if is_single else answers

    def score(self, images, prompts, candidates, *, batch_size=16):
        """How likely each of several answers is: for classification and ranking.

        Each image and its prompt are read once, whatever the number of candidates.

        Args:
            images: an image, see `generate`, or a list of images.
            prompts: str, or list of str.
            candidates: list of str, the answers to compare.
            batch_size: int, candidates in one batch.

        Returns:
            float32 NumPy array, (number of candidates,), or (B, number of candidates) for lists:
            natural logarithms of the probabilities of the whole answers, their end included.

        Raises:
            ValueError: if there is no candidate, or the numbers of images and prompts differ.

        Example:
            >>> scores = model.score("cat.jpg", "answer en what is it?", ["cat", "dog"])
            >>> np.exp(scores)
            array([0.83, 0.02], dtype=float32)
        """
        if not isinstance(candidates, (list, tuple, np.ndarray)) or not len(candidates):
            raise ValueError(
                f"`candidates` must be a list of at least one str. Received: {candidates!r}"
            )
        if not all(isinstance(candidate, str) for candidate in candidates):
            raise ValueError(f"`candidates` must be strings. Received: {candidates!r}")
        check_positive(batch_size=batch_size)
        images, prompts, _, is_single = batch_examples(images, prompts)
        images = self._encode_once(images)
        encode = self._require_preprocessor().tokenizer.encode
        suffixes = [[*encode(candidate), EOS_ID] for candidate in candidates]
        rows = [([image], [prompt], [""]) for image, prompt in zip(images, prompts)]
        scores = np.stack(
            [
                generation.score_suffixes(self, inputs, suffixes, batch_size)
                for inputs in _backend.prefetch(self._inputs, rows)
            ]
        )
        return scores[0] if is_single else scores

    # Not a property: when Keras saves a model, it looks at all of those.
    def get_codec(self):
        """The codec that makes masks of segment tokens.

        It comes with the checkpoint, or is the official one, downloaded at the first use (8 MB);
        `use_codec` sets another.

        Returns:
            SegmentationCodec.

        Raises:
            OSError: if the official one cannot be downloaded.
        """
        return self._own_codec.value or _official_codec()

    def use_codec(self, codec):
        """Sets the codec that makes masks.

        Args:
            codec: SegmentationCodec, or path of its file, such as "vae-oid.npz".

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is something else.
        """
        if isinstance(codec, (str, os.PathLike)):
            codec = SegmentationCodec.from_file(codec)
        if not isinstance(codec, SegmentationCodec):
            raise ValueError(f"`codec` must be a SegmentationCodec or a path. Received: {codec!r}")
        self._own_codec.value = codec

    # Training

    def compile(self, optimizer="adamw", loss=None, *, label_smoothing=0.0, **kwargs):
        """Configures training.

        Args:
            optimizer: a Keras optimizer or its name. Gradient accumulation and moving averages of
                the weights are its options (`gradient_accumulation_steps`, `use_ema`).
            loss: None for the cross-entropy of suffix tokens, which never makes a full logits
                tensor; or a Keras loss over all logits.
            label_smoothing: float in [0, 1), probability that is spread over all other tokens.
                With `loss=None` only.
            **kwargs: see `keras.Model.compile`.

        The reported "loss" is the cross-entropy alone. What `add_loss`, regularizers or a
        `compute_loss` of a subclass add is trained, but not reported.

        Raises:
            ValueError: if an option is out of range, or of the other kind of loss.
        """
        if not isinstance(label_smoothing, numbers.Real) or not 0 <= label_smoothing < 1:
            raise ValueError(
                "`label_smoothing` must be a number in [0, 1). "
                f"Received: label_smoothing={label_smoothing!r}"
            )
        if loss is None and (kwargs.get("metrics") or kwargs.get("weighted_metrics")):
            raise ValueError(
                "With `loss=None` the model reports loss and token accuracy, and no `metrics`, "
                "which need full logits. Pass a Keras loss, or a callback that calls `generate`."
            )
        if loss is not None and label_smoothing:
            raise ValueError("`label_smoothing` goes with `loss=None`. Set it in `loss` instead.")
        self._compile_loss = None
        super().compile(optimizer=optimizer, loss=loss, **kwargs)
        self.label_smoothing, self._jit_option = label_smoothing, kwargs.get("jit_compile", "auto")
        if not hasattr(self, "_loss"):
            with unlocked(self):
                # Whatever `floatx` is: sums in 16 bits would lose or overflow.
                self._loss = keras.metrics.Mean(name="loss", dtype="float32")
                self._token_accuracy = keras.metrics.Mean(name="token_accuracy", dtype="float32")

    def get_compile_config(self):
        _backend.sync_values(self)  # the learning rate is a variable
        config = super().get_compile_config()
        if not config:
            return config
        # Keras has "auto" as what it means on this backend, which others would be slow with.
        options = {"label_smoothing": self.label_smoothing, "jit_compile": self._jit_option}
        return {**config, **options}

    def compile_from_config(self, config):
        config = _with_portable_optimizers(config)
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def fit(
        self,
        x=None,
        y=None,
        batch_size=8,
        *,
        callbacks=None,
        validation_split=0.0,
        validation_data=None,
        shuffle=True,
        validation_batch_size=None,
        **kwargs,
    ):
        """Trains on raw data, which threads preprocess while the device computes.

        Args:
            x: a sequence of examples, such as `keras_pg2.data.jsonl(...)`, each a dict with
                "image", "prefix" and "suffix", or a data set of Hugging Face's `datasets`; a dict
                of columns "images", "prompts" and "responses", or a data frame with them (pandas,
                polars); or an iterable of such examples or batches: `keras.utils.PyDataset`,
                `tf.data.Dataset`, torch `DataLoader`, grain, a generator. A str in "prompts" goes
                with all of a list of images; in "prefix" or "prompt" of an item it makes one
                example with several images. Tokenized data has "images", "token_ids",
                "padding_mask" and "suffix_mask" instead, see `call`.
            y: None. With a loss of your own `x`, `y` and `sample_weight` are arrays, as
                `preprocessor.for_training` makes them of raw data.
            batch_size: int, for data that is not in batches already.
            callbacks: list of `keras.callbacks.Callback`. They may generate and save;
                `freeze`, `enable_lora`, `merge_lora`, `quantize` and the like raise a
                RuntimeError.
            validation_split: float in [0, 1), the share of the examples at the end that is used
                for validation.
            validation_data: data in any of these forms.
            shuffle: bool, whether sequences of examples and columns are shuffled anew in each
                epoch. The order depends on the number of the epoch and on the seed of
                `keras.utils.set_random_seed`; pass `initial_epoch` when you call `fit` repeatedly.
            validation_batch_size: int or None for `batch_size`.
            **kwargs: see `keras.Model.fit`: `epochs`, `verbose`, `steps_per_epoch`, ….

        Returns:
            `keras.callbacks.History`.

        Raises:
            ValueError: if there is no data or it has none of these forms, nothing is trainable, or
                what is trainable has changed since `compile`.
            FloatingPointError: if the loss is not finite any more.

        Example:
            >>> model.enable_lora(rank=8)
            >>> model.compile(keras.optimizers.AdamW(1e-4))
            >>> model.fit(keras_pg2.data.jsonl("train.jsonl"), batch_size=4, epochs=2)
        """
        if not self.compiled or self.optimizer is None:
            raise ValueError("Call `compile` with an optimizer before `fit`.")
        self._check_trainable()
        if self._compile_loss is None:
            _refuse_weights(kwargs)
            if isinstance(callbacks, keras.callbacks.CallbackList):
                raise ValueError("`callbacks` must be a list of callbacks, not a CallbackList.")
            if validation_batch_size is None:
                validation_batch_size = batch_size
            x = self._batches(x, y, batch_size, shuffle)
            if validation_split and validation_data is None:
                x, validation_data = x.split(validation_split, validation_batch_size)
            elif validation_data is not None:
                validation_data = self._batches(validation_data, None, validation_batch_size)
            if kwargs.get("steps_per_epoch") is None:
                x.check_processes()
            x.check_distribution()
            if validation_data is not None:  # now, not after an epoch
                validation_data.check_distribution()
            self._use_function_for("train_function", lambda: x.shapes)
            self._build_optimizer()
            options = {"callbacks": _with_watch(callbacks, x), "validation_data": validation_data}
        else:
            _refuse_raw(x)
            options = {
                "y": y,
                "batch_size": batch_size,
                "callbacks": callbacks,
                "validation_split": validation_split,
                "validation_data": validation_data,
                "shuffle": shuffle,
                "validation_batch_size": validation_batch_size,
            }
        was_in_fit, self._is_in_fit = self._is_in_fit, True
        try:
            return super().fit(x, **options, **kwargs)
        finally:
            self._is_in_fit = was_in_fit

    def evaluate(self, x=None, y=None, batch_size=8, **kwargs):
        """Loss and token accuracy on raw data.

        Args:
            x, y, batch_size: see `fit`.
            **kwargs: see `keras.Model.evaluate`.

        Returns:
            list of float, or dict with "loss" and "token_accuracy" if `return_dict`.

        Raises:
            ValueError: before `compile`, or if there is no data or it has no known form.
        """
        if not self.compiled:
            raise ValueError("Call `compile` before `evaluate`.")
        _backend.sync_values(self)
        if self._compile_loss is None:
            _refuse_weights(kwargs)
            x = self._batches(x, y, batch_size)
            if kwargs.get("steps") is None:
                x.check_processes()
            self._use_function_for("test_function", lambda: x.shapes)
            if _backend.BACKEND == "jax":  # where Keras makes the slots here, too
                self._build_optimizer()
        else:
            _refuse_raw(x)
        with _backend.synced_values(self):
            return super().evaluate(x, y, batch_size=batch_size, **kwargs)

    def train_on_batch(self, x, y=None, sample_weight=None, class_weight=None, **kwargs):
        """One step on one batch, raw or tokenized, see `keras.Model.train_on_batch`."""
        self._check_trainable()
        options = {"sample_weight": sample_weight, "class_weight": class_weight, **kwargs}
        x = self._one_batch("train_function", x, y, options)
        with _backend.synced_values(self):
            return super().train_on_batch(x, y, **options)

    def test_on_batch(self, x, y=None, sample_weight=None, **kwargs):
        """The metrics of one batch, raw or tokenized, see `keras.Model.test_on_batch`."""
        options = {"sample_weight": sample_weight, **kwargs}
        x = self._one_batch("test_function", x, y, options)
        with _backend.synced_values(self):
            return super().test_on_batch(x, y, **options)

    def predict_on_batch(self, x):
        """`predict` of one batch, raw or tokenized."""
        if not _is_raw(x):
            with _backend.synced_values(self):
                return super().predict_on_batch(x)
        data, count = batches.single_batch(x)
        return self.predict(data, batch_size=count, verbose=0)

    def _one_batch(self, function_name, x, y, options):
        if self._compile_loss is not None:
            _refuse_raw(x)
            return x
        _refuse_weights(options)
        data, count = batches.single_batch(x)
        data = self._batches(data, y, count)
        data.check_distribution()
        ((prepared,),) = data.arrays()
        self._use_function_for(function_name, lambda: batches.shapes_of(prepared))
        return prepared

    def _build_optimizer(self):
        # Else Keras 3.16 does it with jax, after it read a batch, which a generator gives once; and
        # with TensorFlow the first step, all of which is then traced twice.
        if self.optimizer is not None and not self.optimizer.built:
            with _backend.strategy_scope(self):
                self.optimizer.build(self.trainable_variables)

    def train_step(self, *args):
        with _backend.whole_step():
            return super().train_step(*args)

    def test_step(self, *args):
        with _backend.whole_step():
            return super().test_step(*args)

    def predict_step(self, *args):
        with _backend.whole_step():
            return super().predict_step(*args)

    def make_train_function(self, force=False):
        self._build_optimizer()
        self._unshare_values()
        if self.programs.graphs:
            self.programs.graphs.clear()  # training needs the memory
        return super().make_train_function(force)

    def make_test_function(self, force=False):
        self._unshare_values()
        return super().make_test_function(force)

    def make_predict_function(self, force=False):
        self._unshare_values()
        return super().make_predict_function(force)

    def _unshare_values(self):
        if getattr(getattr(self, "optimizer", None), "use_ema", False):
            _backend.unshare([*self.variables, *self.optimizer.variables])

    def _maybe_symbolic_build(self, **options):
        # Under a `tf.distribute` strategy Keras takes the mean of a batch over the replicas, which
        # masks do not have, to build what is built here.
        if self._compile_loss is not None:
            super()._maybe_symbolic_build(**options)

    def _purge_model_variables(self, **kwargs):
        # With jax, Keras would take the values from the variables while it trains, and an error
        # would lose them. It saves no memory: steps reuse that of the values.
        pass

    def predict(self, x, batch_size=8, verbose="auto", steps=None, callbacks=None, **options):
        """Answers to raw data; of tokenized data the logits, as `keras.Model.predict`.

        Args:
            x: raw data as in `fit`; answers in it are not looked at. Or a dict of tokenized arrays.
            batch_size: int, for data that is not in batches already.
            verbose: 0 for no progress bar.
            steps: int or None, most batches to read.
            callbacks: for tokenized data alone, see `keras.Model.predict`.
            **options: options of `generate`, such as `max_new_tokens`.

        Returns:
            list of str, or float32 (B, T, V).

        Raises:
            ValueError: if there are `options` for tokenized data, or as `fit` and `generate`.
        """
        if x is None or isinstance(x, str):
            raise ValueError(
                "`x` must be raw data as in `fit`, or a dict of tokenized arrays; for a single "
                f"image call `generate`. Received: x={x!r:.80}"
            )
        if not _is_raw(x):
            if options:
                raise ValueError(
                    f"Of tokenized data `predict` gives logits, and {sorted(options)} have no "
                    "effect. Pass raw data, or call `generate`."
                )
            count = None
            if isinstance(x, dict):
                x = {name: array for name, array in x.items() if name != "loss_mask"}
                x, count = batches.filled_up(x, batch_size)
            with _backend.synced_values(self):
                outputs = super().predict(
                    x, batch_size=batch_size, verbose=verbose, steps=steps, callbacks=callbacks
                )
            return keras.tree.map_structure(lambda array: array[:count], outputs)
        if callbacks:
            raise ValueError("Of raw data `predict` calls no `callbacks`: leave them out.")
        data = self._batches(x, None, batch_size)
        # One for all batches, so that the answers are those of another batch size.
        options["seed"] = generation.seed_sequence(options.get("seed"))
        num_batches = data.num_batches if steps is None else steps
        bar = keras.utils.Progbar(num_batches, verbose=0 if verbose == 0 else 1)
        answers, filling = [], None
        for batch in itertools.islice(data.raw_batches(), steps):
            images, prompts, _ = batches.columns_of(batch)
            # A smaller last batch would be compiled anew, and so would one of one image alone.
            filling = filling or images[:1]
            count = len(prompts)
            missing = max(0, data.batch_size - count)
            images, prompts = images + filling * missing, prompts + prompts[-1:] * missing
            answers += self.generate(images, prompts, batch_size=len(prompts), **options)[:count]
            bar.add(1)
        return answers

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if self._compile_loss is None:
            num_examples = ops.sum(ops.cast(y_pred["num_tokens"] > 0, "float32"))
            return _backend.share_of_replica(y_pred["loss"] + sum(self.losses), num_examples)
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        if self._compile_loss is not None:
            return super().compute_metrics(x, y, y_pred, sample_weight)
        num_tokens = y_pred["num_tokens"]
        is_example = ops.cast(num_tokens > 0, "float32")
        self._loss.update_state(y_pred["example_losses"], is_example)
        self._token_accuracy.update_state(
            y_pred["num_correct"] / ops.maximum(num_tokens, 1), num_tokens
        )
        return self.get_metrics_result()

    @property
    def metrics(self):
        if not self.compiled:
            return super().metrics
        own = [self._loss, self._token_accuracy]
        if self._compile_loss is None:
            # Keras' own mean counts copies that fill up the last batch.
            return own
        return [metric for metric in super().metrics if metric not in own]

    @_not_in_fit
    def enable_remat(self, towers=("vision", "text")):
        """Saves memory in training: activations inside the blocks are computed twice, not kept.

        Args:
            towers: tuple of "vision" and "text"; () turns it off.

        Raises:
            ValueError: if a name is neither.
        """
        if not isinstance(towers, (tuple, list)) or not set(towers) <= {"vision", "text"}:
            raise ValueError(
                f"`towers` must be a tuple of 'vision' and 'text'. Received: towers={towers!r}"
            )
        self.vision.use_remat, self.text.use_remat = "vision" in towers, "text" in towers
        self.train_function = None

    def enable_torch_compile(self, enabled=True):
        """Makes `generate` and its like compile what they do for each token, by `torch.compile`.

        The first answer of each batch size, cache length and sampler then takes half a minute or
        more longer. On a CPU it needs a C++ compiler, on a GPU Triton and a C compiler. `save`
        does not write this setting. jax and tensorflow always compile: there it changes nothing.

        Args:
            enabled: bool.
        """
        self.programs = _backend.Programs(compile_steps=bool(enabled))

    @_not_in_fit
    def freeze(self, pattern=""):
        """Excludes weights from training. Call `compile` after it.

        Args:
            pattern: regular expression, searched in the paths of the weights, such as "vision" or
                "text/embedding"; or a list of them. All by default.

        Raises:
            ValueError: if it matches nothing, or is no regular expression.

        Example:
            >>> model.freeze("^(vision|projector)/")
        """
        self._set_trainable(pattern, False)

    @_not_in_fit
    def unfreeze(self, pattern=""):
        """Includes weights in training again, see `freeze`."""
        self._set_trainable(pattern, True)

    def _set_trainable(self, pattern, value):
        variables = self.variables_by_path()
        paths = self._trainable_paths()
        matching = _matching("pattern", pattern, paths)
        if not matching:
            raise ValueError(
                "`pattern` must match the path of a weight that can be trained, such as "
                f"{paths[:3]}. Received: pattern={pattern!r}"
            )
        if value and not self.trainable:  # as `model.trainable = False` makes it
            self._unfreeze()
            for variable in self.variables:
                variable.trainable = False
        for path in matching:
            variables[path].trainable = value
        self._forget_functions()
        self._report_trainable()

    def _trainable_paths(self):
        """Paths of the variables that may be trainable; a LoRA that is merged takes no part."""
        merged = tuple(f"{k}/lora_" for k, layer in self.lora_layers().items() if layer.is_merged)
        return [
            path
            for path in self.variables_by_path()
            if not path.startswith(merged) and not _is_never_trained(path)
        ]

    def _report_trainable(self):
        count, total = (
            sum(int(np.prod(v.shape)) for v in variables)
            for variables in (self.trainable_variables, self.variables)
        )
        io_utils.print_msg(f"{count:,} of {total:,} parameters are trainable.")

    def _check_trainable(self):
        if not self.trainable_variables:
            raise ValueError("No weight is trainable. Call `unfreeze` or `enable_lora` first.")
        for path, layer in self.lora_layers().items():
            if layer.is_merged and layer.kernel.trainable:
                raise ValueError(
                    f"LoRA of {path!r} is merged, and its kernel is trainable: `save` and "
                    "`unmerge_lora` would lose what it learns. Call `drop_lora()` first."
                )
        optimizer = getattr(self, "optimizer", None)
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        low = {v.dtype for v in self.trainable_variables} & {"bfloat16", "float16"}
        # Muon has Adam for norms, biases and embeddings.
        beta = max(getattr(optimizer, "beta_2", 0), getattr(optimizer, "adam_beta_2", 0))
        if low and beta > 0.996:
            # Keras computes 1 - beta_2 in the dtype of the weights.
            raise ValueError(
                f"{type(optimizer).__name__} with beta_2={beta} moves no weight by Adam in "
                f"{' or '.join(low)}, where beta_2 rounds to 1. Train with "
                "dtype='mixed_bfloat16' (float32 weights), with LoRA, or with SGD."
            )
        if getattr(optimizer, "gradient_accumulation_steps", 0) and _backend.num_replicas(self) > 1:
            raise ValueError(
                "Keras' `gradient_accumulation_steps` does not work with several replicas of "
                "`tf.distribute`. Leave it out, and pass a larger `batch_size`, of which each "
                f"replica takes a part. Received: {optimizer.gradient_accumulation_steps}"
            )
        if optimizer is not None and optimizer.built:
            known = optimizer._trainable_variables
            if {id(v) for v in known} != {id(v) for v in self.trainable_variables}:
                raise ValueError(
                    "What is trainable has changed since the optimizer was made. Call `compile` "
                    "with a new optimizer first."
                )

    def _batches(self, x, y, batch_size, shuffle=False):
        if isinstance(x, batches.Batches):
            return x
        if y is not None or not batches.is_readable(x):
            raise ValueError(
                "With `loss=None` answers are part of the data: pass `x` alone, examples or "
                "batches as `fit` describes. "
                f"Received: x of {type(x).__name__}, y of {type(y).__name__}"
            )
        return batches.Batches(
            x, self.preprocessor, self.config.text.vocab_size, batch_size, shuffle
        )

    def _use_function_for(self, name, get_shapes):
        """Has TensorFlow trace a function for each set of shapes: Keras leaves lengths unknown."""
        if _backend.BACKEND != "tensorflow":
            return
        last, known = self.programs.functions.get(name, (None, {}))
        current, shapes = getattr(self, name), get_shapes()
        known = {} if current is None else {**known, last: current}
        setattr(self, name, known.get(shapes))
        self.programs.functions[name] = shapes, known

    # LoRA

    @_not_in_fit
    def enable_lora(self, rank=8, alpha=None, dropout=0.0, pattern="attention"):
        """Adds LoRA to layers chosen by their paths, and freezes everything else.

        Call `compile` after it, so that the optimizer knows the new variables.

        Args:
            rank: int.
            alpha: float or None for `rank`; an update is multiplied by `alpha / rank`.
            dropout: float in [0, 1), share of the inputs of LoRA that is dropped in training.
            pattern: regular expression, searched in the paths of the linear layers, such as
                "text/block_3/attention/query", "vision/block_0/mlp/up" or "projector". Or
                "attention": the decoder's query, key, value and output; or "all-linear": also
                its gate, up and down; or "vision-attention" or "vision-all-linear", the same in
                the vision tower. Or a list of these.

        Raises:
            ValueError: if an option is out of range, no layer matches, `pattern` is no regular
                expression, or LoRA is enabled.

        Example:
            >>> model.enable_lora(rank=8, alpha=16, pattern="all-linear")
            >>> model.compile(keras.optimizers.AdamW(1e-4))
            >>> model.fit(keras_pg2.data.jsonl("train.jsonl"), batch_size=4)
            >>> model.merge_lora()
        """
        options = LoraOptions(rank, rank if alpha is None else alpha, dropout)
        paths = list(self._linear_layers())
        patterns = pattern if isinstance(pattern, (list, tuple)) else [pattern]
        patterns = [_LORA_PATTERNS.get(name, name) for name in patterns]
        matching = _matching("pattern", patterns, paths)
        if not matching:
            raise ValueError(
                f"`pattern` must match the path of a linear layer, as {paths[:3]} … {paths[-3:]}, "
                f"or be one of {list(_LORA_PATTERNS)}. Received: pattern={pattern!r}"
            )
        self.enable_lora_on({path: options for path in matching})

    @_not_in_fit
    def enable_lora_on(self, options):
        """Adds LoRA with options of their own to the layers named, and freezes the rest.

        Args:
            options: dict of layer path to LoraOptions.

        Raises:
            ValueError: if a path is of no linear layer, or LoRA is enabled.

        Example:
            >>> options = keras_pg2.LoraOptions(rank=8, alpha=16)
            >>> model.enable_lora_on({"projector": options})
        """
        layers = self._linear_layers()
        if not options or not all(isinstance(one, LoraOptions) for one in options.values()):
            raise ValueError(
                "`options` must be a dict of at least one layer path to `keras_pg2.LoraOptions`. "
                f"Received: {options!r:.80}"
            )
        if unknown := sorted(set(options) - set(layers)):
            raise ValueError(f"The model has no linear layers with the paths {unknown}")
        if enabled := self.lora_layers():
            raise ValueError(
                f"LoRA is enabled on {len(enabled)} layers already. `drop_lora()` removes it, "
                "after `merge_lora()` if the model is to keep what it learned."
            )
        self._unfreeze()  # a frozen tower would hide its LoRA
        for variable in self.variables:
            if variable.trainable:
                variable.trainable = False
        with _backend.strategy_scope(self):
            for path, layer_options in options.items():
                layers[path].enable_lora(**dataclasses.asdict(layer_options))
        self._renew_programs()
        self._report_trainable()

    def lora_layers(self):
        """dict of path to each layer with LoRA."""
        return {path: layer for path, layer in self._linear_layers().items() if layer.lora}

    @_not_in_fit
    def merge_lora(self):
        """Folds LoRA into the kernels, so that it costs no time; `unmerge_lora` takes it back.

        The kernels as they were stay in the memory of the host until then, or `drop_lora`. Copies
        of the model, and what `save` writes, have LoRA apart, as before. Callbacks of `fit` cannot
        do it, nor need they: `save_hf` and the like fold LoRA in.

        Raises:
            ValueError: if LoRA is not enabled, is merged already, or a kernel is quantized.
        """
        # Quantized kernels first: they raise, before any other layer is changed.
        layers = sorted(self._require_lora().values(), key=lambda x: x.quantization_mode is None)
        unmerged = [layer for layer in layers if not layer.is_merged]
        try:
            for layer in layers:
                layer.merge_lora()
        except BaseException:  # an interrupt, too: all are merged or none
            for layer in unmerged:
                if layer.is_merged:
                    layer.unmerge_lora()
            raise
        finally:
            self._renew_programs()

    @_not_in_fit
    def unmerge_lora(self):
        """Gives the kernels back the values they had before `merge_lora`, bit for bit.

        Raises:
            ValueError: if LoRA is not merged.
        """
        for layer in self._require_lora().values():
            layer.unmerge_lora()
        self._renew_programs()

    @_not_in_fit
    def drop_lora(self):
        """Removes LoRA for good: the model is a plain one again, and trainable as a whole.

        After `merge_lora` it keeps what LoRA learned, else it loses it.

        Raises:
            ValueError: if LoRA is not enabled.
        """
        for layer in self._require_lora().values():
            layer.drop_lora()
        self._unfreeze()
        self._renew_programs()

    def save_adapter(self, folder, *, base_model=None, overwrite=False):
        """Writes LoRA alone, as PEFT does: `adapter_config.json`, `adapter_model.safetensors`.

        PEFT finds LoRA of the projector with transformers 4.52 and later alone.

        Args:
            folder: path, made if missing.
            base_model: str or None, name or path of the model that the adapter belongs to, as
                "google/paligemma2-3b-pt-224"; PEFT's `AutoPeftModel` asks for it.
            overwrite: bool, whether to replace an adapter that is there.

        Raises:
            FileExistsError: if there is an adapter and `overwrite` is False.
            ValueError: if LoRA is not enabled, or on a layer that a subclass added.

        Example:
            >>> model.save_adapter("adapter/", base_model="google/paligemma2-3b-pt-224")
        """
        _backend.sync_values(self)
        adapters.save_adapter(self, folder, base_model, overwrite)

    def upload_adapter(self, target, *, base_model=None):
        """Uploads what `save_adapter` writes to Hugging Face or Kaggle.

        Args:
            target: see `upload_preset`.
            base_model: see `save_adapter`.

        Raises:
            ImportError: if the hub's package is missing.
            ValueError: if LoRA is not enabled, or `target` is of neither hub.
        """
        self._require_lora()
        presets.upload(target, lambda path: self.save_adapter(path, base_model=base_model))

    def load_adapter(self, folder):
        """Enables LoRA on the layers that an adapter of PEFT or `save_adapter` has.

        Args:
            folder: path with `adapter_config.json` and `adapter_model.safetensors`, or
                "hf://org/repo", or "kaggle://owner/model/framework/variation".

        Raises:
            ConnectionError, ImportError, PermissionError: if a hub does not give it.
            FileNotFoundError: if the adapter or a file of it is missing.
            ValueError: if the adapter is damaged, of a kind that is not supported (DoRA, trained
                biases, …) or does not fit the model, or LoRA is enabled.

        Example:
            >>> model.load_adapter("adapter/")
            >>> model.merge_lora()
        """
        files = (adapters.CONFIG_FILE, adapters.TENSOR_FILE)
        adapters.load_adapter(self, presets.fetch(folder, files))

    @_not_in_fit
    def quantize(self, mode=None, config=None, filters=None):
        """Turns weights into small integers with scales. Activations keep their dtype.

        A quantized model takes half ("int8") or a quarter ("int4") of the memory of bfloat16. It
        generates, and is trained by LoRA; its weights themselves are frozen for good. `save`
        writes it as it is.

        Args:
            mode: "int8", with a scale for each output of a layer; or "int4", with a scale and an
                offset for every 128 inputs of each output.
            config: None; or a `keras.quantizers.Int4QuantizationConfig`, whose `block_size` (32,
                64, 128 or 256) stands for the 128.
            filters: regex, or list of them, that the paths of layers must match, such as "text/";
                or a callable from a layer to bool. By default all linear layers of both towers,
                the projector and the token embedding are quantized; norms never are.

        Raises:
            ValueError: if an option is out of range, no layer matches that is not quantized, or
                `filters` is no regular expression.

        Example:
            >>> model = keras_pg2.PaliGemma2.from_preset("paligemma2-3b-mix-224")
            >>> model.quantize("int4")
        """
        layers = {k: v for k, v in self._quantizable_layers().items() if v.quantized is None}
        if callable(filters):
            matching = [path for path, layer in layers.items() if filters(layer)]
        else:
            matching = list(layers) if filters is None else _matching("filters", filters, layers)
        if not layers:
            raise ValueError("All layers that can be quantized are so already.")
        if not matching:
            raise ValueError(
                "`filters` must match a layer that is not quantized yet, as "
                f"{list(layers)[:3]}. Received: filters={filters!r}"
            )
        scheme_of(mode, config)  # raises before anything is changed
        for path in matching:  # all, before one is changed
            layers[path].check_quantizable()
        try:
            with _backend.strategy_scope(self):
                for path in matching:
                    layers[path].quantize(mode, config=config)
        finally:  # after an interrupt, too, which leaves each layer whole
            self._renew_programs()

    def _check_quantize_args(self, mode, compute_dtype):
        pass  # `quantize` checks them; here Keras would forbid to quantize the rest later

    def _quantizable_layers(self):
        return {**self._linear_layers(), "text/embedding": self.text.embedding}

    def _quantized_layers(self):
        return {k: v for k, v in self._quantizable_layers().items() if v.quantized is not None}

    def _linear_layers(self):
        layers = [layer for layer in self._flatten_layers() if isinstance(layer, Linear)]
        return {layer.path.removeprefix(f"{self.path}/"): layer for layer in layers}

    def _require_lora(self):
        layers = self.lora_layers()
        if not layers:
            raise ValueError("The model has no LoRA. Call `enable_lora` or `load_adapter` first.")
        return layers

    def _unfreeze(self):
        # With TensorFlow, setting an attribute to the value it has does nothing.
        self.trainable = False
        self.trainable = True

    def _renew_programs(self):
        """Forgets compiled programs, since they captured the set of variables."""
        self.programs = _backend.Programs(self.programs.compile_steps)
        self._forget_functions()
        _backend.track_variables(self)

    def _forget_functions(self):
        """Has Keras make its own functions, of `fit` and the like, anew.

        With jax they know variables by their places in two lists, of trainable ones and others.
        """
        self.train_function = self.test_function = self.predict_function = None

    # Saving, as Keras asks for it

    def get_config(self):
        """What makes a model without weights and preprocessor; files and copies have them."""
        config = {
            **super().get_config(),
            "config": self.config.to_dict(),
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
        }
        if layers := self.lora_layers():
            config["lora"] = {
                path: dataclasses.asdict(layer.lora) for path, layer in layers.items()
            }
        if layers := self._quantized_layers():
            config["quantized"] = {
                path: {"mode": layer.quantized.mode, "group_size": layer.quantized.group_size}
                for path, layer in layers.items()
            }
        variables = self.variables_by_path()
        config["frozen"] = [k for k in self._trainable_paths() if not variables[k].trainable]
        for path, layer in self.lora_layers().items():  # saved as they were before they were merged
            config["frozen"] += [f"{path}/{name}" for name in layer.frozen_before_merge]
        config["remat"] = [name for name in ("vision", "text") if getattr(self, name).use_remat]
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        names = ("quantized", "lora", "frozen", "remat")
        quantized, lora, frozen, remat = (config.pop(name, ()) for name in names)
        no_values = _backend.variables_without_values if quantized else contextlib.nullcontext
        with no_values():  # they would take several times the memory of the quantized ones
            model = cls(PaliGemmaConfig.from_dict(config.pop("config")), **config)
            layers = model._quantizable_layers()
            for path in quantized:
                layers[path].make_quantized(**quantized[path])
        model._initialize_the_rest()
        if lora:
            model.enable_lora_on({path: LoraOptions(**options) for path, options in lora.items()})
        for path, variable in model.variables_by_path().items():
            if not _is_never_trained(path):
                variable.trainable = path not in frozen
        model.enable_remat(tuple(remat))
        return model

    def save_own_variables(self, store):
        _backend.sync_values(self)  # before the layers save theirs
        # Keras saves no seeds, so that a run which goes on would drop other values.
        if seeds := step_seeds(self):
            store["step_seeds"] = np.stack([ops.convert_to_numpy(s.state) for s in seeds])

    def load_own_variables(self, store):
        _backend.sync_values(self)  # before the layers load theirs
        seeds = step_seeds(self)
        if "step_seeds" in store and len(store["step_seeds"]) == len(seeds):
            for seed, state in zip(seeds, store["step_seeds"]):
                seed.state.assign(state)

    def save_assets(self, folder):
        if content := self._codec_content():
            with open(os.path.join(folder, presets.CODEC_FILE), "wb") as file:
                file.write(content)
        if self.preprocessor is None:
            return
        with open(os.path.join(folder, "tokenizer.model"), "wb") as file:
            file.write(self.preprocessor.tokenizer.model)
        with open(os.path.join(folder, "preprocessor.json"), "w") as file:
            json.dump(self.preprocessor.get_config(), file, indent=2)

    def load_assets(self, folder):
        codec = os.path.join(folder, presets.CODEC_FILE)
        if os.path.exists(codec):
            self.use_codec(codec)
        if not os.path.exists(os.path.join(folder, "preprocessor.json")):
            return
        with open(os.path.join(folder, "preprocessor.json")) as file:
            options = json.load(file)
        tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.model"))
        self.preprocessor = Preprocessor(tokenizer, **options)


class _Holder:
    """Hides a model from Keras, which would count its weights among those of its owner."""

    value = None


@functools.cache
def _official_codec():
    return SegmentationCodec.from_file()


def _given(inputs):
    """The inputs of a model without those that are None."""
    if not isinstance(inputs, collections.abc.Mapping):
        raise ValueError(
            "The model reads a dict, see `PaliGemma2`; of images and texts `generate` makes one. "
            f"Received: {type(inputs).__name__}"
        )
    known = ("images", "image_tokens", *_TEXT_INPUTS)
    return {name: x for name, x in inputs.items() if x is not None or name not in known}


def _is_raw(data):
    """Whether data is images and texts, which `predict` answers; Keras reads all else."""
    return batches.is_readable(data) and not (isinstance(data, dict) and "token_ids" in data)


def _matching(argument, patterns, paths):
    """list of the paths in which a regular expression, or any of a list of them, is found."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    try:
        patterns = [re.compile(pattern) for pattern in patterns]
    except TypeError as error:
        raise ValueError(
            f"`{argument}` must be a regular expression, or a list of them. "
            f"Received: {argument}={patterns!r}"
        ) from error
    except re.error as error:
        raise ValueError(
            f"`{argument}` must be a regular expression. Received: {argument}={error.pattern!r}: "
            f"{error}"
        ) from error
    return [path for path in paths if any(pattern.search(path) for pattern in patterns)]


def _is_never_trained(path):
    """Whether a variable holds integers, scales or a random state."""
    return "/quantized/" in path or path.endswith("/seed_generator_state")


def _is_extra(path):
    """Whether a variable is none of the checkpoint's."""
    return "/lora_kernel_" in path or _is_never_trained(path)


class _Watch(keras.callbacks.Callback):
    """Tells the data which epoch begins, and stops when the loss is not finite any more."""

    async_safe = True  # does not make every step wait for its loss

    def __init__(self, data):
        super().__init__()
        self.data = data

    def on_epoch_begin(self, epoch, logs=None):
        self.data.epoch = self.epoch = epoch
        self.num_calls = 0

    def on_train_batch_end(self, batch, logs=None):
        self.num_calls += 1
        if self.num_calls % 32 == 1:  # once the mean over the epoch is not finite, it stays so
            self._check(logs, f"step {batch}")

    def on_epoch_end(self, epoch, logs=None):
        self._check(logs, "its end")

    def _check(self, logs, place):
        if not np.isfinite(float((logs or {}).get("loss", 0))):
            raise FloatingPointError(
                f"The loss is not finite in epoch {self.epoch + 1}, found at {place}. A lower "
                "learning rate, warm-up, `clipnorm=1.0` in the optimizer, or a policy other than "
                "pure float16 (such as 'mixed_float16' or 'bfloat16') may help. The weights are "
                "damaged: load them again."
            )


def _check_arguments(config, dtype_policy):
    """Refuses what no PaliGemma2 can be made of."""
    if not isinstance(config, PaliGemmaConfig):
        raise TypeError(
            "`config` must be a PaliGemmaConfig, such as `PaliGemmaConfig.from_variant("
            "'paligemma2-3b')`; `from_preset` makes models with weights. "
            f"Received: {config!r:.80}"
        )
    is_map = isinstance(dtype_policy, keras.dtype_policies.DTypePolicyMap)
    for policy in (dtype_policy, *(dtype_policy.values() if is_map else ())):
        if not keras.backend.is_float_dtype(policy.variable_dtype):
            raise ValueError(f"`dtype` must be a policy of floats. Received: dtype={policy.name!r}")
        if policy.quantization_mode is not None:
            raise ValueError(
                "`dtype` must be a policy without quantization: call `quantize`, or pass "
                f"`quantize=` to `from_preset`. Received: dtype={policy.name!r}"
            )


def _with_watch(callbacks, data):
    """The callbacks after a `_Watch`, which stops before others save damaged weights."""
    if isinstance(callbacks, keras.callbacks.Callback):
        callbacks = [callbacks]
    return [_Watch(data), *(callbacks or [])]


def _with_portable_optimizers(config):
    """A config of `compile` with optimizers of any backend: Keras writes those of torch as such."""
    if not isinstance(config, dict):
        return config
    config = {name: _with_portable_optimizers(value) for name, value in config.items()}
    if str(config.get("module")).startswith("keras.src.backend.torch.optimizers."):
        config["module"] = "keras.optimizers"
    return config


def _refuse_raw(x):
    """Refuses examples and columns of them, which only our own loss learns from."""
    if batches.is_frame(x):
        x = dict.fromkeys(x.columns)
    elif isinstance(x, collections.abc.Sequence) and len(x):
        x = x[0]
    if isinstance(x, dict) and "token_ids" not in x:
        raise ValueError(
            "With a loss of your own pass arrays: `x, y, sample_weight = "
            "model.preprocessor.for_training(images, prompts, responses)`. Raw data goes with "
            f"`loss=None`. Received: a dict with {sorted(x)}"
        )


def _refuse_weights(options):
    given = [name for name in ("sample_weight", "class_weight") if options.get(name) is not None]
    if given:
        raise ValueError(
            f"{given} have no effect with `loss=None`. Leave examples out of the data, or choose "
            "tokens by 'loss_mask' in tokenized data."
        )


def _read(weights, dtypes, quantized=()):
    """An iterator over path and tensor of each of `weights`; reading begins at once.

    `dtypes` is a dict by path. For the matrix of a layer in `quantized`, a dict by path, it gives
    what its `encode` returns.
    """

    def read(path):
        layer, _, name = path.rpartition("/")
        array = weights[path].read()
        if layer in quantized and name == quantized[layer].matrix_name:
            return path, quantized[layer].encode(array)
        return path, _backend.from_numpy(array, dtypes[path])

    # Largest first: while the embedding is copied, nothing else is in memory yet.
    paths = sorted(weights, key=lambda path: -weights[path].num_bytes)
    return _backend.prefetch(read, [(path,) for path in paths], threads=2)


def _each(prompt, texts, lang):
    """A prompt for a text, or prompts for several."""
    if not isinstance(texts, str) and not np.iterable(texts):
        raise ValueError(f"Ask with a str, or with a list of str. Received: {texts!r}")
    return prompt(texts, lang) if isinstance(texts, str) else [prompt(x, lang) for x in texts]


def _check_one_each(task, images):
    if any(len(row) != 1 for row in images):
        raise ValueError(f"`{task}` looks at one image at a time: pass a list of images.")


def _starts(grammar, count):
    """The state in which each of `count` rows begins, or Nones."""
    if grammar is None:
        return [None] * count
    if not isinstance(grammar, generation.Grammar):
        raise ValueError(f"`grammar` must be a Grammar or None. Received: grammar={grammar!r:.80}")
    if len(grammar.starts) not in (1, count):
        raise ValueError(
            f"`grammar` must have 1 start, or {count}, one for each example. "
            f"Received: {len(grammar.starts)}"
        )
    return grammar.starts if len(grammar.starts) == count else grammar.starts * count


def _as_examples(images, prompts, responses):
    """A dict of token ids and images, or what `batch_examples` returns."""
    if isinstance(images, dict) and not is_stored_image(images):
        if prompts is not None or responses is not None:
            raise ValueError("Pass either a dict, or images and prompts, not both.")
        if "token_ids" in images:
            return images
        unknown = set(images) - {"images", "prompts", "responses"}
        if unknown or not {"images", "prompts"} <= set(images):
            raise ValueError(
                "A dict must have 'images' and 'prompts' (and 'responses'), or 'images' and "
                f"'token_ids'. Received: {sorted(images)}"
            )
        return batch_examples(images["images"], images["prompts"], images.get("responses"))
    if prompts is None:
        raise ValueError("`prompts` is missing, as in `generate(image, 'caption en')`.")
    return batch_examples(images, prompts, responses)
