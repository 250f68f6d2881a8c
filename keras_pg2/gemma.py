"""Gemma 1 and 2 decoder. One forward pass serves training, prefill and decoding."""

import functools

import keras
from keras import activations, layers, ops

from keras_pg2 import _backend
from keras_pg2.attention import attention, rotary_angles
from keras_pg2.linear import DirectCall, Linear, StepSeed, TokenEmbedding, renew_seeds


class RMSNorm(DirectCall, layers.Layer):
    """`x / √(mean(x²) + eps) · (1 + scale)` in float32.

    Args:
        eps: float.

    Call arguments:
        x: float (..., D).

    Returns:
        float (..., D) in the dtype of `x`.

    Source: big_vision `models/ppp/gemma.py`, `RMSNorm`.
    """

    def __init__(self, eps, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.eps = eps

    def build(self, input_shape):
        self.scale = self.add_weight(name="scale", shape=input_shape[-1:], initializer="zeros")

    def call(self, x):
        normalize = functools.partial(_backend.rms_normalize, eps=self.eps)
        return _backend.recomputed(normalize)(x, self.scale.value)


class GemmaAttention(DirectCall, layers.Layer):
    """Grouped-query self-attention; `project` makes its arguments, with rotary embedding.

    Args:
        config: GemmaConfig.

    Call arguments:
        query: float (B, T, N, H).
        key, value: float (B, K, S, H).
        attention_mask: bool (B, T, S).

    Returns:
        float (B, T, D).
    """

    def __init__(self, config, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.config = config
        query_width = config.num_heads * config.head_dim
        key_width = config.num_kv_heads * config.head_dim
        options = {"use_bias": False, "dtype": self.dtype_policy}
        self.query = Linear(query_width, name="query", **options)
        self.key = Linear(key_width, name="key", **options)
        self.value = Linear(key_width, name="value", **options)
        self.output_projection = Linear(config.width, name="output", **options)

    def build(self, input_shape):
        for layer in (self.query, self.key, self.value):
            layer.build(input_shape)
        self.output_projection.build((*input_shape[:-1], self.query.units))

    def project(self, x, rotary, output_start):
        """Query, key and value.

        Args:
            x: float (B, T, D).
            rotary: cos and sin of the positions of `x`, see `rotary_angles`.
            output_start: int, the first of the T positions whose query is wanted.

        Returns:
            float (B, T - output_start, N, H), and twice (B, K, T, H).
        """
        config = self.config
        length = ops.shape(x)[1]
        key = _backend.reshape(self.key(x), (-1, length, config.num_kv_heads, config.head_dim))
        value = _backend.reshape(self.value(x), (-1, length, config.num_kv_heads, config.head_dim))
        # Heads first: so TPUs and GPUs want the cache, and would copy any other.
        key = ops.swapaxes(ops.cast(_backend.rotate(key, *rotary), self.compute_dtype), 1, 2)
        value = ops.swapaxes(ops.cast(value, self.compute_dtype), 1, 2)
        if output_start:
            x, rotary = x[:, output_start:], [angles[:, output_start:] for angles in rotary]
            length = ops.shape(x)[1]
        query = _backend.reshape(self.query(x), (-1, length, config.num_heads, config.head_dim))
        query = _backend.rotate(query, *rotary) * config.query_pre_attn_scalar**-0.5
        return query, key, value

    def call(self, query, key, value, attention_mask):
        output = attention(query, key, value, attention_mask, self.config.attn_logit_softcap)
        shape = (-1, ops.shape(output)[1], self.query.units)
        return self.output_projection(_backend.reshape(output, shape))


def _gelu_times(gate, up):
    # Not `*`: a DTypePolicyMap may give different dtypes.
    return ops.multiply(activations.gelu(gate, approximate=True), up)


class GemmaMLP(DirectCall, layers.Layer):
    """Gated MLP: `down(gelu(gate(x)) · up(x))`, GELU in its tanh form.

    Args:
        config: GemmaConfig.

    Call arguments:
        x: float (B, T, D).

    Returns:
        float (B, T, D).
    """

    def __init__(self, config, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.config = config
        options = {"use_bias": False, "dtype": self.dtype_policy}
        self.gate = Linear(config.mlp_dim, name="gate", **options)
        self.up = Linear(config.mlp_dim, name="up", **options)
        self.down = Linear(config.width, name="down", **options)

    def build(self, input_shape):
        self.gate.build(input_shape)
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], self.config.mlp_dim))

    def call(self, x):
        return _backend.in_chunks(self._multiply, [x], _backend.MAX_TOKENS)

    def _multiply(self, x):
        return self.down(_backend.recomputed(_gelu_times)(self.gate(x), self.up(x)))


class GemmaBlock(DirectCall, layers.Layer):
    """Transformer block. Gemma 2 also normalises what attention and MLP add to the stream.

    Args:
        config: GemmaConfig.

    Call arguments:
        x: float (B, T, D).
        attention_mask: bool (B, T, S); S is T, or the length of a cache that holds more.
        rotary: cos and sin of the positions of `x`, see `rotary_angles`.
        cache: None, or key and value, each float (B, K, S, H).
        cache_index: int32 scalar, where in the cache the T tokens are written.
        output_start: int, the first of the T positions whose output is wanted.
        training: bool, whether dropout acts.

    Returns:
        float (B, T - output_start, D), and the written cache or None.
    """

    def __init__(self, config, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.config = config

        def norm(name):
            return RMSNorm(config.norm_eps, name=name, dtype=self.dtype_policy)

        self.pre_attention_norm = norm("pre_attention_norm")
        self.attention = GemmaAttention(config, name="attention", dtype=self.dtype_policy)
        self.pre_mlp_norm = norm("pre_mlp_norm")
        self.mlp = GemmaMLP(config, name="mlp", dtype=self.dtype_policy)
        if config.use_post_norms:
            self.post_attention_norm = norm("post_attention_norm")
            self.post_mlp_norm = norm("post_mlp_norm")
        if config.dropout:
            self.attention_seed, self.mlp_seed = StepSeed(), StepSeed()

    def build(self, input_shape):
        for layer in (self.pre_attention_norm, self.attention, self.pre_mlp_norm, self.mlp):
            layer.build(input_shape)
        if self.config.use_post_norms:
            self.post_attention_norm.build(input_shape)
            self.post_mlp_norm.build(input_shape)

    def call(
        self, x, attention_mask, rotary, cache=None, cache_index=None, output_start=0, training=None
    ):
        query, key, value = _backend.part(self._project)(x, rotary, output_start)
        if cache is not None:  # written between the parts, so that it is not copied
            cache = [_backend.write_cache(*pair, cache_index) for pair in zip(cache, (key, value))]
            if attention_mask.shape[2] != x.shape[1]:  # the queries see earlier tokens, too
                key, value = cache
        if output_start:
            x, attention_mask = x[:, output_start:], attention_mask[:, output_start:]
        finish = _backend.part(self._finish)
        return finish(x, query, key, value, attention_mask, training), cache

    def _project(self, x, rotary, output_start):
        return self.attention.project(self.pre_attention_norm(x), rotary, output_start)

    def _finish(self, x, query, key, value, attention_mask, training):
        """All that follows the write into the cache."""
        config = self.config
        update = self.attention(query, key, value, attention_mask)
        if config.use_post_norms:
            update = self.post_attention_norm(update)
        if config.dropout and training:
            update = keras.random.dropout(update, config.dropout, seed=self.attention_seed)
        x = ops.add(x, update)  # not `+`, as in `_gelu_times`
        update = self.mlp(self.pre_mlp_norm(x))
        if config.use_post_norms:
            update = self.post_mlp_norm(update)
        if config.dropout and training:
            update = keras.random.dropout(update, config.dropout, seed=self.mlp_seed)
        return ops.add(x, update)


class GemmaDecoder(DirectCall, layers.Layer):
    """Embedded sequence to hidden states, with `embed` before and `logits` after.

    Args:
        config: GemmaConfig.

    Call arguments:
        x: float (B, T, D), image tokens and embedded text.
        positions: int32 (B, T).
        masks: pair of bool (B, T, S), the mask of the even and of the odd blocks; they differ
            only with a sliding window.
        cache: None, or a list of `(key, value)` per block.
        cache_index: int32 scalar, where in the cache the T tokens are written.
        output_start: int, the first of the T positions whose hidden states are wanted; of the
            others the last block computes keys and values alone.
        training: bool, whether dropout acts, and `use_remat` counts.

    Attributes:
        use_remat: bool, whether in training the activations inside the blocks are not kept for
            the gradient but computed a second time.

    Returns:
        float (B, T - output_start, D) after the final norm, and the written cache or None.

    Source: big_vision `models/ppp/gemma.py`, `Model`.
    """

    def __init__(self, config, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.config = config
        self.embedding = TokenEmbedding(
            config.vocab_size, config.width, name="embedding", dtype=self.dtype_policy
        )
        self.blocks = [
            GemmaBlock(config, name=f"block_{i}", dtype=self.dtype_policy)
            for i in range(config.depth)
        ]
        self.final_norm = RMSNorm(config.norm_eps, name="final_norm", dtype=self.dtype_policy)
        self.use_remat = False

    def build(self, input_shape=None):
        self.embedding.build()
        for layer in (*self.blocks, self.final_norm):
            layer.build((None, None, self.config.width))

    def call(
        self, x, positions, masks, cache=None, cache_index=None, output_start=0, training=None
    ):
        if training:
            renew_seeds(self)
        rotary = rotary_angles(positions, self.config.head_dim, self.config.rope_base)
        caches = [None] * len(self.blocks) if cache is None else cache
        written = []
        for i, (block, block_cache) in enumerate(zip(self.blocks, caches)):
            mask, start = masks[i % 2], output_start if block is self.blocks[-1] else 0
            if self.use_remat and training:
                x = _rematerialized(block, mask, rotary, start)(x)
                continue
            options = {"cache_index": cache_index, "output_start": start, "training": training}
            x, block_cache = block(x, mask, rotary, block_cache, **options)
            written.append(block_cache)
        return self.final_norm(x), None if cache is None else written

    def embed(self, token_ids):
        """Token ids int32 (B, T) to embeddings float (B, T, D), scaled by `√D`."""
        return _backend.part(self.embedding.__call__)(token_ids)

    def logits(self, hidden):
        """Hidden states float (..., D) to token logits float32 (..., V), soft-capped."""
        logits = _backend.part(self.embedding.__call__)(hidden, reverse=True)
        softcap = self.config.final_logit_softcap
        return logits if softcap is None else ops.tanh(logits / softcap) * softcap

    def empty_cache(self, batch_size, length):
        """Zeros for `length` tokens: a list of `(key, value)` per block."""
        config = self.config
        shape = (batch_size, config.num_kv_heads, length, config.head_dim)
        return [
            (ops.zeros(shape, self.compute_dtype), ops.zeros(shape, self.compute_dtype))
            for _ in self.blocks
        ]


def _rematerialized(block, attention_mask, rotary, output_start):
    """The block as a function of x alone; its activations are computed again when needed."""
    options = {"output_start": output_start, "training": True}
    return keras.remat(lambda x: block(x, attention_mask, rotary, **options)[0])
