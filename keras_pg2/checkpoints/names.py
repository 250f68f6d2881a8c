"""Names and layouts of every tensor in each checkpoint format. Data, used both ways.

A row is `(source name, variable path, layout)`. In names `{}` is the number of the block, and
`{_}` keras_hub's suffix: nothing for block 0, then `_1`, `_2`, …. `name[{}]` and `name[{},1]` pick a
slice of a stacked tensor. A layout reads "source axes -> our axes" in the letters of
`attention.py`, with `p q` the sides of a patch, `c` its colours and `E` the decoder's width at the
projector; so a row gives the shape on both sides too.

Sources: transformers 5.23 `models/paligemma`; big_vision `models/ppp/gemma.py` and
`models/vit.py`; keras_hub 0.32 `models/pali_gemma`.
"""

import dataclasses
import math
import re

# Hugging Face safetensors, with the names of the published repositories. `HUGGING_FACE_RENAMES`
# turns the names of later transformers releases into these.
_HUGGING_FACE = """
vision_tower.vision_model.embeddings.patch_embedding.weight        vision/patch_embedding/kernel                D c p q -> (p q c) D
vision_tower.vision_model.embeddings.patch_embedding.bias          vision/patch_embedding/bias                  D -> D
vision_tower.vision_model.embeddings.position_embedding.weight     vision/position_embedding                    P D -> P D
vision_tower.vision_model.encoder.layers.{}.layer_norm1.weight     vision/block_{}/pre_attention_norm/gamma     D -> D
vision_tower.vision_model.encoder.layers.{}.layer_norm1.bias       vision/block_{}/pre_attention_norm/beta      D -> D
vision_tower.vision_model.encoder.layers.{}.self_attn.q_proj.weight    vision/block_{}/attention/query/kernel   (N H) D -> D (N H)
vision_tower.vision_model.encoder.layers.{}.self_attn.q_proj.bias      vision/block_{}/attention/query/bias     (N H) -> (N H)
vision_tower.vision_model.encoder.layers.{}.self_attn.k_proj.weight    vision/block_{}/attention/key/kernel     (N H) D -> D (N H)
vision_tower.vision_model.encoder.layers.{}.self_attn.k_proj.bias      vision/block_{}/attention/key/bias       (N H) -> (N H)
vision_tower.vision_model.encoder.layers.{}.self_attn.v_proj.weight    vision/block_{}/attention/value/kernel   (N H) D -> D (N H)
vision_tower.vision_model.encoder.layers.{}.self_attn.v_proj.bias      vision/block_{}/attention/value/bias     (N H) -> (N H)
vision_tower.vision_model.encoder.layers.{}.self_attn.out_proj.weight  vision/block_{}/attention/output/kernel  D (N H) -> (N H) D
vision_tower.vision_model.encoder.layers.{}.self_attn.out_proj.bias    vision/block_{}/attention/output/bias    D -> D
vision_tower.vision_model.encoder.layers.{}.layer_norm2.weight     vision/block_{}/pre_mlp_norm/gamma           D -> D
vision_tower.vision_model.encoder.layers.{}.layer_norm2.bias       vision/block_{}/pre_mlp_norm/beta            D -> D
vision_tower.vision_model.encoder.layers.{}.mlp.fc1.weight         vision/block_{}/mlp/up/kernel                F D -> D F
vision_tower.vision_model.encoder.layers.{}.mlp.fc1.bias           vision/block_{}/mlp/up/bias                  F -> F
vision_tower.vision_model.encoder.layers.{}.mlp.fc2.weight         vision/block_{}/mlp/down/kernel              D F -> F D
vision_tower.vision_model.encoder.layers.{}.mlp.fc2.bias           vision/block_{}/mlp/down/bias                D -> D
vision_tower.vision_model.post_layernorm.weight                    vision/final_norm/gamma                      D -> D
vision_tower.vision_model.post_layernorm.bias                      vision/final_norm/beta                       D -> D
multi_modal_projector.linear.weight                                projector/kernel                             E D -> D E
multi_modal_projector.linear.bias                                  projector/bias                               E -> E
language_model.model.embed_tokens.weight                           text/embedding/embeddings                    V D -> V D
language_model.model.layers.{}.self_attn.q_proj.weight             text/block_{}/attention/query/kernel         (N H) D -> D (N H)
language_model.model.layers.{}.self_attn.k_proj.weight             text/block_{}/attention/key/kernel           (K H) D -> D (K H)
language_model.model.layers.{}.self_attn.v_proj.weight             text/block_{}/attention/value/kernel         (K H) D -> D (K H)
language_model.model.layers.{}.self_attn.o_proj.weight             text/block_{}/attention/output/kernel        D (N H) -> (N H) D
language_model.model.layers.{}.mlp.gate_proj.weight                text/block_{}/mlp/gate/kernel                F D -> D F
language_model.model.layers.{}.mlp.up_proj.weight                  text/block_{}/mlp/up/kernel                  F D -> D F
language_model.model.layers.{}.mlp.down_proj.weight                text/block_{}/mlp/down/kernel                D F -> F D
language_model.model.layers.{}.input_layernorm.weight              text/block_{}/pre_attention_norm/scale       D -> D
language_model.model.norm.weight                                   text/final_norm/scale                        D -> D
"""

# `post_attention_layernorm` is another norm in Gemma 1 than in Gemma 2.
_HUGGING_FACE_GEMMA1 = """
language_model.model.layers.{}.post_attention_layernorm.weight     text/block_{}/pre_mlp_norm/scale             D -> D
"""
_HUGGING_FACE_GEMMA2 = """
language_model.model.layers.{}.post_attention_layernorm.weight     text/block_{}/post_attention_norm/scale      D -> D
language_model.model.layers.{}.pre_feedforward_layernorm.weight    text/block_{}/pre_mlp_norm/scale             D -> D
language_model.model.layers.{}.post_feedforward_layernorm.weight   text/block_{}/post_mlp_norm/scale            D -> D
"""

HUGGING_FACE_RENAMES = (  # regular expression, replacement; applied in this order
    (r"^model\.(?=language_model|vision_tower|multi_modal_projector)", ""),
    (r"^language_model\.(?!model\.|lm_head)", "language_model.model."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
HUGGING_FACE_EMBEDDING = "language_model.model.embed_tokens.weight"
HUGGING_FACE_HEADS = ("lm_head.weight", "language_model.lm_head.weight")  # tied to it
# SigLIP's pooling head, and tables that older versions stored.
HUGGING_FACE_UNUSED = re.compile(
    r"vision_tower\.(vision_model\.)?head\.|\.position_ids$|\.inv_freq$"
)

_BIG_VISION = """
params/img/embedding/kernel                                                         vision/patch_embedding/kernel             p q c D -> (p q c) D
params/img/embedding/bias                                                           vision/patch_embedding/bias               D -> D
params/img/pos_embedding                                                            vision/position_embedding                 1 P D -> P D
params/img/Transformer/encoderblock/LayerNorm_0/scale[{}]                           vision/block_{}/pre_attention_norm/gamma  D -> D
params/img/Transformer/encoderblock/LayerNorm_0/bias[{}]                            vision/block_{}/pre_attention_norm/beta   D -> D
params/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel[{}] vision/block_{}/attention/query/kernel    D N H -> D (N H)
params/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/bias[{}]   vision/block_{}/attention/query/bias      N H -> (N H)
params/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/key/kernel[{}]   vision/block_{}/attention/key/kernel      D N H -> D (N H)
params/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/key/bias[{}]     vision/block_{}/attention/key/bias        N H -> (N H)
params/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/value/kernel[{}] vision/block_{}/attention/value/kernel    D N H -> D (N H)
params/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/value/bias[{}]   vision/block_{}/attention/value/bias      N H -> (N H)
params/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out/kernel[{}]   vision/block_{}/attention/output/kernel   N H D -> (N H) D
params/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out/bias[{}]     vision/block_{}/attention/output/bias     D -> D
params/img/Transformer/encoderblock/LayerNorm_1/scale[{}]                           vision/block_{}/pre_mlp_norm/gamma        D -> D
params/img/Transformer/encoderblock/LayerNorm_1/bias[{}]                            vision/block_{}/pre_mlp_norm/beta         D -> D
params/img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel[{}]                   vision/block_{}/mlp/up/kernel             D F -> D F
params/img/Transformer/encoderblock/MlpBlock_0/Dense_0/bias[{}]                     vision/block_{}/mlp/up/bias               F -> F
params/img/Transformer/encoderblock/MlpBlock_0/Dense_1/kernel[{}]                   vision/block_{}/mlp/down/kernel           F D -> F D
params/img/Transformer/encoderblock/MlpBlock_0/Dense_1/bias[{}]                     vision/block_{}/mlp/down/bias             D -> D
params/img/Transformer/encoder_norm/scale                                           vision/final_norm/gamma                   D -> D
params/img/Transformer/encoder_norm/bias                                            vision/final_norm/beta                    D -> D
params/img/head/kernel                                                              projector/kernel                          D E -> D E
params/img/head/bias                                                                projector/bias                            E -> E
params/llm/embedder/input_embedding                                                 text/embedding/embeddings                 V D -> V D
params/llm/layers/attn/q_einsum/w[{}]                                               text/block_{}/attention/query/kernel      N D H -> D (N H)
params/llm/layers/attn/kv_einsum/w[{},0]                                            text/block_{}/attention/key/kernel        K D H -> D (K H)
params/llm/layers/attn/kv_einsum/w[{},1]                                            text/block_{}/attention/value/kernel      K D H -> D (K H)
params/llm/layers/attn/attn_vec_einsum/w[{}]                                        text/block_{}/attention/output/kernel     N H D -> (N H) D
params/llm/layers/mlp/gating_einsum[{},0]                                           text/block_{}/mlp/gate/kernel             D F -> D F
params/llm/layers/mlp/gating_einsum[{},1]                                           text/block_{}/mlp/up/kernel               D F -> D F
params/llm/layers/mlp/linear[{}]                                                    text/block_{}/mlp/down/kernel             F D -> F D
params/llm/layers/pre_attention_norm/scale[{}]                                      text/block_{}/pre_attention_norm/scale    D -> D
params/llm/layers/pre_ffw_norm/scale[{}]                                            text/block_{}/pre_mlp_norm/scale          D -> D
params/llm/final_norm/scale                                                         text/final_norm/scale                     D -> D
"""
_BIG_VISION_GEMMA2 = """
params/llm/layers/post_attention_norm/scale[{}]                                     text/block_{}/post_attention_norm/scale   D -> D
params/llm/layers/post_ffw_norm/scale[{}]                                           text/block_{}/post_mlp_norm/scale         D -> D
"""

_KERAS_HUB = """
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/vision_embeddings/patch_embedding/vars/0                         vision/patch_embedding/kernel             p q c D -> (p q c) D
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/vision_embeddings/patch_embedding/vars/1                         vision/patch_embedding/bias               D -> D
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/vision_embeddings/position_embedding/vars/0                      vision/position_embedding                 P D -> P D
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/resblocks/pali_gemma_vit_encoder_block{_}/layer_norm_1/vars/0    vision/block_{}/pre_attention_norm/gamma  D -> D
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/resblocks/pali_gemma_vit_encoder_block{_}/layer_norm_1/vars/1    vision/block_{}/pre_attention_norm/beta   D -> D
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/resblocks/pali_gemma_vit_encoder_block{_}/attn/query_proj/vars/0 vision/block_{}/attention/query/kernel    D (N H) -> D (N H)
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/resblocks/pali_gemma_vit_encoder_block{_}/attn/query_proj/vars/1 vision/block_{}/attention/query/bias      (N H) -> (N H)
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/resblocks/pali_gemma_vit_encoder_block{_}/attn/key_proj/vars/0   vision/block_{}/attention/key/kernel      D (N H) -> D (N H)
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/resblocks/pali_gemma_vit_encoder_block{_}/attn/key_proj/vars/1   vision/block_{}/attention/key/bias        (N H) -> (N H)
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/resblocks/pali_gemma_vit_encoder_block{_}/attn/value_proj/vars/0 vision/block_{}/attention/value/kernel    D (N H) -> D (N H)
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/resblocks/pali_gemma_vit_encoder_block{_}/attn/value_proj/vars/1 vision/block_{}/attention/value/bias      (N H) -> (N H)
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/resblocks/pali_gemma_vit_encoder_block{_}/attn/out_proj/vars/0   vision/block_{}/attention/output/kernel   (N H) D -> (N H) D
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/resblocks/pali_gemma_vit_encoder_block{_}/attn/out_proj/vars/1   vision/block_{}/attention/output/bias     D -> D
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/resblocks/pali_gemma_vit_encoder_block{_}/layer_norm_2/vars/0    vision/block_{}/pre_mlp_norm/gamma        D -> D
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/resblocks/pali_gemma_vit_encoder_block{_}/layer_norm_2/vars/1    vision/block_{}/pre_mlp_norm/beta         D -> D
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/resblocks/pali_gemma_vit_encoder_block{_}/mlp_dense_1/vars/0     vision/block_{}/mlp/up/kernel             D F -> D F
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/resblocks/pali_gemma_vit_encoder_block{_}/mlp_dense_1/vars/1     vision/block_{}/mlp/up/bias               F -> F
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/resblocks/pali_gemma_vit_encoder_block{_}/mlp_dense_2/vars/0     vision/block_{}/mlp/down/kernel           F D -> F D
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/resblocks/pali_gemma_vit_encoder_block{_}/mlp_dense_2/vars/1     vision/block_{}/mlp/down/bias             D -> D
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/encoder_layer_norm/vars/0                                        vision/final_norm/gamma                   D -> D
layers/pali_gemma_vit/layers/pali_gemma_vit_encoder/encoder_layer_norm/vars/1                                        vision/final_norm/beta                    D -> D
layers/pali_gemma_vit/layers/dense/vars/0                                                                            projector/kernel                          D E -> D E
layers/pali_gemma_vit/layers/dense/vars/1                                                                            projector/bias                            E -> E
layers/reversible_embedding/vars/0                                                                                   text/embedding/embeddings                 V D -> V D
layers/pali_gemma_decoder_block{_}/attention/query_dense/vars/0                                                      text/block_{}/attention/query/kernel      N D H -> D (N H)
layers/pali_gemma_decoder_block{_}/attention/key_dense/vars/0                                                        text/block_{}/attention/key/kernel        K D H -> D (K H)
layers/pali_gemma_decoder_block{_}/attention/value_dense/vars/0                                                      text/block_{}/attention/value/kernel      K D H -> D (K H)
layers/pali_gemma_decoder_block{_}/attention/output_dense/vars/0                                                     text/block_{}/attention/output/kernel     N H D -> (N H) D
layers/pali_gemma_decoder_block{_}/gating_ffw/vars/0                                                                 text/block_{}/mlp/gate/kernel             D F -> D F
layers/pali_gemma_decoder_block{_}/gating_ffw_2/vars/0                                                               text/block_{}/mlp/up/kernel               D F -> D F
layers/pali_gemma_decoder_block{_}/ffw_linear/vars/0                                                                 text/block_{}/mlp/down/kernel             F D -> F D
layers/pali_gemma_decoder_block{_}/pre_attention_norm/vars/0                                                         text/block_{}/pre_attention_norm/scale    D -> D
layers/pali_gemma_decoder_block{_}/pre_ffw_norm/vars/0                                                               text/block_{}/pre_mlp_norm/scale          D -> D
layers/rms_normalization/vars/0                                                                                      text/final_norm/scale                     D -> D
"""
_KERAS_HUB_GEMMA2 = """
layers/pali_gemma_decoder_block{_}/post_attention_norm/vars/0                                                        text/block_{}/post_attention_norm/scale   D -> D
layers/pali_gemma_decoder_block{_}/post_ffw_norm/vars/0                                                              text/block_{}/post_mlp_norm/scale         D -> D
"""

# The `<seg>` codec, big_vision's vae-oid.npz, which keeps the names and layouts of PyTorch: kernels
# (out, in, p, q), transposed ones (in, out, p, q).
SEGMENTATION_CODEC = """
encoder.0.weight        encoder/downsample_0/kernel
encoder.0.bias          encoder/downsample_0/bias
encoder.2.weight        encoder/downsample_1/kernel
encoder.2.bias          encoder/downsample_1/bias
encoder.4.weight        encoder/downsample_2/kernel
encoder.4.bias          encoder/downsample_2/bias
encoder.6.weight        encoder/downsample_3/kernel
encoder.6.bias          encoder/downsample_3/bias
encoder.8.net.0.weight  encoder/residual_0/conv_0/kernel
encoder.8.net.0.bias    encoder/residual_0/conv_0/bias
encoder.8.net.2.weight  encoder/residual_0/conv_1/kernel
encoder.8.net.2.bias    encoder/residual_0/conv_1/bias
encoder.8.net.4.weight  encoder/residual_0/conv_2/kernel
encoder.8.net.4.bias    encoder/residual_0/conv_2/bias
encoder.9.net.0.weight  encoder/residual_1/conv_0/kernel
encoder.9.net.0.bias    encoder/residual_1/conv_0/bias
encoder.9.net.2.weight  encoder/residual_1/conv_1/kernel
encoder.9.net.2.bias    encoder/residual_1/conv_1/bias
encoder.9.net.4.weight  encoder/residual_1/conv_2/kernel
encoder.9.net.4.bias    encoder/residual_1/conv_2/bias
encoder.10.weight       encoder/projection/kernel
encoder.10.bias         encoder/projection/bias
_vq_vae._embedding      codebook
decoder.0.weight        decoder/projection/kernel
decoder.0.bias          decoder/projection/bias
decoder.2.net.0.weight  decoder/residual_0/conv_0/kernel
decoder.2.net.0.bias    decoder/residual_0/conv_0/bias
decoder.2.net.2.weight  decoder/residual_0/conv_1/kernel
decoder.2.net.2.bias    decoder/residual_0/conv_1/bias
decoder.2.net.4.weight  decoder/residual_0/conv_2/kernel
decoder.2.net.4.bias    decoder/residual_0/conv_2/bias
decoder.3.net.0.weight  decoder/residual_1/conv_0/kernel
decoder.3.net.0.bias    decoder/residual_1/conv_0/bias
decoder.3.net.2.weight  decoder/residual_1/conv_1/kernel
decoder.3.net.2.bias    decoder/residual_1/conv_1/bias
decoder.3.net.4.weight  decoder/residual_1/conv_2/kernel
decoder.3.net.4.bias    decoder/residual_1/conv_2/bias
decoder.4.weight        decoder/upsample_0/kernel
decoder.4.bias          decoder/upsample_0/bias
decoder.6.weight        decoder/upsample_1/kernel
decoder.6.bias          decoder/upsample_1/bias
decoder.8.weight        decoder/upsample_2/kernel
decoder.8.bias          decoder/upsample_2/bias
decoder.10.weight       decoder/upsample_3/kernel
decoder.10.bias         decoder/upsample_3/bias
decoder.12.weight       decoder/output/kernel
decoder.12.bias         decoder/output/bias
"""
# Of its training: moving averages of the codebook.
SEGMENTATION_CODEC_IGNORED = ("_vq_vae._ema_cluster_size", "_vq_vae._ema_w")

_TABLES = {  # format: (common rows, rows of Gemma 1, rows of Gemma 2)
    "hf": (_HUGGING_FACE, _HUGGING_FACE_GEMMA1, _HUGGING_FACE_GEMMA2),
    "big-vision": (_BIG_VISION, "", _BIG_VISION_GEMMA2),
    "keras-hub": (_KERAS_HUB, "", _KERAS_HUB_GEMMA2),
}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Where one variable is in a checkpoint.

    Attributes:
        name: str, tensor of the source.
        index: tuple of int, the slice of that tensor, as (3, 1) for `name[3, 1]`; () for all.
        path: str, path of the variable without the model's name.
        layout: str, "source axes -> our axes".
        sizes: dict of axis letter to int.
    """

    name: str
    index: tuple
    path: str
    layout: str
    sizes: dict

    @property
    def axes(self):
        """Axes of the source and axes of ours, two lists of str, such as "D" or "(N H)"."""
        source, ours = self.layout.split(" -> ")
        return re.findall(r"\(.*?\)|\w", source), re.findall(r"\(.*?\)|\w", ours)

    def _shape(self, axes):
        sizes = {"1": 1, **self.sizes}
        return tuple(
            math.prod(sizes[letter] for letter in re.findall(r"\w", axis)) for axis in axes
        )

    @property
    def source_shape(self):
        """Shape of the slice in the source."""
        return self._shape(self.axes[0])

    @property
    def shape(self):
        """Shape of the variable."""
        return self._shape(self.axes[1])

    def to_ours(self, array):
        """The slice of the source, as an array of the variable's shape."""
        source, ours = self.axes
        return self._rearrange(array, source, ours)

    def to_source(self, array):
        """The inverse of `to_ours`."""
        source, ours = self.axes
        return self._rearrange(array, ours, source)

    def _rearrange(self, array, old, new):
        letters = [letter for axis in old for letter in re.findall(r"[a-zA-Z]", axis)]
        order = [letters.index(letter) for axis in new for letter in re.findall(r"[a-zA-Z]", axis)]
        array = array.reshape([self.sizes[letter] for letter in letters])
        return array.transpose(order).reshape(self._shape(new))


def canonical_name(name):
    """The published name of a Hugging Face tensor, from that of any transformers release."""
    for pattern, replacement in HUGGING_FACE_RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def stacked_shape(specs):
    """Shape of the whole source tensor that `specs` are all the slices of."""
    leading = tuple(max(axis) + 1 for axis in zip(*(spec.index for spec in specs)))
    return leading + specs[0].source_shape


def tensor_specs(format, config):
    """Where every variable of a model is in a checkpoint.

    Args:
        format: "hf", "big-vision", "keras-hub", or "preset", our own: paths are its names.
        config: PaliGemmaConfig.

    Returns:
        list of TensorSpec, one for each variable.
    """
    vision, text = config.vision, config.text
    sizes = {
        "vision": {
            "D": vision.width,
            "N": vision.num_heads,
            "H": vision.head_dim,
            "F": vision.mlp_dim,
            "P": vision.num_tokens,
            "p": vision.patch_size,
            "q": vision.patch_size,
            "c": 3,
        },
        "projector": {"D": vision.width, "E": text.width},
        "text": {
            "D": text.width,
            "N": text.num_heads,
            "K": text.num_kv_heads,
            "H": text.head_dim,
            "F": text.mlp_dim,
            "V": text.vocab_size,
        },
    }
    depths = {"vision": vision.depth, "text": text.depth}
    common, gemma1, gemma2 = _TABLES["hf" if format == "preset" else format]
    specs = []
    lines = (common + (gemma2 if text.use_post_norms else gemma1)).splitlines()
    for line in filter(None, lines):
        source, path, layout = line.split(maxsplit=2)
        if format == "preset":
            axes = layout.split(" -> ")[1]
            source, layout = path, f"{axes} -> {axes}"
        tower = path.split("/")[0]
        for block in range(depths[tower] if "{}" in path else 1):
            suffix = f"_{block}" if block else ""
            name = source.replace("{_}", suffix).replace("{}", str(block))
            name, _, index = name.rstrip("]").partition("[")
            specs.append(
                TensorSpec(
                    name=name,
                    index=tuple(int(i) for i in index.split(",") if i),
                    path=path.replace("{}", str(block)),
                    layout=layout,
                    sizes=sizes[tower],
                )
            )
    return specs
