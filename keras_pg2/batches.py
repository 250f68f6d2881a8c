"""Raw data in any form to the batches that `fit`, `evaluate` and `predict` read.

Data is a sequence of examples, a dict or data frame of columns, or an iterable of either examples
or batches (`keras.utils.PyDataset`, `tf.data.Dataset`, torch `DataLoader`, grain, a generator). An
example is a dict with "image" or "images", "prefix" or "prompt", and "suffix" or "response"; a
batch is a dict with lists of them, or of arrays that are tokenized already, or a list of examples.

In a dict of columns, or a batch passed by itself, a str prompt goes with all images. An item of an
iterable with a list of images and a str prompt is a batch if the prompt is in "prompts"; in
"prefix" or "prompt" it makes one example with several images.
"""

import collections.abc
import itertools
import logging
import math
import sys

import keras
import numpy as np
from keras import ops
from keras.src.trainers.data_adapters import data_adapter, data_adapter_utils
from keras.src.utils import rng_utils

from keras_pg2 import _backend
from keras_pg2.config import check_positive
from keras_pg2.preprocessing import batch_examples, check_tokenized

_LOG = logging.getLogger(__name__)
_IMAGES = ("images", "image")
_PROMPTS = ("prompts", "prompt", "prefix")
_RESPONSES = ("responses", "response", "suffix")
_TOKENIZED = ("token_ids", "padding_mask", "suffix_mask", "loss_mask")
_FORMS = (
    "a dict or list of dicts with 'image', 'prefix' and 'suffix' (or 'images', 'prompts' and "
    "'responses'), or an iterable of such examples or batches"
)


def is_readable(data):
    """Whether `Batches` reads the data, so that it need not be left to Keras."""
    if isinstance(data, (Batches, dict)) or is_frame(data):
        return True
    if isinstance(data, tuple):  # of examples or batches, not Keras' (x, y)
        return all(isinstance(item, collections.abc.Mapping) for item in data)
    is_iterable = isinstance(data, collections.abc.Iterable) or hasattr(data, "__getitem__")
    return is_iterable and not isinstance(data, str) and not hasattr(data, "__array__")


class Batches(data_adapter.DataAdapter):
    """Batches of one size for Keras' training loop, made in threads while the device computes.

    The last batch is filled up with copies of an example that count in no loss, so that no
    program is compiled for it. The order depends on the seed of `keras.utils.set_random_seed` and
    on the epoch alone: a run that was interrupted goes on as it would have. With `steps_per_epoch`
    below the number of batches it does not: Keras goes on in the same order in the next epoch.

    Args:
        data: see the top of this file.
        preprocessor: Preprocessor, or None if the data is tokenized.
        vocab_size: int, V.
        batch_size: int, for sequences and iterables of examples; iterables of batches have their
            own.
        shuffle: bool, whether sequences and columns are shuffled anew in each epoch.

    Attributes:
        epoch: int, number of the epoch that is read next.

    Raises:
        ValueError: if there is no data, or it has none of the known forms.
    """

    def __init__(self, data, preprocessor, vocab_size, batch_size=8, shuffle=False):
        check_positive(batch_size=batch_size)
        self.preprocessor = preprocessor
        self.epoch = 0
        self._vocab_size = vocab_size
        self._shuffle = shuffle
        self._seed = rng_utils.get_random_seed() or 0  # here, since Keras has one for each thread
        self._num_cut = self._num_lost = self._num_seen = 0
        self._has_warned = False
        is_columns = isinstance(data, dict) or is_frame(data)
        self._data = _Columns(data) if is_columns else data
        length = _length(self._data)
        is_indexed = length is not None and hasattr(self._data, "__getitem__")
        iterator = map(self._data.__getitem__, range(length)) if is_indexed else iter(self._data)
        first = next(iterator, self)
        if first is self:
            raise ValueError(f"The data is empty. Expected {_FORMS}.")
        self._first = _unwrap(first)
        # For the first pass: some iterables go on where they stopped. A DataLoader of torch with
        # persistent workers has one iterator, which begins anew for whoever asks next.
        self._rest = itertools.chain([self._first], iterator)
        if getattr(data, "persistent_workers", False):
            self._rest = None
        self._is_generator = iterator is self._data
        self._is_used_up = False
        if self._is_generator:
            self._data = self._rest
        self._in_batches = _is_batch(self._first)
        self._is_sequence = is_indexed and not self._in_batches
        self._batch_size = _batch_length(self._first) if self._in_batches else int(batch_size)
        self._num_batches = length
        if length is not None and not self._in_batches:
            self._num_batches = -(-length // self._batch_size)

    def split(self, fraction, batch_size):
        """Two parts: all but the last `fraction` of the examples, and those.

        Args:
            fraction: float in (0, 1).
            batch_size: int, of the second part.

        Returns:
            Batches, Batches.

        Raises:
            ValueError: if the data is no sequence, or a part would be empty.
        """
        total = len(self._data) if self._is_sequence else 0
        count = int(total * (1 - fraction))
        if not 0 < count < total:
            raise ValueError(
                "`validation_split` needs a sequence of examples long enough to split. Received: "
                f"{type(self._data).__name__}, validation_split={fraction}. Pass "
                "`validation_data` instead."
            )
        first, second = (_Part(self._data, rows) for rows in (range(count), range(count, total)))
        options = (self.preprocessor, self._vocab_size)
        first = Batches(first, *options, self._batch_size, self._shuffle)
        return first, Batches(second, *options, batch_size)

    def raw_batches(self):
        """An iterator over lists of examples, or over dicts that are a batch already."""
        if self._is_sequence:
            order = np.arange(len(self._data))
            if self._shuffle:
                np.random.default_rng((self._seed, self.epoch)).shuffle(order)
            items = (_unwrap(self._data[int(index)]) for index in order)
        elif isinstance(self._data, keras.utils.PyDataset):
            is_endless = self._num_batches is None
            indices = itertools.count() if is_endless else range(self._num_batches)
            workers = max(1, self._data.workers)  # threads, even with `use_multiprocessing`
            places = ((index,) for index in indices)
            items = map(_unwrap, _backend.prefetch(self._data.__getitem__, places, workers))
        else:
            items, self._rest = map(_unwrap, self._rest or self._data), None
        if self._in_batches:
            yield from items
        else:
            while batch := list(itertools.islice(items, self._batch_size)):
                yield batch
        self._is_used_up = self._is_generator

    def arrays(self):
        """An iterator over tuples `(x,)`, x as `PaliGemma2.call` wants it."""
        raw = ((batch,) for batch in self.raw_batches())
        yield from _backend.prefetch(self._prepare, raw, threads=2)

    def _prepare(self, batch):
        if isinstance(batch, list) and "token_ids" in batch[0]:
            _check_rows(batch)
            batch = {name: np.stack([row[name] for row in batch]) for name in batch[0]}
        x = self._tokenized(batch) if "token_ids" in batch else self._preprocess(batch)
        return (self._fill(x),)

    def _tokenized(self, batch):
        x = {name: np.asarray(keras.ops.convert_to_numpy(batch[name])) for name in batch}
        unknown = set(x) - {"images", *_TOKENIZED}
        if unknown or "images" not in x:
            raise ValueError(
                f"Tokenized data has 'images' and {list(_TOKENIZED)}. Received: {sorted(x)}"
            )
        if "suffix_mask" not in x:  # all would be prefix, of which each token sees all others
            raise ValueError(
                "Tokenized data needs 'suffix_mask', True on the answer, whose tokens do not see "
                "those after them. 'loss_mask' may say in addition which tokens to learn. "
                f"Received: {sorted(x)}"
            )
        x.setdefault("loss_mask", x["suffix_mask"])
        check_tokenized(x["token_ids"], x["images"], self._vocab_size)
        return x | {"token_ids": x["token_ids"].astype("int32")}

    def _preprocess(self, batch):
        columns = columns_of(batch)
        if columns[2] is None:
            raise ValueError(
                "Training needs answers: 'responses' or 'suffix'. Received: "
                f"{sorted(batch if isinstance(batch, dict) else batch[0])}"
            )
        if self.preprocessor is None:
            raise ValueError(
                "The model has no preprocessor, so it learns from token ids alone. Set "
                "`model.preprocessor = keras_pg2.Preprocessor(tokenizer, image_size)`."
            )
        x, _, _ = self.preprocessor.for_training(*columns)
        x["loss_mask"] = x["suffix_mask"]
        self._count_cut(columns, x)
        return x

    def _count_cut(self, columns, x):
        """Notes answers that were cut, having no <eos>; nothing is dropped silently."""
        full = np.flatnonzero(x["padding_mask"].all(axis=1))
        length = self.preprocessor.sequence_length
        cut = [
            row
            for row in full
            if len(self.preprocessor.tokenize(columns[1][row], columns[2][row])[0]) >= length
        ]
        self._num_seen += len(columns[1])
        self._num_cut += len(cut)
        self._num_lost += sum(not x["loss_mask"][row].any() for row in cut)
        if cut and not self._has_warned:
            self._has_warned = True
            row = cut[0]
            _LOG.warning(
                "A prompt with its answer is longer than sequence_length=%d and is cut at the "
                "end: prompt %.60r, answer %.60r. The number of such examples is reported after "
                "the epoch. `model.preprocessor.sequence_length` sets the length.",
                length,
                columns[1][row],
                columns[2][row],
            )

    def _fill(self, x):
        """Repeats the last example up to the batch size, without a share in the loss."""
        missing = self._batch_size - len(x["token_ids"])
        if missing <= 0:
            return x
        x = {name: np.concatenate([a, np.repeat(a[-1:], missing, 0)]) for name, a in x.items()}
        x["loss_mask"][-missing:] = False
        return x

    def check_distribution(self):
        """See the function of this name."""
        check_distribution(self._batch_size)

    def check_processes(self):
        """Raises a ValueError if processes have different numbers of batches."""
        if keras.distribution.distribution() is None:
            return
        counts = _backend.of_all_processes(np.array(self._num_batches or -1))
        if (counts != counts[0]).any():  # one would wait for the others for ever
            raise ValueError(
                "All processes must have the same number of batches. Received: "
                f"{counts.tolist()}, by process. Leave examples out, or tell the number of steps."
            )

    # What Keras asks for

    def get_numpy_iterator(self):
        return self.arrays()

    def get_jax_iterator(self, super_batch=None):
        self.check_distribution()
        if super_batch:  # Keras 3.16 asks for this many steps in one array
            return data_adapter_utils.super_batch_iterator(self.arrays(), super_batch)
        return self.arrays()

    def get_torch_dataloader(self):
        return data_adapter_utils.get_torch_dataloader(self.arrays())

    def get_tf_dataset(self):
        first = self._prepare(self._first_batch())
        shapes = shapes_of(*first)

        def arrays():
            for batch in self.arrays():
                if shapes_of(*batch) != shapes:
                    raise ValueError(
                        "With TensorFlow all batches must have the same fields and shapes. "
                        f"Received: {dict(shapes)} and {dict(shapes_of(*batch))}"
                    )
                if len(batch[0]["token_ids"]) > self._batch_size:
                    raise ValueError(
                        "With TensorFlow no batch may have more examples than the first. Received: "
                        f"{self._batch_size} and {len(batch[0]['token_ids'])}"
                    )
                yield batch

        return _backend.tf_dataset(arrays, first)

    def _first_batch(self):
        return self._first if self._in_batches else [self._first]

    @property
    def shapes(self):
        """Names and shapes of the arrays of a batch, without its length."""
        return shapes_of(*self._prepare(self._first_batch()))

    @property
    def num_batches(self):
        return self._num_batches

    @property
    def batch_size(self):
        return self._batch_size

    @property
    def has_partial_batch(self):
        return False

    @property
    def partial_batch_size(self):
        return None

    def on_epoch_begin(self):
        if self._is_used_up:
            raise ValueError(
                "The generator is used up; it can be read once. For several epochs, or for "
                "validation after each, pass a sequence, an iterable that can begin again, or an "
                "endless generator with `steps_per_epoch` or `validation_steps`."
            )
        self._num_cut = self._num_lost = self._num_seen = 0
        _call(self._data, "on_epoch_begin")

    def on_epoch_end(self):
        if self._num_cut:
            _LOG.warning(
                "%d of %d examples were longer than sequence_length=%d and were cut.",
                self._num_cut,
                self._num_seen,
                self.preprocessor.sequence_length,
            )
            if self._num_lost:
                _LOG.warning("Of %d examples no answer was left.", self._num_lost)
            if self._num_lost == self._num_seen:
                raise ValueError(
                    "All prompts are longer than the preprocessor's sequence_length="
                    f"{self.preprocessor.sequence_length}, so there is nothing to learn. Set "
                    "`model.preprocessor.sequence_length` to more."
                )
        self._num_cut = 0
        _call(self._data, "on_epoch_end")


def shapes_of(arrays):
    """Names and shapes of a dict of arrays, without the length of the batch."""
    return tuple((name, array.shape[1:]) for name, array in sorted(arrays.items()))


def _check_rows(rows):
    """Raises a ValueError if tokenized examples have not the fields and shapes of the first."""
    shapes = [{name: tuple(np.shape(array)) for name, array in row.items()} for row in rows]
    for row, row_shapes in zip(rows, shapes):
        if row_shapes != shapes[0]:
            raise ValueError(
                "All tokenized examples of a batch must have the same fields and shapes: pad them "
                f"to one length, with a 'padding_mask'. The first has {shapes[0]}. Received: one "
                f"with {row_shapes}, token_ids={row.get('token_ids')!r:.80}"
            )


def single_batch(batch):
    """Data that is one batch to `Batches`, and the `batch_size` for it.

    Args:
        batch: list of examples, or dict of lists or of tokenized arrays.

    Returns:
        data, batch_size.

    Raises:
        ValueError: if it is empty, or as `columns_of`.
    """
    if not isinstance(batch, dict):
        if not len(batch):
            raise ValueError(f"The batch is empty. Expected {_FORMS}.")
        return batch, len(batch)
    if "token_ids" not in batch:  # a single prompt would not say that it is one
        batch = _named(("images", "prompts", "responses"), columns_of(batch))
    return [batch], 1


def check_distribution(batch_size):
    """Raises a ValueError if a batch cannot be split among the devices.

    Each process has batches of its own, and those of all together are one.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return
    parts = distribution.num_model_replicas
    parts //= math.gcd(parts, distribution.num_processes)
    if batch_size % parts:
        raise ValueError(
            f"The number of examples in a batch, of validation too, must be a multiple of {parts}, "
            f"since `keras.distribution` splits it among devices. Received: {batch_size} examples"
        )


def filled_up(x, batch_size):
    """Arrays whose last row is repeated up to whole batches, where devices share a batch.

    Args:
        x: dict of arrays (B, …).
        batch_size: int.

    Returns:
        x: dict of NumPy arrays (whole batches, …), or what it was without `keras.distribution`.
        count: int, B, or None if it is what it was.

    Raises:
        ValueError: see `check_distribution`.
    """
    if keras.distribution.distribution() is None:
        return x, None
    check_distribution(batch_size)
    count = len(next(iter(x.values())))
    missing = -count % batch_size
    arrays = {name: ops.convert_to_numpy(array) for name, array in x.items()}
    return {
        name: np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
        for name, array in arrays.items()
    }, count


def columns_of(batch):
    """Images, prompts and responses of a batch.

    Args:
        batch: list of examples, or dict of lists; see the top of this file.

    Returns:
        images: list of lists of images.
        prompts: list of str.
        responses: list of str, or None without answers.

    Raises:
        ValueError: if a field is missing or has no effect, or torch has mixed up the images of
            examples.
    """
    received = batch[0] if isinstance(batch, list) else batch
    if given := {"sample_weight", "class_weight", "loss_mask"} & set(received):
        raise ValueError(
            f"Raw data has no {sorted(given)}. Leave examples out of it, or choose tokens by "
            "'loss_mask' in tokenized data."
        )
    if isinstance(batch, list):
        fields = [name for name in received if name in (*_IMAGES, *_PROMPTS, *_RESPONSES)]
        for example in batch:
            if missing := sorted(set(fields) - set(example)):
                raise ValueError(
                    f"All examples must have the same fields. One lacks {missing}: {example!r:.200}"
                )
            if _is_batch(example):
                raise ValueError(
                    "Data must hold either examples or batches. Received a batch after an "
                    f"example: {example!r:.200}"
                )
        batch = {name: [example[name] for example in batch] for name in fields}
    found = _found(batch)
    if "token_ids" in received:
        raise ValueError("Pass tokenized data to `predict` as one dict of arrays, not in parts.")
    if found[0] is None or found[1] is None:
        raise ValueError(f"Data must be {_FORMS}. Received a dict with {sorted(received)}")
    is_collated = received is batch and isinstance(found[0], list)
    if is_collated and any(isinstance(row, tuple) for row in found[0]):
        raise ValueError(
            "A batch must hold the images of an example as a list. Received tuples, as the "
            "`DataLoader` of torch makes them of the first images of all examples, of their "
            "second ones, and so on. Pass it `collate_fn=list`."
        )
    images, prompts, responses, _ = batch_examples(*found)
    return images, prompts, None if found[2] is None else responses


def _found(item):
    """Images, prompts and responses under any of their names, or None."""
    return [
        next((item[name] for name in names if name in item), None)
        for names in (_IMAGES, _PROMPTS, _RESPONSES)
    ]


def _named(names, columns):
    return {name: column for name, column in zip(names, columns) if column is not None}


class _Columns(collections.abc.Sequence):
    """Columns as a sequence of examples."""

    def __init__(self, columns):
        if is_frame(columns):
            columns = {name: list(columns[name]) for name in columns.columns}
        columns = dict(columns)
        if "token_ids" not in columns:  # by names of examples, since images are in lists then
            columns = _named(("image", "prompt", "response"), columns_of(columns))
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"All columns must be of one length. Received: {lengths}")
        self._columns = columns

    def __len__(self):
        return len(next(iter(self._columns.values())))

    def __getitem__(self, index):
        return {name: column[index] for name, column in self._columns.items()}


class _Part(collections.abc.Sequence):
    """Some examples of a sequence."""

    def __init__(self, examples, indices):
        self._examples, self._indices = examples, indices

    def __len__(self):
        return len(self._indices)

    def __getitem__(self, index):
        return self._examples[self._indices[index]]


def is_frame(data):
    """Whether data is a data frame, of pandas or polars."""
    return hasattr(data, "columns") and hasattr(data, "to_dict") and hasattr(data, "__getitem__")


def _unwrap(item):
    """An example or a batch, also out of the tuple that Keras' data sets give."""
    if isinstance(item, tuple) and len(item) == 1:
        item = item[0]
    is_list = isinstance(item, list) and len(item) > 0
    for example in item if is_list else [item]:
        if not isinstance(example, collections.abc.Mapping):
            raise ValueError(f"Data must be {_FORMS}. Received an item of {type(item).__name__}")
    return item


def _is_batch(item):
    """Whether an item of data is a batch, not an example; see the top of this file."""
    if isinstance(item, list):
        return True
    if "token_ids" in item:
        return np.ndim(item["token_ids"]) == 2
    images, prompts, responses = _found(item)
    if any(not isinstance(x, (str, bytes)) and np.ndim(x) > 0 for x in (prompts, responses)):
        return True
    is_list = isinstance(images, (list, tuple)) or len(getattr(images, "shape", ())) in (1, 4, 5)
    if not is_list or not isinstance(item.get("prompts"), str):
        return False
    if responses is not None:
        raise ValueError(
            "A list of images with a single prompt and a single response may be one example or "
            "several. For one with several images pass 'image', 'prefix' and 'suffix'; for a batch "
            f"lists of prompts and responses. Received: {item!r:.200}"
        )
    return True


def _batch_length(batch):
    if isinstance(batch, list):
        return len(batch)
    return len(batch["token_ids"] if "token_ids" in batch else columns_of(batch)[1])


def _length(data):
    """Number of items, or None."""
    if isinstance(data, keras.utils.PyDataset):
        return data.num_batches
    try:
        length = len(data)
    except TypeError:  # so `tf.data` and torch say that they do not know
        return None
    return None if length == sys.maxsize else length  # so grain says that it has no end


def _call(data, name):
    """Calls a hook of the data, if it has it."""
    getattr(data, name, lambda: None)()
