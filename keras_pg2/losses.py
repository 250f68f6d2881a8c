"""Cross-entropy over the vocabulary in chunks: a full logits tensor never exists.

At 257,152 tokens the logits of a single position are a megabyte. The gradient of each chunk is
taken at once, while its logits are there, so no product is computed twice.
"""

import functools
import math

from keras import ops

from keras_pg2 import _backend
from keras_pg2.quantization import QuantizedMatrix

# Most logits in memory at a time: 128 MiB in float32, about 130 rows of PaliGemma's vocabulary.
_MAX_LOGITS = 2**25
_MIN_CHUNKS = 4  # most answers are short, and chunks after the longest are left out


def chunk_length(batch_size, length, vocab_size):
    """Positions per row and chunk: as many as fit, in chunks of equal size.

    Chunks run along the rows, not across them, so that a batch may be spread over devices.

    Args:
        batch_size: int, B.
        length: int, T.
        vocab_size: int, V.

    Returns:
        int, at least 1.
    """
    longest = max(1, _MAX_LOGITS // (batch_size * vocab_size))
    return max(1, math.ceil(length / max(_MIN_CHUNKS, math.ceil(length / longest))))


def token_losses(
    hidden, embeddings, targets, weights, softcap=None, label_smoothing=0.0, train_embeddings=True
):
    """Weighted cross-entropy of each row's first tokens, those with a weight.

    With label smoothing ε a target has the probability 1 - ε, every other token ε / (V - 1).

    Args:
        hidden: float (B, T, D), after the final norm; its position t predicts target t.
        embeddings: float (V, D), in the dtype of the products; or a QuantizedMatrix of that shape,
            which is decoded in parts and has no gradient.
        targets: int32 (B, T). The tokens with a weight come first in each row.
        weights: float32 (B, T), 0 after the last token that counts.
        softcap: float or None; logits become `cap * tanh(logits / cap)`.
        label_smoothing: float in [0, 1).
        train_embeddings: bool, whether a tensor `embeddings` needs a gradient.

    Returns:
        loss: float32 scalar, the sum of weights times cross-entropies. Its gradient is known at
            once; that of `losses` takes the same work again.
        losses: float32 (B, T), the cross-entropies, 0 where the weight is.
        hits: float32 (B, T), 1 where the most likely token is the target, else 0.

    Source: big_vision `trainers/proj/paligemma/train.py`, `loss_fn`.
    """
    length = hidden.shape[1]
    if isinstance(embeddings, QuantizedMatrix):
        vocab_size, dtype = embeddings.num_rows, embeddings.compute_dtype
        matrix = (embeddings.codes.value, embeddings.scales.value)
        multiply, multiply_back = embeddings.multiply_unrounded, embeddings.multiply_back
        train_embeddings = False
    else:
        vocab_size, dtype, matrix = embeddings.shape[0], embeddings.dtype, (embeddings,)
        multiply = functools.partial(_backend.matmul_transposed_float32, all_exact=True)
        multiply_back = _backend.matmul
    # TensorFlow forgets the batch size after it has changed once; symbols have none.
    known_size = hidden.shape[0] if isinstance(hidden.shape[0], int) else None
    chunk = chunk_length(known_size or 64, length, vocab_size)
    num_chunks = max(1, math.ceil(length / chunk))
    padding = ((0, 0), (0, num_chunks * chunk - length))
    hidden = ops.pad(hidden, (*padding, (0, 0)))
    targets, weights = ops.pad(targets, padding), ops.pad(weights, padding)
    other = label_smoothing / (vocab_size - 1)  # probability of each token but the target
    is_differentiable = _backend.needs_gradients(hidden, *matrix)
    train_embeddings = train_embeddings and is_differentiable

    def losses_of(logits, targets, weights):
        """Losses and hits (B, chunk), and the gradient of the losses (B, chunk, V), unweighted."""
        slope = None
        if softcap is not None:
            capped = ops.tanh(logits / softcap)
            logits, slope = capped * softcap, 1 - ops.square(capped)
        is_target = ops.arange(vocab_size, dtype="int32") == targets[..., None]  # (B, chunk, V)
        highest = ops.max(logits, axis=-1)
        log_total = ops.logsumexp(logits, axis=-1)
        target_logit = ops.sum(ops.where(is_target, logits, 0.0), axis=-1)
        losses = log_total - (1 - label_smoothing - other) * target_logit
        if label_smoothing:
            losses = losses - other * ops.sum(logits, axis=-1)
        counts = ops.cast(weights > 0, "float32")
        hits = counts * ops.cast(target_logit >= highest, "float32")
        if not is_differentiable:
            return counts * losses, hits
        gradient = ops.exp(logits - log_total[..., None]) - other
        gradient = ops.where(is_target, gradient - (1 - label_smoothing - other), gradient)
        if slope is not None:
            gradient = gradient * slope
        return counts * losses, hits, ops.cast(gradient, dtype)

    def chunk_losses(matrix, hidden, targets, weights, factors):
        """Losses and hits (B, chunk), and the gradients of the sum of factors times losses."""
        logits = multiply(ops.cast(hidden, dtype), *matrix)
        losses, hits, *gradient = _backend.by_position(losses_of, [logits, targets, weights])
        if not is_differentiable:
            return losses, hits, None, None
        # Factors come last: times 1 / 1,000 the gradients would underflow in float16.
        gradient = gradient[0]
        hidden_gradient = ops.cast(multiply_back(gradient, *matrix), "float32")
        hidden_gradient = hidden_gradient * factors[..., None]
        embeddings_gradient = None
        if train_embeddings:
            largest = ops.maximum(ops.max(ops.abs(factors)), 1e-30)
            weighted = ops.cast(hidden, "float32") * (factors / largest)[..., None]
            embeddings_gradient = largest * _backend.einsum_float32(
                "btv,btd->vd", gradient, ops.cast(weighted, dtype)
            )
        return losses, hits, hidden_gradient, embeddings_gradient

    def all_losses(hidden, targets, weights, *matrix, upstream=None):
        factors = weights  # of the losses in what is differentiated
        if upstream is not None:
            factors = weights * upstream[0] + ops.where(weights > 0, upstream[1], 0.0)
        # The rows end early: only chunks with a weight are computed.
        last = ops.max(ops.sum(ops.cast(weights > 0, "int32"), axis=1))
        used_chunks = (last + chunk - 1) // chunk

        def step(index, state):
            start = index * chunk
            parts = (_backend.read(x, start, chunk) for x in (hidden, targets, weights, factors))
            *values, embeddings_gradient = chunk_losses(matrix, *parts)
            new = {
                name: _backend.write(state[name], value, start)
                for name, value in zip(("losses", "hits", "hidden_gradient"), values)
                if name in state
            }
            if train_embeddings:
                new["embeddings_gradient"] = state["embeddings_gradient"] + embeddings_gradient
            return new

        state = {"losses": ops.zeros_like(weights), "hits": ops.zeros_like(weights)}
        if is_differentiable:
            state["hidden_gradient"] = ops.zeros_like(hidden)
        if train_embeddings:
            state["embeddings_gradient"] = ops.zeros(matrix[0].shape, "float32")
        state = _backend.repeat(step, used_chunks, state)
        loss = ops.sum(weights * state["losses"])
        gradients = (state.get("hidden_gradient"), None, None, state.get("embeddings_gradient"))
        return loss, (state["losses"], state["hits"]), (*gradients, None)[: 3 + len(matrix)]

    tensors = (hidden, targets, weights, *matrix)
    if is_differentiable:
        loss, (losses, hits) = _backend.with_gradients(all_losses)(*tensors)
    else:
        loss, (losses, hits), _ = all_losses(*tensors)
    return loss, losses[:, :length], ops.stop_gradient(hits)[:, :length]
