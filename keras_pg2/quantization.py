"""Weight-only quantization: a matrix as small integers with scales; activations keep their dtype.

"int8" has a scale for each row, "int4" a scale and an offset for each group of columns of a row:

    int8:  value = code · scale                   code in -127 … 127
    int4:  value = (code - 8) · scale + offset    code in 0 … 15, two of them in a byte

Rows are outputs: a kernel (in, out) is quantized as its transpose. Axis letters here and in the
products of `_backend` with such matrices: R rows, C columns, G columns that share a scale.
"""

import contextlib
import functools
import math

import keras
import ml_dtypes  # noqa: F401  NumPy knows "bfloat16" once this is imported
import numpy as np
from keras import ops

from keras_pg2 import _backend

GROUP_SIZES = (32, 64, 128, 256)
ROW_MULTIPLE = 64  # rows that torch's product of int4 reads at a time
# Decoded elements in memory at a time, with a compiler and with torch on a GPU or a CPU.
_MAX_DECODED = 2**27 if _backend.IS_COMPILED else 2**25 if _backend.has_torch_gpu() else 2**21
# The same where XLA compiles for a CPU: for many rows of inputs, and for a few.
_MAX_DECODED_ON_CPU = (2**26, 2**19)
_MAX_DECODED_BACK = 2**25  # the same in gradients, with a compiler
_MAX_FUSED = 4095  # columns of int8 that XLA decodes for one row as it multiplies: below 16 KiB


def scheme_of(mode, config):
    """Mode and group size that the arguments of Keras' `quantize` ask for.

    Args:
        mode: str, or None for that of `config`.
        config: `keras.quantizers.QuantizationConfig` or None.

    Returns:
        str, and int or None for "int8".

    Raises:
        ValueError: if mode, quantizer or group size is another than we have, or the mode is
            another than that of `config`.
    """
    if not isinstance(config, keras.quantizers.QuantizationConfig | None):
        raise ValueError(
            "`config` must be a `keras.quantizers.QuantizationConfig` or None. Received: "
            f"config={config!r}"
        )
    if mode is None and config is not None:
        mode = config.mode
    if mode not in ("int8", "int4"):
        raise ValueError(f"`mode` must be 'int8' or 'int4'. Received: mode={mode!r}")
    if config is not None and config.mode != mode:
        raise ValueError(
            f"`mode` must be that of `config`, {config.mode!r}, or None. Received: mode={mode!r}"
        )
    if getattr(config, "weight_quantizer", None) is not None:
        raise ValueError(
            "`weight_quantizer` has no effect here: leave it out. Received: "
            f"weight_quantizer={config.weight_quantizer!r}"
        )
    if mode == "int8":
        return mode, None
    size = getattr(config, "block_size", 128)
    if size not in GROUP_SIZES:
        raise ValueError(
            f"`block_size` of `Int4QuantizationConfig` must be one of {GROUP_SIZES}. Received: "
            f"block_size={size}"
        )
    return mode, size


def scheme_of_preset(quantize):
    """Mode and group size of the argument `quantize` of `from_preset` and `layout_map`.

    Args:
        quantize: "int8", "int4" or `keras.quantizers.QuantizationConfig`.

    Returns:
        str, and int or None, see `scheme_of`.

    Raises:
        ValueError: if it is something else, or asks for what we have not.
    """
    if isinstance(quantize, keras.quantizers.QuantizationConfig):
        return scheme_of(None, quantize)
    if quantize not in ("int8", "int4"):
        raise ValueError(
            "`quantize` must be None, 'int8', 'int4' or a `keras.quantizers.QuantizationConfig`. "
            f"Received: quantize={quantize!r}"
        )
    return scheme_of(quantize, None)


class QuantizedMatrix(keras.layers.Layer):
    """A matrix (R, C) of quantized rows.

    Args:
        num_rows: int, R.
        num_columns: int, C.
        mode: "int8" or "int4".
        group_size: int, columns that share a scale, or None for "int8".

    Attributes:
        codes: int8 (R, C); or uint8 (groups / 2, R, G), R rounded up to whole tiles and
            the groups of columns to an even number. The lower half of a byte belongs to one of
            the first half of the groups, the upper half to one of the second: so compilers unpack
            them inside the product. With torch the bytes may lie in memory as its product
            wants them; in files they lie as said.
        scales: bfloat16 (R,); or (groups, R, 2), scales and offsets.

    Source: what torch's `_weight_int8pack_mm` and `_weight_int4pack_mm` read.
    """

    def __init__(self, num_rows, num_columns, mode, group_size=None, **kwargs):
        super().__init__(autocast=False, trainable=False, **kwargs)
        self.num_rows, self.num_columns = num_rows, num_columns
        self.mode, self.group_size = mode, group_size
        self._known_tile = None

    @property
    def _tile(self):
        """See `_backend.int4_tile`. Codes begin as zeros, which are the same in any layout.

        It is asked for once, since codes keep their layout if they are moved to another device.
        In a symbolic pass `codes.value` may be on none.
        """
        if self.mode != "int4" or self.codes._value is None:
            return None
        if self._known_tile is None:
            self._known_tile = (_backend.int4_tile(self.codes._value, self.compute_dtype),)
        return self._known_tile[0]

    def build(self, input_shape=None):
        codes, scales = (self.num_rows, self.num_columns), (self.num_rows,)
        if self.mode == "int4":
            rows = -(-self.num_rows // ROW_MULTIPLE) * ROW_MULTIPLE
            groups = 2 * -(-self.num_columns // (2 * self.group_size))
            codes, scales = (groups // 2, rows, self.group_size), (groups, rows, 2)
        dtype = "int8" if self.mode == "int8" else "uint8"
        options = {"initializer": "zeros", "trainable": False}
        self.codes = self.add_weight(name="codes", shape=codes, dtype=dtype, **options)
        self.scales = self.add_weight(name="scales", shape=scales, dtype="bfloat16", **options)

    def encode(self, matrix):
        """Codes and scales, as in files, of a float NumPy array (R, C) of any dtype."""
        codes = np.zeros(self.codes.shape, self.codes.dtype)
        scales = np.zeros(self.scales.shape, "bfloat16")
        encode = _encode_int8 if self.mode == "int8" else _encode_int4
        for start in range(0, self.num_rows, ROW_MULTIPLE):  # what fits in a CPU's cache
            part = slice(start, min(start + ROW_MULTIPLE, self.num_rows))
            values = np.asarray(matrix[part], "float32")
            part = (slice(None), part) if self.mode == "int4" else part
            codes[part], scales[part] = encode(values, self.group_size)
        return codes, scales

    def assign(self, codes, scales):
        """Sets codes and scales, NumPy arrays as in files, which must not be used again."""
        _backend.set_value(self.codes, self.laid_out(codes))
        _backend.set_value(self.scales, _backend.from_numpy(scales, "bfloat16"))

    def laid_out(self, codes):
        """A tensor of codes, a NumPy array as in files, laid out as `codes` are."""
        codes = _backend.from_numpy(codes, self.codes.dtype)
        if self.mode == "int4" and codes.shape == self.codes.shape:
            is_new = self.codes._value is None
            tile = _backend.int4_tile(codes, self.compute_dtype) if is_new else self._tile
            codes = _backend.tile_int4(codes, tile)
        return codes

    def codes_in_file(self):
        """Codes as in files, a NumPy array."""
        codes = self.codes.value
        if self._tile is None:
            return ops.convert_to_numpy(codes)
        return _packed(
            ops.convert_to_numpy(_backend.unpack_int4(codes, self._tile)), self.group_size
        )

    def multiply(self, x, in_float32=False):
        """`x` times the transposed matrix.

        Args:
            x: float (..., C).
            in_float32: bool, whether the result is float32, not in the dtype of `x`. Where
                torch's own product rounds, the largest are computed again, see
                `_backend.refined`.

        Returns:
            float (..., R).
        """
        if not _backend.needs_gradients(x):  # else tensorflow would keep the function, and codes
            return self._multiply(x, self.codes.value, self.scales.value, in_float32)

        @ops.custom_gradient  # keeps codes for the gradient, not the decoded matrix
        def product(x, codes, scales):
            def gradient(*args, upstream=None):  # Keras passes it by its name on torch alone
                upstream = ops.cast(args[0] if upstream is None else upstream, x.dtype)
                return self.multiply_back(upstream, codes, scales), None, None

            return self._multiply(x, codes, scales, in_float32), gradient

        return product(x, *map(ops.convert_to_tensor, (self.codes, self.scales)))

    def multiply_unrounded(self, x, codes, scales):
        """As `multiply` in float32, without torch's own products, which round.

        For functions that make their gradient themselves, by `multiply_back`.

        Args:
            x: float (..., C).
            codes: tensor, of `self.codes`.
            scales: tensor, of `self.scales`.

        Returns:
            float32 (..., R).
        """
        multiply = self._multiply if _backend.IS_COMPILED else self._multiply_decoded
        return multiply(x, codes, scales, in_float32=True)

    def multiply_back(self, y, codes, scales):
        """`y` times the matrix, which is the gradient of both products.

        Args:
            y: float (..., R).
            codes: tensor, of `self.codes`.
            scales: tensor, of `self.scales`.

        Returns:
            float (..., C), in the dtype of `y`.
        """
        if _backend.IS_COMPILED:
            on_tpu = functools.partial(self._multiply_back_in_loop, in_slices=False)
            function = self._multiply_back_in_loop
            return _backend.by_platform({"tpu": on_tpu}, function, y, codes, scales)
        total, start = 0.0, 0
        for matrix, scale in self._decoded_slices(codes, scales, y.dtype):
            part = y[..., start : start + matrix.shape[0]]
            part = part if scale is None else _times(part, scale, y.dtype)
            # A vocabulary has hundreds of parts, whose sum must not be rounded each time.
            total = total + ops.cast(ops.matmul(part, matrix), "float32")
            start += matrix.shape[0]
        return ops.cast(total, y.dtype)

    def take(self, rows):
        """float32 (..., C), rows of the matrix by their numbers, int (...)."""
        if self.mode == "int8":
            if tuple(rows.shape) == (1, 1):
                # For a single row a TPU's compiler copies all codes into another layout.
                return self.take(ops.concatenate([rows, rows]))[:1]
            codes, scales = (ops.take(x, rows, axis=0) for x in (self.codes, self.scales))
        else:
            codes = _backend.take_int4(self.codes.value, rows, self._tile)
            scales = _backend.take_in_groups(self.scales.value, ops.reshape(rows, -1))
            scales = ops.reshape(scales, (scales.shape[0], *ops.shape(rows), 2))
        return self._decode(codes, scales, "float32")

    def values(self, dtype):
        """float (R, C), the matrix."""
        parts = self._decoded_slices(self.codes.value, self.scales.value, dtype)
        return ops.concatenate(
            [x if scale is None else _times(x, scale[:, None], dtype) for x, scale in parts]
        )

    def save_own_variables(self, store):
        store["codes"] = self.codes_in_file()
        store["scales"] = self.scales

    def load_own_variables(self, store):
        # Keras tries again under other paths, where it finds nothing, and shows the last error.
        expected = {"codes": tuple(self.codes.shape), "scales": tuple(self.scales.shape)}
        if expected != {name: tuple(store[name].shape) for name in set(store.keys())}:
            block_size = f" with `block_size` {self.group_size}" if self.group_size else ""
            raise ValueError(
                f"The file does not fit the matrix {self.path!r}, which is quantized to "
                f"{self.mode!r}{block_size}. Quantize the model as the one that was saved."
            )
        self.assign(np.array(store["codes"]), np.array(store["scales"]).astype("bfloat16"))

    def _multiply(self, x, codes, scales, in_float32):
        """torch's own product, if it has one; else one by which the backend decodes fastest."""
        if self.mode == "int8":
            rounded = _backend.int8_product(x, codes, scales)
        else:
            rounded = _backend.int4_product(self._padded(x), codes, scales, self._tile)
        if rounded is not None:
            rounded = rounded[..., : self.num_rows]
            return _backend.refined(rounded, x, self.take) if in_float32 else rounded
        is_few = _backend.has_few_rows(x)
        is_plain = self.mode == "int8" or self._tile is None
        if is_few and is_plain and _backend.is_compiled_for_cuda(x):
            return self._multiply_by_sums(x, codes, scales, in_float32)
        if not _backend.IS_COMPILED:
            return self._multiply_decoded(x, codes, scales, in_float32)
        multiply = self._multiply_int4 if self.mode == "int4" else self._multiply_decoded
        multiply = functools.partial(multiply, in_float32=in_float32)
        if not all(isinstance(length, int) for length in x.shape):  # but None, or a symbol of jax
            return multiply(x, codes, scales)
        functions = {
            "cpu": functools.partial(self._multiply_on_cpu, in_float32=in_float32),
            "tpu": functools.partial(multiply, in_slices=False),
        }
        if self.mode == "int4":
            on_cuda = self._multiply_by_sums if is_few else self._multiply_decoded
            functions["cuda"] = functools.partial(on_cuda, in_float32=in_float32)
        if self.mode == "int4" and math.prod(x.shape[:-1]) == 1:
            functions["tpu"] = functools.partial(self._multiply_one_on_tpu, in_float32=in_float32)
        return _backend.by_platform(functions, multiply, x, codes, scales)

    def _multiply_decoded(self, x, codes, scales, in_float32, in_slices=True):
        product = _backend.matmul_transposed_float32 if in_float32 else _matmul_transposed
        outputs = []
        for matrix, scale in self._decoded_slices(codes, scales, x.dtype, x, in_slices):
            output = product(x, matrix)
            outputs.append(output if scale is None else _times(output, scale, output.dtype))
        return ops.concatenate(outputs, axis=-1) if len(outputs) > 1 else outputs[0]

    def _multiply_int4(self, x, codes, scales, in_float32, in_slices=True):
        """The product by halves of bytes; a compiler decodes as it multiplies."""
        inputs = ops.reshape(x, (-1, self.num_columns))
        if _backend.has_few_rows(x, _backend.MAX_QUANTIZED_ROWS["int4"]):
            outputs = self._multiply_few_by_int4(inputs, codes, scales)
        else:
            parts = [
                (codes[:, part], scales[:, part]) for part in self._row_slices(None, in_slices)
            ]
            outputs = [self._multiply_many_by_int4(inputs, *part) for part in parts]
            outputs = ops.concatenate(outputs, axis=-1) if len(outputs) > 1 else outputs[0]
        outputs = outputs if in_float32 else ops.cast(outputs, x.dtype)
        return ops.reshape(outputs[:, : self.num_rows], (*ops.shape(x)[:-1], self.num_rows))

    def _multiply_one_on_tpu(self, x, codes, scales, in_float32):
        """As `_multiply_int4`, of two rows: with one the units for matrices would stand idle."""
        row = ops.reshape(x, (1, self.num_columns))
        rows = ops.concatenate([row, ops.zeros_like(row)])
        outputs = self._multiply_int4(rows, codes, scales, in_float32)
        return ops.reshape(outputs[:1], (*x.shape[:-1], self.num_rows))

    def _multiply_by_sums(self, x, codes, scales, in_float32):
        """The product of a few rows as compilers for GPUs read the codes once.

        For a product in the units for matrices they would write the decoded weights before.
        """
        inputs = ops.reshape(self._padded(x), (-1, self._padded_columns))
        rows = ops.split(inputs, inputs.shape[0])
        outputs = ops.concatenate([_sums_of_products(row, codes, scales) for row in rows])
        outputs = outputs if in_float32 else ops.cast(outputs, x.dtype)
        return ops.reshape(outputs[:, : self.num_rows], (*x.shape[:-1], self.num_rows))

    def _multiply_on_cpu(self, x, codes, scales, in_float32):
        """The product as XLA for CPUs compiles it well: it decodes most matrices into memory."""
        inputs = ops.cast(ops.reshape(x, (-1, self.num_columns)), "float32")
        num_inputs = inputs.shape[0]
        is_few = num_inputs <= _backend.MAX_QUANTIZED_ROWS[self.mode]
        axis = 1 if self.mode == "int4" else 0
        num_rows = scales.shape[axis]
        max_length = max(1, _MAX_DECODED_ON_CPU[is_few] // self.num_columns)
        length = _backend.equal_part(num_rows, max_length)
        multiply = self._multiply_part
        if not is_few:
            scales = _after(inputs, scales)
        elif self.mode == "int4":
            multiply = self._multiply_few_on_cpu
        elif num_inputs == 1:
            multiply = self._multiply_one_by_int8
            inputs = ops.reshape(inputs, (-1, _backend.equal_part(inputs.shape[1], _MAX_FUSED)))

        def step(index, outputs):
            start = index * length
            rows = (_backend.read(array, start, length, axis) for array in (codes, scales))
            return _backend.write(outputs, multiply(inputs, *rows), start)

        if length == num_rows:
            outputs = multiply(inputs, codes, scales)
        else:
            # Made of the inputs, so that it is not made at the beginning of the program.
            outputs = ops.zeros((1, num_rows)) * inputs[:, :1]
            outputs = _backend.repeat(step, num_rows // length, outputs)
        if outputs.shape[0] > num_inputs:
            outputs = ops.sum(ops.reshape(outputs, (-1, num_inputs, num_rows)), axis=0)
        outputs = ops.cast(outputs[:, : self.num_rows], "float32" if in_float32 else x.dtype)
        return ops.reshape(outputs, (*x.shape[:-1], self.num_rows))

    def _multiply_part(self, inputs, codes, scales):
        """float32 (b, r) of inputs float32 (b, C) and rows of codes, decoded before."""
        if self.mode == "int8":
            return ops.matmul(inputs, ops.transpose(self._decode(codes, scales, "float32")))
        values = ops.concatenate(self._halves(codes, scales, "float32"))  # (groups, r, G)
        kernel = ops.reshape(ops.transpose(values, (0, 2, 1)), (-1, values.shape[1]))
        return ops.matmul(self._padded(inputs), kernel)

    def _multiply_one_by_int8(self, inputs, codes, scales):
        """What adds up to the products: float32 (parts, r) of one input (parts, C / parts)."""
        codes = ops.split(ops.cast(codes, "float32"), inputs.shape[0], axis=1)
        parts = zip(ops.split(inputs, inputs.shape[0]), codes)
        products = ops.concatenate([ops.matmul(x, ops.transpose(y)) for x, y in parts])
        return _times(products, scales, "float32")

    def _multiply_few_by_int4(self, inputs, codes, scales):
        """float32 (b, r) of inputs float (b, C), scaled after the product.

        Less is computed for each weight; in turn, the products of each group are in memory.
        """
        inputs, codes = self._input_halves(inputs, codes), _backend.halves_of_int4(codes)
        scales, offsets = (ops.split(x, 2) for x in ops.unstack(scales, axis=-1))
        total = 0.0
        for x, values, *scale_and_offset in zip(inputs, codes, scales, offsets):
            products = _backend.einsum_float32("bhg,hrg->hbr", x, ops.cast(values, x.dtype))
            sums = ops.transpose(ops.sum(ops.cast(x, "float32"), axis=-1))[:, :, None]
            scale, offset = (ops.cast(y, "float32")[:, None] for y in scale_and_offset)
            total = total + ops.sum(products * scale + sums * (offset - 8 * scale), axis=0)
        return total

    def _multiply_few_on_cpu(self, inputs, codes, scales):
        """The same, with scales cast as a whole, which is faster on a CPU and slower on a TPU."""
        return self._multiply_few_by_int4(inputs, codes, ops.cast(scales, "float32"))

    def _multiply_many_by_int4(self, inputs, codes, scales):
        """The same, of weights that are decoded before."""
        halves = zip(self._input_halves(inputs, codes), self._halves(codes, scales, inputs.dtype))
        return sum(_backend.einsum_float32("bhg,hrg->br", *half) for half in halves)

    def _input_halves(self, inputs, codes):
        """Inputs (b, C) as two tensors (b, groups / 2, G), for the halves of bytes."""
        groups = (-1, 2 * codes.shape[0], codes.shape[2])
        return ops.split(ops.reshape(self._padded(inputs), groups), 2, axis=1)

    def _halves(self, codes, scales, dtype):
        """What bytes (groups / 2, r, G) stand for: first and second half of the groups."""
        scales, offsets = ops.split(ops.cast(scales, dtype), 2, axis=-1)
        halves = zip(_backend.halves_of_int4(codes), ops.split(scales, 2), ops.split(offsets, 2))
        return [(ops.cast(half, dtype) - 8) * scale + offset for half, scale, offset in halves]

    def _multiply_back_in_loop(self, y, codes, scales, in_slices=True):
        """By parts in turn, since a compiler would decode all at once; or as a whole, for a TPU."""
        axis = 1 if self.mode == "int4" else 0
        num_rows = scales.shape[axis]
        inputs = ops.reshape(y, (-1, self.num_rows))
        if num_rows > self.num_rows:
            inputs = ops.pad(inputs, ((0, 0), (0, num_rows - self.num_rows)))

        def part(start, length):
            rows = (_backend.read(array, start, length, axis) for array in (codes, scales))
            return self._multiply_part_back(_backend.read(inputs, start, length), *rows)

        max_length = max(1, _MAX_DECODED_BACK // (self.num_columns * ROW_MULTIPLE)) * ROW_MULTIPLE
        count = -(-num_rows // max_length) if in_slices else 1
        first = num_rows - (count - 1) * max_length
        total = part(0, first)
        if count > 1:

            def step(index, total):
                return total + part(first + index * max_length, max_length)

            total = _backend.repeat(step, count - 1, total)
        return ops.reshape(ops.cast(total, y.dtype), (*ops.shape(y)[:-1], self.num_columns))

    def _multiply_part_back(self, inputs, codes, scales):
        """float32 (b, C) of inputs float (b, r) and rows of codes."""
        dtype = inputs.dtype
        if self.mode == "int4":
            halves = self._halves(codes, scales, dtype)
            halves = [_backend.einsum_float32("br,hrg->bhg", inputs, half) for half in halves]
            outputs = ops.reshape(ops.concatenate(halves, axis=1), (-1, self._padded_columns))
            return outputs[:, : self.num_columns]
        if keras.backend.standardize_dtype(dtype) == "float16":  # see `_decoded_slices`
            matrix = self._decode(codes, scales, dtype)
        else:
            inputs, matrix = _times(inputs, scales, dtype), ops.cast(codes, dtype)
        return ops.cast(ops.matmul(inputs, matrix), "float32")

    def _decoded_slices(self, codes, scales, dtype, x=None, in_slices=True):
        """Slices of the matrix, float (r, C), and what their products must be scaled by.

        Integers are exact in bfloat16 and casts are fused with products, so int8 is scaled after
        them; not in float16, which the products would leave.
        """
        for part in self._row_slices(x, in_slices):
            count = min(part.stop, self.num_rows) - part.start
            if self.mode == "int4":
                packed, part_scales = codes[:, part], scales[:, part]
                if self._tile is not None:  # the bytes of rows lie together
                    packed = codes.view(codes.shape[1], -1)[part].view_as(packed)
                if isinstance(self._tile, int):
                    values = _backend.decode_int4(packed, part_scales, self._tile, dtype)
                else:
                    values = _backend.unpack_int4(packed, self._tile)
                    values = self._decode(values, part_scales, dtype)
                yield values[:count, : self.num_columns], None
            elif keras.backend.standardize_dtype(dtype) == "float16":
                yield self._decode(codes[part], scales[part], dtype), None
            else:
                yield ops.cast(codes[part], dtype), scales[part]

    def _row_slices(self, x, in_slices):
        """Slices of the rows of `codes`, each of what may be decoded at a time.

        Not for a TPU: its compiler decodes inside the product, and of rows that are spread over
        chips it would gather parts.
        """
        num_rows = self.scales.shape[1 if self.mode == "int4" else 0]
        if not in_slices:
            return [slice(0, num_rows)]
        may_fuse = self.mode == "int8" and _backend.IS_COMPILED and x is not None
        if may_fuse and _backend.has_few_rows(x, _backend.MAX_QUANTIZED_ROWS["int8"]):
            return [slice(0, num_rows)]  # decoded inside the product; slices would be copied
        step = max(1, _MAX_DECODED // (self.num_columns * ROW_MULTIPLE)) * ROW_MULTIPLE
        starts = range(0, num_rows, step)
        return [slice(start, min(start + step, num_rows)) for start in starts]

    def _decode(self, codes, scales, dtype):
        """float (..., C) of codes (..., C), before they are packed, and their scales."""
        if self.mode == "int8":
            return _times(codes, scales[..., None], dtype)
        shape = ops.shape(codes)[:-1]
        codes = ops.reshape(ops.cast(codes, dtype), (*shape, -1, self.group_size))
        scales = ops.cast(ops.moveaxis(scales, 0, -2), dtype)  # (..., groups, 2)
        values = (codes - 8) * scales[..., :1] + scales[..., 1:]
        return ops.reshape(values, (*shape, -1))[..., : self.num_columns]

    @property
    def _padded_columns(self):
        """C, rounded up to an even number of groups with "int4"."""
        shape = self.codes.shape
        return self.num_columns if self.mode == "int8" else 2 * shape[0] * shape[2]

    def _padded(self, x):
        added = self._padded_columns - self.num_columns
        if not added:
            return x
        # Not `ops.pad`: it makes a Keras operation with a new name, compiled anew each time.
        return ops.concatenate([x, ops.zeros((*ops.shape(x)[:-1], added), x.dtype)], axis=-1)


@contextlib.contextmanager
def unlocked(layer):
    """Keras forbids new variables in a layer that is built."""
    layer._tracker.unlock()
    try:
        yield
    finally:
        layer._tracker.lock()


class Quantizable:
    """Mixin of layers whose one large matrix `quantize` replaces by a `QuantizedMatrix`.

    Attributes:
        quantized: QuantizedMatrix, or None before.
    """

    matrix_name = None  # of the variable; the attribute has an underscore before it
    _is_transposed = False  # whether the rows of the variable are inputs

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.quantized = None

    @property
    def quantization_mode(self):
        """str or None: "int8", "int4" or neither."""
        return self.quantized and self.quantized.mode

    def quantize(self, mode=None, type_check=True, config=None):
        """Replaces the matrix by integers, see `PaliGemma2.quantize`."""
        self.check_quantizable()
        mode, group_size = scheme_of(mode, config)
        matrix = getattr(self, f"_{self.matrix_name}")
        values = None if matrix._value is None else _backend.to_numpy(matrix)
        try:
            self.make_quantized(mode, group_size)
            if values is not None:
                self.quantized.assign(*self.encode(values))
        except BaseException:  # an interrupt, too, must not lose the matrix
            with unlocked(self):
                if self.quantized is not None:
                    _backend.remove_attribute(self, "quantized")
                self.quantized = None
                setattr(self, f"_{self.matrix_name}", matrix)
            raise

    def check_quantizable(self):
        """Raises a ValueError if the layer cannot be quantized now."""
        if not self.built:
            raise ValueError(f"Build the layer {self.name!r} before `quantize`.")
        if self.quantized is not None:
            raise ValueError(
                f"The layer {self.path!r} is quantized to {self.quantization_mode} already."
            )

    def make_quantized(self, mode, group_size):
        """Replaces the matrix by a quantized one, which is zero or, like it, without values."""
        matrix = getattr(self, f"_{self.matrix_name}")
        shape = matrix.shape[::-1] if self._is_transposed else matrix.shape
        policy = self.dtype_policy
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            policy = policy[self.path]  # the matrix has another path
        with unlocked(self), self._open_name_scope():  # else the new variables lose their path
            _backend.remove_attribute(self, f"_{self.matrix_name}")
            self.quantized = QuantizedMatrix(
                *shape, mode, group_size, name="quantized", dtype=policy
            )
            self.quantized.build()

    @property
    def matrix_shape(self):
        """Shape that the matrix had."""
        shape = (self.quantized.num_rows, self.quantized.num_columns)
        return shape[::-1] if self._is_transposed else shape

    def encode(self, values):
        """What `quantized.assign` takes, of a float NumPy array shaped as the matrix was."""
        return self.quantized.encode(values.T if self._is_transposed else values)

    def quantized_call(self, *args, **kwargs):
        return self.call(*args, **kwargs)

    def _check_quantize_args(self, mode, compute_dtype):
        pass  # `check_quantizable` does; Keras forbids int8 in float16, as it has int8 activations


def _after(x, scales):
    """The scales, unknown to XLA before it has computed `x`, so that it decodes no matrix yet."""
    # A product, which is computed by itself; all else would be computed for each weight again.
    first = x[:1]
    square = ops.einsum("bi,bi->", first, first)
    bound = ops.cast(ops.where(square > 0, 1e38, 2e38), "float32")  # never reached
    return ops.minimum(ops.cast(scales, "float32"), bound)


def _sums_of_products(x, codes, scales):
    """float32 (1, R) of x float (1, C)."""
    x = ops.cast(x, "float32")
    if codes.ndim == 2:
        return ops.sum(x * ops.cast(codes, "float32"), axis=-1)[None] * scales
    num_groups, num_rows, group_size = codes.shape
    x = ops.reshape(x, (2, num_groups, 1, group_size))
    scales = ops.reshape(ops.cast(scales, "float32"), (2, num_groups, num_rows, 1, 2))
    products = 0.0
    for i, half in enumerate(_backend.halves_of_int4(codes)):
        values = (ops.cast(half, "float32") - 8) * scales[i, ..., 0] + scales[i, ..., 1]
        products = products + x[i] * values
    return ops.sum(products, axis=(0, 2))[None]


def _times(x, scale, dtype):
    return ops.cast(ops.cast(x, "float32") * ops.cast(scale, "float32"), dtype)


def _matmul_transposed(x, matrix):
    return _backend.matmul(x, ops.transpose(matrix))


def _encode_int8(values, _):
    """Codes int8 (r, C) and scales (r,) of float32 (r, C)."""
    # Scales are rounded first, so that the codes make up for it.
    scales = (np.abs(values).max(axis=1) / 127).astype("bfloat16")
    return np.clip(np.rint(values / _divisors(scales)[:, None]), -127, 127).astype("int8"), scales


def _encode_int4(values, group_size):
    """Bytes (groups / 2, r, G) and scales (groups, r, 2) of float32 (r, C)."""
    groups = 2 * -(-values.shape[1] // (2 * group_size))
    values = np.pad(values, ((0, 0), (0, groups * group_size - values.shape[1])))
    values = values.reshape(len(values), groups, group_size)
    lowest, highest = values.min(axis=2), values.max(axis=2)
    scales = ((highest - lowest) / 15).astype("bfloat16")
    offsets = (lowest + 8 * scales.astype("float32")).astype("bfloat16")
    codes = np.rint((values - offsets.astype("float32")[..., None]) / _divisors(scales)[..., None])
    codes = np.clip(codes + 8, 0, 15).astype("uint8").reshape(len(values), -1)
    return _packed(codes, group_size), np.stack([scales, offsets], axis=-1).swapaxes(0, 1)


def _divisors(scales):
    """Scales as float32, 1 where they are 0. NumPy 2.0 crashes in `where` of bfloat16."""
    scales = scales.astype("float32")
    return np.where(scales == 0, 1, scales)


def _packed(codes, group_size):
    """Bytes (groups / 2, r, G) of codes 0 … 15 (r, C)."""
    codes = codes.reshape(len(codes), 2, -1, group_size)
    return (codes[:, 0] | codes[:, 1] << 4).swapaxes(0, 1)
