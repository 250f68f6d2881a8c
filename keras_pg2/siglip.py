"""SigLIP vision tower: a pre-norm transformer over the patches of an image."""

import dataclasses

import keras
from keras import activations, layers, ops

from keras_pg2 import _backend
from keras_pg2.attention import attention
from keras_pg2.config import SiglipConfig
from keras_pg2.linear import DirectCall, Linear, activation_dtype, renew_seeds


class SiglipAttention(DirectCall, layers.Layer):
    """Bidirectional multi-head attention with biases.

    Args:
        config: SiglipConfig.

    Call arguments:
        x: float (B, P, D).

    Returns:
        float (B, P, D).
    """

    def __init__(self, config, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.config = config
        self.query = Linear(config.width, name="query", dtype=self.dtype_policy)
        self.key = Linear(config.width, name="key", dtype=self.dtype_policy)
        self.value = Linear(config.width, name="value", dtype=self.dtype_policy)
        self.output_projection = Linear(config.width, name="output", dtype=self.dtype_policy)

    def build(self, input_shape):
        for layer in (self.query, self.key, self.value, self.output_projection):
            layer.build(input_shape)

    def call(self, x):
        config = self.config
        heads = (-1, ops.shape(x)[1], config.num_heads, config.head_dim)
        query = _backend.reshape(self.query(x), heads) * config.head_dim**-0.5
        key = ops.cast(_backend.reshape(self.key(x), heads), self.compute_dtype)
        value = ops.cast(_backend.reshape(self.value(x), heads), self.compute_dtype)
        output = attention(query, ops.swapaxes(key, 1, 2), ops.swapaxes(value, 1, 2))
        return self.output_projection(_backend.reshape(output, (-1, ops.shape(x)[1], config.width)))


def _gelu(x):
    return activations.gelu(x, approximate=True)


class SiglipMLP(DirectCall, layers.Layer):
    """Two linear maps with a GELU (tanh form) between them.

    Args:
        config: SiglipConfig.

    Call arguments:
        x: float (B, P, D).

    Returns:
        float (B, P, D).
    """

    def __init__(self, config, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.config = config
        self.up = Linear(config.mlp_dim, name="up", dtype=self.dtype_policy)
        self.down = Linear(config.width, name="down", dtype=self.dtype_policy)

    def build(self, input_shape):
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], self.config.mlp_dim))

    def call(self, x):
        x = ops.cast(x, activation_dtype(self.compute_dtype))  # as the results, for `in_chunks`
        return _backend.in_chunks(self._multiply, [x], _backend.MAX_TOKENS)

    def _multiply(self, x):
        return self.down(_backend.recomputed(_gelu)(self.up(x)))


class SiglipBlock(DirectCall, layers.Layer):
    """Transformer block: attention and MLP, each after a layer norm, each added to the stream.

    Args:
        config: SiglipConfig.

    Call arguments:
        x: float (B, P, D).
        training: bool, which Keras hands on to the layers inside, for the dropout of LoRA.

    Returns:
        float (B, P, D).

    Source: big_vision `models/vit.py`, `Encoder1DBlock`.
    """

    def __init__(self, config, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.config = config
        self.pre_attention_norm = _layer_norm(config, "pre_attention_norm", self.dtype_policy)
        self.attention = SiglipAttention(config, name="attention", dtype=self.dtype_policy)
        self.pre_mlp_norm = _layer_norm(config, "pre_mlp_norm", self.dtype_policy)
        self.mlp = SiglipMLP(config, name="mlp", dtype=self.dtype_policy)

    def build(self, input_shape):
        for layer in (self.pre_attention_norm, self.attention, self.pre_mlp_norm, self.mlp):
            layer.build(input_shape)

    def call(self, x, training=None):
        # Not `+`: a DTypePolicyMap may give different dtypes.
        x = ops.add(x, self.attention(_backend.recomputed(self.pre_attention_norm)(x)))
        return ops.add(x, self.mlp(_backend.recomputed(self.pre_mlp_norm)(x)))


@keras.saving.register_keras_serializable("keras_pg2")
class SiglipTower(DirectCall, layers.Layer):
    """Patches of an image to contextual image tokens.

    Args:
        config: SiglipConfig.

    Call arguments:
        images: float (B, I, I, 3) in [-1, 1].
        training: bool, whether LoRA's dropout acts, and `use_remat` counts.

    Attributes:
        use_remat: bool, see `GemmaDecoder`.

    Returns:
        float (B, P, D), row by row from the top left.

    Source: big_vision `models/vit.py`, `_Model` with `pool_type="none"`.
    """

    def __init__(self, config, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.config = config
        self.patch_embedding = Linear(config.width, name="patch_embedding", dtype=self.dtype_policy)
        self.blocks = [
            SiglipBlock(config, name=f"block_{i}", dtype=self.dtype_policy)
            for i in range(config.depth)
        ]
        self.final_norm = _layer_norm(config, "final_norm", self.dtype_policy)
        self.use_remat = False

    def build(self, input_shape=None):
        config = self.config
        tokens_shape = (None, config.num_tokens, config.width)
        self.patch_embedding.build((None, config.num_tokens, 3 * config.patch_size**2))
        self.position_embedding = self.add_weight(
            name="position_embedding",
            shape=tokens_shape[1:],
            initializer="random_normal",
        )
        for layer in (*self.blocks, self.final_norm):
            layer.build(tokens_shape)

    def call(self, images, training=None):
        if training:
            renew_seeds(self)
        side, patch = self.config.image_size // self.config.patch_size, self.config.patch_size
        patches = _backend.reshape(images, (-1, side, patch, side, patch, 3))
        patches = ops.transpose(patches, (0, 1, 3, 2, 4, 5))
        patches = _backend.reshape(patches, (-1, side**2, 3 * patch**2))
        x = self.patch_embedding(patches)  # (B, P, D)
        x = ops.cast(x, activation_dtype(self.compute_dtype))
        x = x + ops.cast(self.position_embedding, x.dtype)
        for block in self.blocks:
            if self.use_remat and training:
                x = _rematerialized(block)(x)
            else:
                x = _backend.part(block.__call__)(x, training=training)
        return self.final_norm(x)

    # A model of a user's own may have the tower as a layer. Keras saves that by configs.

    def get_config(self):
        linear = [layer for layer in self._flatten_layers() if isinstance(layer, Linear)]
        if any(layer.lora or layer.quantized for layer in linear):
            raise ValueError(
                "The config of a vision tower alone tells neither of LoRA nor of quantization. "
                "Save the weights alone, or the PaliGemma2; or merge LoRA into a preset first."
            )
        return {**super().get_config(), "config": dataclasses.asdict(self.config)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "config": SiglipConfig(**config["config"])})


class LayerNorm(DirectCall, layers.LayerNormalization):
    """Keras' layer norm, which normalises in float32."""

    def call(self, inputs):
        if _backend.IS_COMPILED or inputs.dtype != self.gamma.value.dtype:
            return super().call(inputs)
        return _backend.torch_layer_norm(inputs, self)


def _layer_norm(config, name, dtype):
    # `autocast=False` keeps a float32 stream from float16 before.
    return LayerNorm(epsilon=config.norm_eps, name=name, dtype=dtype, autocast=False)


def _rematerialized(block):
    return keras.remat(lambda x: block(x, training=True))
