"""Architectures: frozen dataclasses, and the table of published variants.

Both towers use big_vision's words. `mlp_dim` is the true width of one gate.
A reader who comes from another library:

| here                    | transformers                  | keras_hub (PaliGemmaBackbone)  |
|-------------------------|-------------------------------|--------------------------------|
| `width`                 | `hidden_size`                 | `hidden_dim`, `vit_hidden_dim` |
| `depth`                 | `num_hidden_layers`           | `num_layers`, `vit_num_layers` |
| `mlp_dim`               | `intermediate_size`           | `intermediate_dim / 2`         |
| `num_heads`             | `num_attention_heads`         | `num_query_heads`              |
| `num_kv_heads`          | `num_key_value_heads`         | `num_key_value_heads`          |
| `attn_logit_softcap`    | `attn_logit_softcapping`      | `attention_logit_soft_cap`     |
| `final_logit_softcap`   | `final_logit_softcapping`     | `final_logit_soft_cap`         |
| `query_pre_attn_scalar` | `query_pre_attn_scalar`       | (always `head_dim`)            |
"""

import dataclasses
import math
import numbers

import numpy as np


def _require(condition, field, expected, value):
    if not condition:
        raise ValueError(f"`{field}` must be {expected}. Received: {field}={value!r}")


def _use_plain_numbers(config):
    """Replaces NumPy's numbers, which JSON does not know."""
    for field, value in vars(config).items():
        if isinstance(value, np.generic):
            object.__setattr__(config, field, value.item())


def check_positive(**options):
    """Raises a ValueError unless all options are positive integers, of Python or NumPy."""
    for name, value in options.items():
        is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        _require(is_int and value > 0, name, "a positive integer", value)


def _require_positive_ints(config, *fields):
    check_positive(**{field: getattr(config, field) for field in fields})


def _require_positive_numbers(config, *fields):
    for field in fields:
        value = getattr(config, field)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _require(
            is_number and math.isfinite(value) and value > 0, field, "a positive number", value
        )


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """SigLIP vision tower. The defaults are So400m/14 at 224 px.

    Args:
        width: int, size of the residual stream.
        depth: int, number of transformer blocks.
        mlp_dim: int, hidden size of the MLP.
        num_heads: int, number of attention heads; divides `width`.
        image_size: int, side of the square input in pixels; a multiple of `patch_size`.
        patch_size: int, side of a patch in pixels.
        norm_eps: float, epsilon of the layer norms.

    Source: big_vision `models/vit.py`, variant "So400m/14".
    """

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    norm_eps: float = 1e-6

    def __post_init__(self):
        _use_plain_numbers(self)
        _require_positive_ints(
            self, "width", "depth", "mlp_dim", "num_heads", "image_size", "patch_size"
        )
        _require_positive_numbers(self, "norm_eps")
        _require(
            self.width % self.num_heads == 0,
            "num_heads",
            f"a divisor of width={self.width}",
            self.num_heads,
        )
        _require(
            self.image_size % self.patch_size == 0,
            "image_size",
            f"a multiple of patch_size={self.patch_size}",
            self.image_size,
        )

    @property
    def head_dim(self):
        return self.width // self.num_heads

    @property
    def num_tokens(self):
        """Image tokens per image: 256, 1,024 and 4,096 at 224, 448 and 896 px."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Gemma 1 or Gemma 2 decoder.

    Args:
        width: int, size of the residual stream.
        depth: int, number of transformer blocks.
        mlp_dim: int, hidden size of one gate of the MLP.
        num_heads: int, number of query heads; a multiple of `num_kv_heads`.
        num_kv_heads: int, number of key/value heads.
        head_dim: int, size of a head; even.
        query_pre_attn_scalar: float, queries are scaled by `query_pre_attn_scalar ** -0.5`.
        use_post_norms: bool, whether attention and MLP outputs are normalised (Gemma 2).
        attn_logit_softcap: float or None; attention logits become `cap * tanh(logits / cap)`.
        final_logit_softcap: float or None, the same for the token logits. The PaliGemma 2
            paper switched the caps off for transfer.
        sliding_window: int or None; in even blocks a suffix token sees only the last
            `sliding_window` tokens. PaliGemma was trained without a window.
        vocab_size: int, 256,000 Gemma tokens, 1,024 locations and 128 segmentation codes.
        max_positions: int, longest sequence of image and text tokens.
        rope_base: float, base of the rotary frequencies.
        norm_eps: float, epsilon of the RMS norms.
        dropout: float in [0, 1), share of what attention and MLP add to the stream that is
            dropped in training.

    Source: big_vision `models/ppp/gemma.py`, `get_config`.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_pre_attn_scalar: float
    use_post_norms: bool = False
    attn_logit_softcap: float | None = None
    final_logit_softcap: float | None = None
    sliding_window: int | None = None
    vocab_size: int = 257_152
    max_positions: int = 8_192
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    dropout: float = 0.0

    def __post_init__(self):
        _use_plain_numbers(self)
        _require_positive_ints(self, "width", "depth", "mlp_dim", "vocab_size", "max_positions")
        _require_positive_ints(self, "num_heads", "num_kv_heads", "head_dim")
        _require_positive_numbers(self, "query_pre_attn_scalar", "rope_base", "norm_eps")
        for field in ("attn_logit_softcap", "final_logit_softcap"):
            if getattr(self, field) is not None:
                _require_positive_numbers(self, field)
        if self.sliding_window is not None:
            _require_positive_ints(self, "sliding_window")
        _require(
            isinstance(self.use_post_norms, bool), "use_post_norms", "a bool", self.use_post_norms
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            f"a multiple of num_kv_heads={self.num_kv_heads}",
            self.num_heads,
        )
        is_share = isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1
        _require(is_share, "dropout", "a number in [0, 1)", self.dropout)
        _require(self.head_dim % 2 == 0, "head_dim", "even (rotary embedding)", self.head_dim)


@dataclasses.dataclass(frozen=True)
class PaliGemmaConfig:
    """A vision tower and a decoder; the projector between them has no choices of its own.

    Args:
        vision: SiglipConfig.
        text: GemmaConfig.

    Example:
        >>> PaliGemmaConfig.from_variant("paligemma2-3b", image_size=448).vision.num_tokens
        1024
    """

    vision: SiglipConfig
    text: GemmaConfig

    def __post_init__(self):
        _require(isinstance(self.vision, SiglipConfig), "vision", "a `SiglipConfig`", self.vision)
        _require(isinstance(self.text, GemmaConfig), "text", "a `GemmaConfig`", self.text)
        _require(
            self.vision.num_tokens < self.text.max_positions,
            "max_positions",
            f"more than the {self.vision.num_tokens} tokens of one image",
            self.text.max_positions,
        )

    @classmethod
    def from_variant(cls, variant, image_size=224):
        """The architecture of a published model.

        Args:
            variant: str, one of `VARIANTS`: "paligemma-3b", "paligemma2-3b",
                "paligemma2-10b", "paligemma2-28b".
            image_size: int, 224, 448 and 896 are published; any multiple of 14 works.

        Returns:
            PaliGemmaConfig.

        Raises:
            ValueError: if there is no such variant.
        """
        if variant not in VARIANTS:
            raise ValueError(
                f"`variant` must be one of {sorted(VARIANTS)}. Received: variant={variant!r}"
            )
        return cls(vision=SiglipConfig(image_size=image_size), text=VARIANTS[variant])

    def replace(self, **changes):
        """A copy with fields of either tower changed, as `replace(image_size=448)`.

        Args:
            **changes: fields of `SiglipConfig` or `GemmaConfig`. A field of both towers
                (`width`, `depth`, `mlp_dim`, `num_heads`, `norm_eps`) is changed through
                `vision=` or `text=` instead.

        Returns:
            PaliGemmaConfig.

        Raises:
            ValueError: if a field is unknown, or belongs to both towers.
        """
        towers = {name: changes.pop(name, getattr(self, name)) for name in ("vision", "text")}
        fields = {name: {} for name in towers}
        for field, value in changes.items():
            owners = [name for name, tower in self.to_dict().items() if field in tower]
            if len(owners) != 1:
                reason = (
                    "belongs to both towers, pass `vision=` or `text=`"
                    if owners
                    else f"is none of {sorted(set().union(*self.to_dict().values()))}"
                )
                raise ValueError(f"Cannot change the config field `{field}`: it {reason}.")
            fields[owners[0]][field] = value
        return PaliGemmaConfig(
            **{name: dataclasses.replace(towers[name], **fields[name]) for name in towers}
        )

    def to_dict(self):
        """Plain nested dict, fit for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values):
        """The inverse of `to_dict`.

        Raises:
            ValueError: if a key is missing or unknown.
        """
        _require(
            isinstance(values, dict) and set(values) == {"vision", "text"},
            "values",
            "a dict with the keys 'vision' and 'text'",
            values,
        )
        try:
            return cls(vision=SiglipConfig(**values["vision"]), text=GemmaConfig(**values["text"]))
        except TypeError as error:
            raise ValueError(f"The config has a missing or unknown field: {error}") from error


def _gemma2(width, depth, mlp_dim, num_heads, num_kv_heads, head_dim, query_pre_attn_scalar):
    return GemmaConfig(
        width,
        depth,
        mlp_dim,
        num_heads,
        num_kv_heads,
        head_dim,
        query_pre_attn_scalar,
        use_post_norms=True,
        attn_logit_softcap=50.0,
        final_logit_softcap=30.0,
    )


# fmt: off
VARIANTS = {  # Source: big_vision models/ppp/gemma.py, get_config.
    #                             width depth mlp_dim heads kv head_dim query_pre_attn_scalar
    "paligemma-3b":   GemmaConfig(2048, 18,   16384,  8,    1,  256,    256),
    "paligemma2-3b":      _gemma2(2304, 26,    9216,  8,    4,  256,    256),
    "paligemma2-10b":     _gemma2(3584, 42,   14336,  16,   8,  256,    256),
    "paligemma2-28b":     _gemma2(4608, 46,   36864,  32,   16, 128,    144),
}
# fmt: on
