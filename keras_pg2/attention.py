"""Attention shared by both towers: masks, positions, rotary embedding, soft-capped attention.

Pure functions of tensors. Axis letters, here and where a docstring says nothing else:

    B batch               N query heads          D width (of the tower at hand)
    M images per example  K key/value heads      F mlp_dim
    T query length        G = N / K              V vocabulary
    S key/value length    H head dim             P tokens per image
                                                 I image side in pixels
"""

from keras import ops

from keras_pg2 import _backend


def block_ids(suffix_mask):
    """Block number of each token: 0 in the prefix, then 1, 2, … along the suffix.

    Args:
        suffix_mask: bool (B, T), True on suffix tokens.

    Returns:
        int32 (B, T).

    Source: big_vision `models/proj/paligemma/paligemma.py`, `make_attn_mask`.
    """
    return ops.cumsum(ops.cast(suffix_mask, "int32"), axis=-1)


def token_positions(padding_mask):
    """Position of each token among the real tokens of its row; padding repeats the last one.

    Args:
        padding_mask: bool (B, T), True on real tokens.

    Returns:
        int32 (B, T), counted from 0.

    Source: big_vision `models/proj/paligemma/gemma_bv.py`, `prefill_cache`.
    """
    counts = ops.cumsum(ops.cast(padding_mask, "int32"), axis=-1)
    return counts - ops.cast(counts > 0, "int32")


def attention_mask(query_block, key_block, key_valid):
    """Prefix-LM mask: bidirectional inside the prefix, causal along the suffix.

    A query sees a key when the key is a real token and `key_block <= query_block`.
    With a prefix of 2 tokens, 1 padding token and a suffix of 2:

        block  0 0 0 1 2      query 0  1 1 . . .
        valid  1 1 . 1 1      query 1  1 1 . . .
                              query 3  1 1 . 1 .
                              query 4  1 1 . 1 1

    Args:
        query_block: int32 (B, T), see `block_ids`.
        key_block: int32 (B, S).
        key_valid: bool (B, S).

    Returns:
        bool (B, T, S), True where attention is allowed.
    """
    return ops.logical_and(key_valid[:, None, :], key_block[:, None, :] <= query_block[:, :, None])


def sliding_window_mask(mask, query_block, query_position, key_position, window):
    """Narrows a mask to the last `window` tokens; prefix queries keep the whole prefix.

    Args:
        mask: bool (B, T, S), from `attention_mask`.
        query_block: int32 (B, T).
        query_position: int32 (B, T), see `token_positions`.
        key_position: int32 (B, S).
        window: int, number of tokens seen, the query's own included.

    Returns:
        bool (B, T, S).

    Source: transformers 5.23 `masking_utils.py`, sliding windows with `token_type_ids`.
    """
    near = query_position[:, :, None] - key_position[:, None, :] < window
    in_prefix = ops.expand_dims(query_block == 0, -1)
    return ops.logical_and(mask, ops.logical_or(near, in_prefix))


def rotary_angles(positions, head_dim, base):
    """Cosines and sines of the rotary embedding, made once per forward pass.

    Args:
        positions: int32 (B, T).
        head_dim: int, H.
        base: float, the largest wavelength is `2π · base`.

    Returns:
        cos, sin: float32 (B, T, 1, H), whatever the dtype policy: bfloat16 cannot tell position
        257 from 258. Both halves of the cosines are the same, and of the sines opposite.

    Source: big_vision `models/ppp/gemma.py`, `_apply_rope`.
    """
    exponents = ops.arange(0, head_dim, 2, dtype="float32") / head_dim
    frequencies = 1.0 / float(base) ** exponents
    angles = ops.cast(positions, "float32")[:, :, None, None] * frequencies
    cos, sin = ops.cos(angles), ops.sin(angles)
    return ops.concatenate([cos, cos], axis=-1), ops.concatenate([-sin, sin], axis=-1)


def attention(query, key, value, mask=None, logit_softcap=None):
    """Grouped-query attention with optional logit soft-capping.

    Args:
        query: float (B, T, N, H), rotated and scaled.
        key: float (B, K, S, H), N a multiple of K; its dtype is that of the products.
        value: float (B, K, S, H).
        mask: bool (B, T, S) or None, True where attention is allowed.
        logit_softcap: float or None; logits become `cap * tanh(logits / cap)`.

    Returns:
        float (B, T, N, H) in the dtype of `value`. Soft cap and softmax run in float32.

    Source: big_vision `models/ppp/gemma.py`, `Attention.__call__`.
    """
    query = ops.cast(query, key.dtype)
    if logit_softcap is None and _backend.has_fused_attention(query, key):
        return _backend.fused_attention(query, key, value, mask)
    function = _backend.recomputed(
        lambda key, value, query, mask=None: _attention(query, key, value, mask, logit_softcap)
    )
    # Long prefixes (896 px has 4,096 image tokens) would need gigabytes of logits.
    return _backend.in_chunks(
        function,
        [query] if mask is None else [query, mask],
        max_length=_backend.max_queries(query, key),
        shared=[key, value],
    )


def _attention(query, key, value, mask, logit_softcap):
    if not _backend.IS_COMPILED and not _backend.needs_gradients(query, key, value):
        return _backend.torch_attention(query, key, value, mask, logit_softcap)
    num_heads, head_dim = query.shape[2:]
    num_kv_heads = key.shape[1]
    query_length = ops.shape(query)[1]
    group = (-1, query_length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    query = ops.reshape(query, group)  # (B, T, K, G, H)
    logits = _backend.attention_logits(query, key)
    if logit_softcap is not None:
        logits = ops.tanh(logits / logit_softcap) * logit_softcap
    if mask is not None:
        logits = ops.where(mask[:, None, :, None], logits, _backend.MASKED_LOGIT)
    probs = ops.cast(ops.softmax(logits, axis=-1), value.dtype)  # (B, K, T, G, S)
    # With the axes in this order XLA's product for one token is 12 times as fast on a CPU.
    output = ops.swapaxes(_backend.einsum("bktgs,bksh->bktgh", probs, value), 1, 2)
    return ops.reshape(output, (-1, query_length, num_heads, head_dim))
