"""Linear maps: `Linear`, a Dense safe in float16, and `TokenEmbedding`, tied both ways."""

import keras
from keras import ops

from keras_pg2 import _backend


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


class Linear(keras.layers.Dense):
    """Dense over the last axis, kernel `(in, out)`.

    In float16 each row is scaled by a power of two before the product, so that neither the
    input nor the result leaves the range of float16, and scaled back in float32.

    Args:
        units: int, size of the output.
        use_bias: bool.
        **kwargs: see `keras.layers.Dense`.

    Call arguments:
        inputs: float (..., in).

    Returns:
        float (..., units) in `activation_dtype(compute_dtype)`.
    """

    def __init__(self, units, use_bias=True, **kwargs):
        super().__init__(units, use_bias=use_bias, **kwargs)
        # Casting float32 activations to float16 on entry would overflow.
        self.autocast = False

    def call(self, inputs, training=None):
        kernel = ops.cast(self.kernel, self.compute_dtype)
        if self.compute_dtype == "float16":
            inputs = ops.cast(inputs, "float32")
            largest = ops.max(ops.abs(inputs), axis=-1, keepdims=True)
            # The largest input becomes 1/32: sums of many products must fit too.
            exponent = ops.ceil(ops.log2(ops.maximum(largest, 1e-30))) + 5
            scale = ops.power(2.0, exponent)
            outputs = ops.matmul(ops.cast(inputs / scale, "float16"), kernel)
            outputs = ops.cast(outputs, "float32") * scale
        else:
            outputs = ops.matmul(ops.cast(inputs, self.compute_dtype), kernel)
        if self.bias is not None:
            outputs = outputs + ops.cast(self.bias, outputs.dtype)
        return outputs

    def compute_output_spec(self, inputs, training=None):
        return keras.KerasTensor(
            (*inputs.shape[:-1], self.units), activation_dtype(self.compute_dtype)
        )


class TokenEmbedding(keras.layers.ReversibleEmbedding):
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
            embeddings = ops.cast(self.embeddings, self.compute_dtype)
            return _backend.matmul_transposed_float32(inputs, embeddings)
        embedded = ops.cast(ops.take(self.embeddings, inputs, axis=0), "float32")
        return ops.cast(embedded * self.output_dim**0.5, activation_dtype(self.compute_dtype))
