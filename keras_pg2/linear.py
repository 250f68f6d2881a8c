"""Linear maps: `Linear`, a Dense safe in float16, and `TokenEmbedding`, tied both ways."""

import dataclasses
import functools
import math
import numbers
import random

import keras
from keras import ops

from keras_pg2 import _backend
from keras_pg2.config import check_positive
from keras_pg2.quantization import Quantizable, QuantizedMatrix, unlocked


def activation_dtype(compute_dtype):
    """Dtype of everything between two matrix products: residual stream, norms, gates.

    float16 ends at 65,504, which the residual stream of Gemma exceeds, so there the products
    alone run in float16.

    Args:
        compute_dtype: str, compute dtype of the policy.

    Returns:
        str, "float32" for "float16", else `compute_dtype`.
    """
    return "float32" if compute_dtype == "float16" else compute_dtype


class StepSeed(keras.random.SeedGenerator):
    """A seed that stays the same within a training step.

    With rematerialization a block runs twice in a step and must drop the same values. Each chunk
    of a long sequence drops its own. The towers, and `PaliGemma2.encode_images`, renew the seeds
    of their layers before a step.
    """

    def __init__(self):
        # Given explicitly, since torch otherwise does without. `set_random_seed` seeds it.
        super().__init__(random.randint(1, 10**9))

    def next(self, ordered=True):
        chunk = ops.convert_to_tensor([_backend.chunk_number(), 0], self.state.dtype)
        return self.state.value + chunk

    def renew(self):
        """Goes on to the seed of the next step."""
        super().next()


def step_seeds(layer):
    """The seeds of dropout in a layer and those within it."""
    values = (value for inner in layer._flatten_layers() for value in vars(inner).values())
    return [value for value in values if isinstance(value, StepSeed)]


def renew_seeds(layer):
    """Has the layer drop other values from now on."""
    for seed in step_seeds(layer):
        seed.renew()


class DirectCall:
    """Mixin for a layer that in a program is only its `call`, without Keras' checks of arguments.

    They take 0.2 ms for each call of a layer, hundreds of times for a token on torch.
    """

    def __call__(self, *args, **kwargs):
        call = self.call if _backend.in_program() else super().__call__
        return call(*args, **kwargs)


class Linear(Quantizable, DirectCall, keras.layers.Dense):
    """Dense over the last axis, kernel `(in, out)`, with LoRA computed factored.

    In float16 each row is scaled by a power of two before the product, so that neither the
    input nor the result leaves the range of float16, and scaled back in float32.

    With LoRA the output is `x·W + b + alpha / rank · dropout(x)·A·B`; `W + A·B` is never made,
    where Keras' Dense makes it in every step. Dense's own `lora_enabled` stays False, so its code
    sees the plain kernel. Files hold W, A and B apart, W unmerged always.

    Args:
        units: int, size of the output.
        use_bias: bool.
        **kwargs: see `keras.layers.Dense`, but for `activation`, which is refused.

    Attributes:
        lora: LoraOptions, or None without LoRA.
        lora_kernel_a, lora_kernel_b: float32 variables (in, rank) and (rank, units), or None.
        is_merged: bool, whether the kernel holds A·B at the moment.
        unmerged_kernel: NumPy array, the kernel without A·B while it is merged; else None.
        frozen_before_merge: tuple of str, those of A and B that were frozen when they were merged.

    Call arguments:
        inputs: float (..., in).
        training: bool, whether LoRA's dropout acts.

    Returns:
        float (..., units) in `activation_dtype(compute_dtype)`.

    Source: LoRA as in the paper arXiv 2106.09685 and in PEFT 0.21 `tuners/lora/layer.py`.
    """

    def __init__(self, units, use_bias=True, **kwargs):
        super().__init__(units, use_bias=use_bias, **kwargs)
        if self.activation is not keras.activations.linear:
            raise ValueError(f"A Linear has no `activation`. Received: {self.activation}")
        # Casting float32 activations to float16 on entry would overflow.
        self.autocast = False
        self.lora = None
        self.lora_kernel_a = self.lora_kernel_b = None
        self._dropout_seed = self.unmerged_kernel = None
        self.frozen_before_merge = ()

    def call(self, inputs, training=None):
        outputs = self._matmul(inputs, self.quantized or self._kernel)
        if self.bias is not None:
            outputs = outputs + ops.cast(self.bias, outputs.dtype)
        if self.lora is None or self.is_merged:
            return outputs
        return self._add_lora(outputs, inputs, training)

    def compute_output_spec(self, inputs, training=None):
        return keras.KerasTensor(
            (*inputs.shape[:-1], self.units), activation_dtype(self.compute_dtype)
        )

    def _matmul(self, inputs, kernel):
        if isinstance(kernel, QuantizedMatrix):

            def multiply(inputs):
                return kernel.multiply(ops.cast(inputs, self.compute_dtype))

        else:
            if kernel.dtype != self.compute_dtype:
                kernel = ops.cast(kernel, self.compute_dtype)
            multiply = functools.partial(_backend.matmul, kernel=kernel)
        is_float16 = self.compute_dtype == "float16"
        return _in_range(multiply, inputs) if is_float16 else multiply(inputs)

    def _add_lora(self, outputs, inputs, training):
        if training and self.lora.dropout:
            inputs = keras.random.dropout(inputs, self.lora.dropout, seed=self._dropout_seed)
        update = self._matmul(self._matmul(inputs, self.lora_kernel_a), self.lora_kernel_b)
        return outputs + ops.cast(update * self.lora.scale, outputs.dtype)

    # LoRA

    @property
    def is_merged(self):
        return self.unmerged_kernel is not None

    def enable_lora(self, rank, alpha=None, dropout=0.0):
        """Adds LoRA and freezes the kernel. The output stays what it was: B starts at zero.

        Of a `PaliGemma2` use the model's methods of this and the following names: they also
        have its programs compiled anew.

        Args:
            rank: int.
            alpha: float or None for `rank`; the update is multiplied by `alpha / rank`.
            dropout: float in [0, 1), share of the inputs of A that is dropped in training.

        Raises:
            ValueError: if an option is out of range, the layer has LoRA or is not built.
        """
        options = LoraOptions(rank, rank if alpha is None else alpha, dropout)
        if not self.built:
            raise ValueError(f"Build the layer {self.name!r} before `enable_lora`.")
        if self.lora is not None:
            raise ValueError(
                f"The layer {self.path!r} has LoRA of rank {self.lora.rank} already. Call "
                "`drop_lora()` first."
            )
        with self._open_name_scope(), unlocked(self):
            self.lora_kernel_a = self.add_weight(
                name="lora_kernel_a",
                shape=(self.input_spec.axes[-1], rank),
                # uniform in ±1/√in, as PEFT's kaiming_uniform with a = √5
                initializer=keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform"),
                dtype="float32",
            )
            self.lora_kernel_b = self.add_weight(
                name="lora_kernel_b",
                shape=(rank, self.units),
                initializer="zeros",
                dtype="float32",
            )
            if dropout:
                self._dropout_seed = StepSeed()
        if self.quantized is None:
            self._kernel.trainable = False
        self.lora = options

    def merge_lora(self):
        """Adds `alpha / rank · A·B` to the kernel, in float32, and rounds once.

        The kernel as it was waits in the memory of the host for `unmerge_lora`; `drop_lora`
        frees it.

        Raises:
            ValueError: without LoRA, if merged already, or if the kernel is quantized.
        """
        self._require_lora(merged=False)
        if self.quantization_mode is not None:
            raise ValueError(
                f"The kernel of {self.path!r} is quantized to {self.quantization_mode}, which is "
                "too coarse to hold an update. Call `merge_lora()` and `drop_lora()` before "
                "`quantize`, or leave LoRA unmerged."
            )
        merged = self.merged_kernel()
        kernel = _backend.to_numpy(self._kernel)
        self.unmerged_kernel = kernel.astype(self._kernel.dtype)  # a copy
        self._kernel.assign(merged)
        variables = (self.lora_kernel_a, self.lora_kernel_b)
        self.frozen_before_merge = tuple(v.name for v in variables if not v.trainable)
        for variable in variables:
            variable.trainable = False

    def merged_kernel(self):
        """The kernel with LoRA in it, if there is any, as a NumPy array of the kernel's dtype."""
        kernel = _backend.to_numpy(self._kernel)
        if self.lora is None or self.is_merged:
            return kernel
        # NumPy: the products of accelerators in float32 may be coarser.
        a, b = _backend.to_numpy((self.lora_kernel_a, self.lora_kernel_b))
        merged = kernel.astype("float32") + self.lora.scale * (a @ b)
        return merged.astype(self._kernel.dtype)

    def unmerge_lora(self):
        """Undoes `merge_lora`, bit for bit.

        Raises:
            ValueError: if not merged.
        """
        self._require_lora(merged=True)
        self._kernel.assign(self.unmerged_kernel)
        self.unmerged_kernel = None
        for variable in (self.lora_kernel_a, self.lora_kernel_b):
            variable.trainable = variable.name not in self.frozen_before_merge
        self.frozen_before_merge = ()

    def drop_lora(self):
        """Removes LoRA for good; the kernel stays as it is, merged or not.

        Raises:
            ValueError: without LoRA.
        """
        self._require_lora()
        for name in ("lora_kernel_a", "lora_kernel_b", "_dropout_seed"):
            _backend.remove_attribute(self, name)
        self.unmerged_kernel = self.lora = None
        self.frozen_before_merge = ()

    def _require_lora(self, merged=None):
        if self.lora is None:
            raise ValueError(f"The layer {self.path!r} has no LoRA. Call `enable_lora` first.")
        if merged is not None and self.is_merged != merged:
            state, method = ("merged", "unmerge") if self.is_merged else ("not merged", "merge")
            raise ValueError(
                f"LoRA of the layer {self.path!r} is {state}. Call `{method}_lora()` first."
            )

    # Quantization and saving, as Keras asks for it

    matrix_name, _is_transposed = "kernel", True

    @property
    def kernel(self):
        """The variable (in, units), or what a quantized kernel stands for, a tensor."""
        if self.quantized is None:
            return self._kernel
        return ops.transpose(self.quantized.values(self.compute_dtype))

    def check_quantizable(self):
        super().check_quantizable()
        if self.is_merged:
            raise ValueError(
                f"LoRA of {self.path!r} is merged. Call `drop_lora()`, which keeps it in the "
                "kernel, or `unmerge_lora()` before `quantize`."
            )

    def save_own_variables(self, store):
        if self.is_merged:
            store["0"] = ops.convert_to_tensor(self.unmerged_kernel, dtype=self._kernel.dtype)
        elif self.quantized is None:
            store["0"] = self._kernel
        if self.bias is not None:
            store["1"] = self.bias
        if self.lora is not None:
            store["lora_kernel_a"] = self.lora_kernel_a
            store["lora_kernel_b"] = self.lora_kernel_b

    def load_own_variables(self, store):
        if self.is_merged:
            raise ValueError(f"LoRA of {self.path!r} is merged. Call `unmerge_lora()` first.")
        expected = {"0"} if self.quantized is None else set()
        expected |= {"1"} if self.bias is not None else set()
        expected |= {"lora_kernel_a", "lora_kernel_b"} if self.lora else set()
        # Keras tries again under other paths, where it finds nothing, and shows the last error.
        if set(store.keys()) != expected:
            raise ValueError(
                f"The file does not fit the layer {self.path!r} of {self.input_spec.axes[-1]} "
                f"inputs and {self.units} units, which has {'LoRA' if self.lora else 'no LoRA'} "
                f"and is {'quantized' if self.quantized else 'not quantized'}. Load a file into a "
                "model of its config, after `enable_lora` and `quantize` with its options."
            )
        if self.quantized is None:
            self._kernel.assign(store["0"])
        if self.bias is not None:
            self.bias.assign(store["1"])
        if self.lora:
            self.lora_kernel_a.assign(store["lora_kernel_a"])
            self.lora_kernel_b.assign(store["lora_kernel_b"])


def _in_range(multiply, inputs):
    """`multiply(inputs)` in float32, whose products stay within the range of float16."""
    inputs = ops.cast(inputs, "float32")
    largest = ops.max(ops.abs(inputs), axis=-1, keepdims=True)
    # The largest input becomes 1/32: sums of many products must fit too.
    exponent = ops.ceil(ops.log2(largest + 1e-30)) + 5
    scale = 2.0**exponent
    return ops.cast(multiply(inputs / scale), "float32") * scale


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Options of the LoRA of one layer, for `PaliGemma2.enable_lora_on`.

    Args:
        rank: int, the width between A and B.
        alpha: float, the update is multiplied by `alpha / rank`.
        dropout: float in [0, 1), share of the inputs of A that is dropped in training.

    Raises:
        ValueError: if an argument is out of range.

    Source: LoRA as in the paper arXiv 2106.09685.
    """

    rank: int
    alpha: float
    dropout: float = 0.0

    def __post_init__(self):
        check_positive(rank=self.rank)
        if not _is_number(self.alpha) or self.alpha <= 0:
            raise ValueError(f"`alpha` must be a positive number. Received: alpha={self.alpha!r}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1). Received: dropout={self.dropout!r}")

    @property
    def scale(self):
        """`alpha / rank`."""
        return self.alpha / self.rank


def _is_number(x):
    return isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)


class TokenEmbedding(Quantizable, DirectCall, keras.layers.ReversibleEmbedding):
    """Token embedding whose transpose maps hidden states back to token logits.

    Args:
        input_dim: int, V.
        output_dim: int, D.
        **kwargs: see `keras.layers.ReversibleEmbedding`.

    Call arguments:
        inputs: int32 (B, T) token ids, or float (..., D) hidden states if `reverse`.
        reverse: bool.

    Returns:
        float (B, T, D) embeddings times `√D`, exact in float32 and rounded once to
        `activation_dtype(compute_dtype)`; or float32 (..., V) logits.

    Source: big_vision `models/ppp/gemma.py`, `Embedder`.
    """

    def __init__(self, input_dim, output_dim, **kwargs):
        super().__init__(input_dim, output_dim, **kwargs)
        self.autocast = False

    def call(self, inputs, reverse=False):
        if reverse:
            inputs = ops.cast(inputs, self.compute_dtype)
            if self.quantized is not None:
                return self.quantized.multiply(inputs, in_float32=True)
            return _backend.matmul_transposed_float32(inputs, self.matrix())
        if self.quantized is not None:
            embedded = self.quantized.take(inputs)
        else:
            embedded = ops.cast(ops.take(self._embeddings, inputs, axis=0), "float32")
        return ops.cast(embedded * self.output_dim**0.5, activation_dtype(self.compute_dtype))

    def matrix(self):
        """The embeddings (V, D) in the dtype of products."""
        if self.quantized is not None:
            return self.quantized.values(self.compute_dtype)
        return ops.cast(self._embeddings, self.compute_dtype)

    # Quantization and saving, as Keras asks for it

    matrix_name = "embeddings"

    @property
    def is_trainable(self):
        """Whether the embeddings are."""
        return self.quantized is None and self._embeddings.trainable

    @property
    def embeddings(self):
        """The variable (V, D), or what a quantized one stands for, a tensor."""
        return self._embeddings if self.quantized is None else self.matrix()

    def save_own_variables(self, store):
        if self.quantized is None:
            store["0"] = self._embeddings

    def load_own_variables(self, store):
        if ("0" in store) != (self.quantized is None):
            raise ValueError(
                f"The file does not fit the layer {self.path!r} of {self.input_dim} tokens and "
                f"width {self.output_dim}, which is "
                f"{'quantized' if self.quantized else 'not quantized'}. Load a file into a model "
                "of its config, after `quantize` with its options."
            )
        if self.quantized is None:
            self._embeddings.assign(store["0"])
