import contextlib
import gc
import io
import os
import socket
import subprocess
import sys
import threading
import weakref

import keras
import numpy as np
import pytest
from keras import ops
from PIL import Image

from keras_pg2 import PaliGemma2, PaliGemmaConfig, Preprocessor, _backend, batches
from keras_pg2.config import GemmaConfig, SiglipConfig
from keras_pg2.linear import step_seeds
from tests.test_losses import gradients

VOCAB_SIZE = 1664


def micro_model(tokenizer, dtype="float32", **changes):
    """Two blocks of 16 units: 60,000 parameters, nearly all in the embedding."""
    keras.utils.set_random_seed(0)
    vision = SiglipConfig(width=16, depth=1, mlp_dim=24, num_heads=2, image_size=28)
    text = GemmaConfig(
        **{"width": 16, "depth": 2, "mlp_dim": 24, "num_heads": 2, "num_kv_heads": 1},
        **{"head_dim": 8, "query_pre_attn_scalar": 8, "use_post_norms": True},
        **{"attn_logit_softcap": 50.0, "final_logit_softcap": 30.0, "vocab_size": VOCAB_SIZE},
        **changes,
    )
    preprocessor = Preprocessor(tokenizer, 28, sequence_length=16)
    return PaliGemma2(PaliGemmaConfig(vision, text), preprocessor, dtype=dtype)


@pytest.fixture
def columns():
    """Ten images with answers of one to three words."""
    rng = np.random.default_rng(0)
    return {
        "images": list(rng.integers(0, 256, (10, 20, 24, 3), "uint8")),
        "prompts": ["ocr"] * 10,
        "responses": [" ".join(["cat"] * (1 + i % 3)) for i in range(10)],
    }


def examples_of(columns):
    names = {"images": "image", "prompts": "prefix", "responses": "suffix"}
    rows = zip(*columns.values())
    return [dict(zip(names.values(), row)) for row in rows]


def read(data, tokenizer, **options):
    preprocessor = Preprocessor(tokenizer, 28, sequence_length=16)
    return [x for (x,) in batches.Batches(data, preprocessor, VOCAB_SIZE, **options).arrays()]


def in_batches(columns, size=4):
    for start in range(0, 10, size):
        yield {name: column[start : start + size] for name, column in columns.items()}


def at_two_lengths(model):
    """Sets one length of the text after the other."""
    for length in (24, 32):
        model.preprocessor.sequence_length = length
        yield


class Loader(keras.utils.PyDataset):
    def __init__(self, columns):
        super().__init__()
        self.batches = list(in_batches(columns))

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def tf_data(columns):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(columns).batch(4)


def data_loader(columns, collate_fn=None):
    data = pytest.importorskip("torch.utils.data")
    return data.DataLoader(examples_of(columns), batch_size=4, collate_fn=collate_fn)


def grain_loader(columns):
    grain = pytest.importorskip("grain")
    return grain.MapDataset.source(examples_of(columns)).to_iter_dataset()


def grain_data_loader(columns):
    grain = pytest.importorskip("grain")
    rows = examples_of(columns)
    sampler = grain.samplers.SequentialSampler(len(rows), grain.sharding.NoSharding())
    return grain.DataLoader(data_source=rows, sampler=sampler)


def stored(columns):
    """The columns with images as data sets of Hugging Face store them, in Parquet files too."""
    images = []
    for image in columns["images"]:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": "cat.png"})
    return {**columns, "images": images}


def data_frame(package, columns):
    return pytest.importorskip(package).DataFrame(columns)


FORMS = {
    "columns": lambda columns: columns,
    "array": lambda columns: {**columns, "images": np.stack(columns["images"])},
    "examples": examples_of,
    "tuple of examples": lambda columns: tuple(examples_of(columns)),
    "generator of examples": lambda columns: (row for row in examples_of(columns)),
    "generator of batches": in_batches,
    "list of batches": lambda columns: list(in_batches(columns)),
    "PyDataset": Loader,
    "images of Hugging Face": lambda columns: examples_of(stored(columns)),
    "pandas": lambda columns: data_frame("pandas", columns),
    "polars": lambda columns: data_frame("polars", stored(columns)),
    "tf.data": tf_data,
    "tf.data of examples": lambda columns: tf_data(columns).unbatch(),
    "array of objects": lambda columns: {
        k: np.array([*v, None], object)[:-1] for k, v in columns.items()
    },
    "DataLoader": data_loader,
    "DataLoader of lists of examples": lambda columns: data_loader(columns, list),
    "grain": grain_loader,
    "grain DataLoader": grain_data_loader,
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_data(tokenizer, columns, form):
    expected = read(columns, tokenizer, batch_size=4)
    actual = read(FORMS[form](columns), tokenizer, batch_size=4)
    assert len(actual) == len(expected) == 3
    for x, wanted in zip(actual, expected):
        assert set(x) == set(wanted)
        for name in x:
            np.testing.assert_array_equal(x[name], wanted[name], err_msg=name)


def test_tokenized_data(tokenizer, columns):
    expected = read(columns, tokenizer, batch_size=4)
    arrays = {name: np.concatenate([x[name] for x in expected])[:10] for name in expected[0]}
    del arrays["loss_mask"]  # the suffix, then
    for form in (arrays, list(expected), iter(expected)):
        for x, wanted in zip(read(form, tokenizer, batch_size=4), expected, strict=True):
            for name in wanted:
                np.testing.assert_array_equal(x[name], wanted[name], err_msg=name)


def test_tokenized_examples_are_alike(tokenizer, columns):
    x = read(columns, tokenizer, batch_size=4)[0]
    rows = [{name: array[i] for name, array in x.items()} for i in range(4)]
    (stacked,) = read(rows, tokenizer, batch_size=4)
    np.testing.assert_array_equal(stacked["token_ids"], x["token_ids"])
    masks = ("token_ids", "padding_mask", "suffix_mask", "loss_mask")
    short = {name: a[:-1] if name in masks else a for name, a in rows[2].items()}
    bare = {name: a for name, a in rows[2].items() if name != "padding_mask"}
    for changed, first in [(short, rows[0]), (bare, rows[0]), (rows[2], bare)]:
        with pytest.raises(ValueError, match=r"same fields and shapes.*one with.*token_ids="):
            read([first, changed], tokenizer)


def test_what_a_batch_holds(tokenizer, columns):
    x = read(columns, tokenizer, batch_size=4)[0]
    assert x["images"].shape == (4, 1, 28, 28, 3)
    assert x["token_ids"].shape == (4, 16)
    cat = tokenizer.encode("cat")
    prefix = [2, *tokenizer.encode("ocr"), *tokenizer.encode("\n")]
    row = [*prefix, *cat, 1]
    np.testing.assert_array_equal(x["token_ids"][0, : len(row)], row)
    np.testing.assert_array_equal(
        np.flatnonzero(x["loss_mask"][0]), range(len(prefix), len(prefix) + len(cat) + 1)
    )


def test_the_last_batch_is_filled_up(tokenizer, columns):
    last = read(columns, tokenizer, batch_size=4)[-1]
    assert len(last["token_ids"]) == 4
    assert last["loss_mask"].any(axis=1).tolist() == [True, True, False, False]


def test_order_depends_on_seed_and_epoch_alone(tokenizer, columns):
    columns["prompts"] = [str(i) for i in range(10)]

    def order(epoch, seed):
        keras.utils.set_random_seed(seed)
        data = batches.Batches(columns, None, VOCAB_SIZE, batch_size=3, shuffle=True)
        data.epoch = epoch
        return [int(row["prompt"]) for b in data.raw_batches() for row in b]

    assert order(3, 1) == order(3, 1)
    assert len({tuple(order(epoch, seed)) for epoch in (0, 1) for seed in (0, 1)}) == 4
    assert sorted(order(0, 0)) == list(range(10))


def test_fit_reads_in_the_order_of_seed_and_epoch(tokenizer, columns):
    class Rows(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    rows = examples_of(columns)
    model = micro_model(tokenizer)
    model.compile("sgd")
    orders = {}
    for seed in (1, 2):
        keras.utils.set_random_seed(seed)
        read = []
        model.fit(Rows(rows), batch_size=5, epochs=2, verbose=0)
        orders[seed] = read[-20:-10], read[-10:]  # before them the first row is looked at
    rng = [np.random.default_rng((seed, epoch)) for seed in (1, 2) for epoch in (0, 1)]
    for order, generator in zip([*orders[1], *orders[2]], rng):
        expected = np.arange(10)
        generator.shuffle(expected)
        assert order == expected.tolist()
    read = []
    model.fit(Rows(rows), batch_size=5, shuffle=False, verbose=0)
    assert read[-10:] == list(range(10))


def test_the_last_share_is_for_validation(tokenizer, columns):
    preprocessor = Preprocessor(tokenizer, 28, sequence_length=16)
    columns["prompts"] = [str(i) for i in range(10)]
    data = batches.Batches(columns, preprocessor, VOCAB_SIZE, batch_size=3, shuffle=True)
    orders = []
    for part in data.split(0.3, 2):
        orders.append([[int(row["prompt"]) for row in batch] for batch in part.raw_batches()])
    trained = [row for batch in orders[0] for row in batch]
    assert sorted(trained) == list(range(7)) != trained
    assert [len(batch) for batch in orders[0]] == [3, 3, 1]
    assert orders[1] == [[7, 8], [9]]


def test_an_iterable_that_goes_on_loses_nothing(tokenizer, columns):
    class Stream:
        def __init__(self):
            self.rows = iter(examples_of(columns))

        def __iter__(self):
            return self.rows

    expected = read(columns, tokenizer, batch_size=5)
    for x, wanted in zip(read(Stream(), tokenizer, batch_size=5), expected, strict=True):
        np.testing.assert_array_equal(x["images"], wanted["images"])


def test_items_that_are_no_examples(tokenizer, columns):
    rows = [(row,) for row in examples_of(columns)]  # as Keras' own data sets have them
    assert len(read(rows, tokenizer, batch_size=5)) == 2
    rows[7] = None  # as grain says that an example was filtered out
    with pytest.raises(ValueError, match="Received an item of NoneType"):
        read(rows, tokenizer, batch_size=5)


def test_endless_data_of_grain(tokenizer, columns):
    grain = pytest.importorskip("grain")
    data = grain.MapDataset.source(examples_of(columns)).repeat()
    model = micro_model(tokenizer)
    model.compile("sgd")
    history = model.fit(data, batch_size=5, steps_per_epoch=3, epochs=2, verbose=0).history
    assert len(history["loss"]) == 2


def test_images_that_torch_has_mixed_up(tokenizer, columns):
    """Its default for lists of images: the first of all examples, then the second of all."""
    images = columns["images"]
    columns = {**columns, "images": [tuple(images[:2]), tuple(images[2:4])]}
    with pytest.raises(ValueError, match=r"as a list\. Received tuples, .*collate_fn=list"):
        read([{name: column[:2] for name, column in columns.items()}], tokenizer)
    rows = [row | {"images": pair} for row, pair in zip(examples_of(columns), columns["images"])]
    (batch,) = read([rows], tokenizer)  # as `collate_fn=list` makes it
    assert batch["images"].shape[:2] == (2, 2)


def test_an_image_shared_by_batches(tokenizer, tmp_path):
    """Pillow reads it when it is first asked for: threads must not do so at once."""
    pixels = np.random.default_rng(0).integers(0, 256, (900, 900, 3), "uint8")
    Image.fromarray(pixels).save(tmp_path / "image.png")
    data = {"prompts": ["ocr"] * 8, "responses": ["a"] * 8}
    (expected,) = read({"images": pixels, **data}, tokenizer, batch_size=8)
    for _ in range(3):
        with Image.open(tmp_path / "image.png") as image:
            shared = read({"images": image, **data}, tokenizer, batch_size=2)
        np.testing.assert_array_equal(
            np.concatenate([x["images"] for x in shared]), expected["images"]
        )


def test_the_next_batch_is_made_meanwhile(columns):
    """While the first batch is in use, a thread has begun the next."""
    started = [threading.Event() for _ in range(3)]

    class SlowPreprocessor:
        sequence_length = 99

        def for_training(self, images, prompts, responses):
            started[len(images[0]) and int(prompts[0])].set()
            x = {"images": np.zeros((len(prompts), 1)), "padding_mask": np.zeros((1, 1), bool)}
            x["token_ids"] = np.zeros((len(prompts), 2), int)
            return {**x, "suffix_mask": np.ones((len(prompts), 2), bool)}, None, None

    columns["prompts"] = [str(i // 4) for i in range(10)]
    iterator = batches.Batches(columns, SlowPreprocessor(), 10, batch_size=4).arrays()
    next(iterator)
    assert started[1].wait(10)


def test_fit_evaluate_predict(tokenizer, columns):
    model = micro_model(tokenizer)
    model.compile(keras.optimizers.Adam(0.03))
    history = model.fit(columns, batch_size=4, epochs=4, validation_split=0.2, verbose=0).history
    assert set(history) == {"loss", "token_accuracy", "val_loss", "val_token_accuracy"}
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    assert history["val_token_accuracy"][-1] > 0
    # Copies that fill up the last batch count nowhere: 10 = 4 + 4 + 2 = 5 + 5.
    results = [
        model.evaluate(columns, batch_size=size, return_dict=True, verbose=0) for size in (4, 5)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert model.predict(columns, batch_size=4, max_new_tokens=3, verbose=0) == model.generate(
        columns["images"], "ocr", max_new_tokens=3
    )


@pytest.mark.parametrize("option", ["auto", False])
def test_each_backend_decides_what_it_compiles(tokenizer, option, tmp_path):
    """With `True` of jax torch would trace for minutes, with `False` of torch jax be slow."""
    model = micro_model(tokenizer)
    model.compile("sgd", **({} if option == "auto" else {"jit_compile": option}))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_compile_config()["jit_compile"] == option
    assert loaded.jit_compile == model.jit_compile


@pytest.mark.slow_if_compiled
def test_fit_goes_on_after_averages(tokenizer, columns):
    """A Keras model fails at its second `fit` with jax."""
    model = micro_model(tokenizer)
    model.compile(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5))
    for _ in range(2):
        model.fit(columns, batch_size=10, verbose=0)
        weights = model.trainable_variables
        for weight, average in zip(weights, model.optimizer._model_variables_moving_average):
            np.testing.assert_array_equal(*map(ops.convert_to_numpy, (weight, average)))
    before = ops.convert_to_numpy(weights[0]).copy()
    model.train_on_batch(columns)
    assert (ops.convert_to_numpy(weights[0]) != before).any()


@pytest.mark.parametrize("is_scaled", [False, True])
def test_an_optimizer_of_torch_goes_on_elsewhere(tokenizer, is_scaled):
    """Keras writes the class of its optimizer for torch, which no other backend can use."""
    model = micro_model(tokenizer)
    optimizer = keras.optimizers.AdamW(0.02, beta_1=0.8)
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer) if is_scaled else optimizer)
    config = model.get_compile_config()
    written = config["optimizer"]
    written = written["config"]["inner_optimizer"] if is_scaled else written
    written["module"] = "keras.src.backend.torch.optimizers.torch_adamw"
    model.compile_from_config(config)
    optimizer = model.optimizer.inner_optimizer if is_scaled else model.optimizer
    assert type(optimizer) is type(keras.optimizers.AdamW())
    assert optimizer.beta_1 == 0.8


@pytest.mark.slow_if_compiled
def test_weights_within_fit(tokenizer, columns, tmp_path):
    """Read and set by the model itself, which with jax does not hold them."""
    model = micro_model(tokenizer)
    model.compile(keras.optimizers.SGD(0.1))
    first, losses = model.get_weights(), []
    model.save_weights(tmp_path / "first.weights.h5")
    (x,) = read(columns, tokenizer, batch_size=10)

    def go_back(batch, logs):
        assert any((a != b).any() for a, b in zip(model.get_weights(), first))
        losses.append(model.evaluate(columns, verbose=0)[0])
        logits = model.predict(x, verbose=0)
        if len(losses) == 1:
            model.set_weights(first)
        else:
            model.load_weights(tmp_path / "first.weights.h5")
        assert np.abs(model.predict(x, verbose=0) - logits).max() > 1e-4

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=go_back)
    for _ in range(2):
        model.fit(columns, batch_size=10, verbose=0, callbacks=[callback], shuffle=False)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for found, expected in zip(model.get_weights(), first, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_saving_within_fit(tokenizer, columns, tmp_path):
    """By the model itself, not by `callback.model`, which Keras looks after."""
    model = micro_model(tokenizer)
    model.enable_lora(rank=2)
    model.compile(keras.optimizers.SGD(0.01))

    def save(batch, logs):
        model.save(tmp_path / "model.keras")
        model.save_to_preset(tmp_path / "preset", overwrite=True)
        model.save_adapter(tmp_path / "adapter", overwrite=True)

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=save)
    model.fit(columns, batch_size=5, callbacks=[callback], verbose=0)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for variable, expected in zip(loaded.variables, model.variables, strict=True):
        np.testing.assert_array_equal(*map(ops.convert_to_numpy, (variable, expected)))
    merged = PaliGemma2.from_preset(tmp_path / "preset", dtype="float32")
    model.merge_lora()
    np.testing.assert_array_equal(
        ops.convert_to_numpy(merged.text.blocks[1].attention.query.kernel),
        ops.convert_to_numpy(model.text.blocks[1].attention.query.kernel),
    )


@pytest.mark.parametrize("position", [0, pytest.param(9, marks=pytest.mark.slow_if_compiled)])
def test_an_error_loses_no_weights(tokenizer, columns, position):
    """A Keras model that does nothing about it loses them with jax."""
    model = micro_model(tokenizer)
    model.compile(keras.optimizers.SGD(0.0))
    before = [keras.ops.convert_to_numpy(v).copy() for v in model.variables]
    rows = examples_of(columns)
    rows[position]["image"] = "missing.png"
    for method in (model.evaluate, model.fit):
        with pytest.raises(Exception, match=r"missing\.png"):  # of another type with TensorFlow
            method(rows, batch_size=2, verbose=0)
        for variable, value in zip(model.variables, before, strict=True):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
    model.fit(columns, verbose=0)


@pytest.mark.slow_if_compiled
def test_single_batches(tokenizer, columns):
    model = micro_model(tokenizer)
    with pytest.raises(ValueError, match="compile"):
        model.evaluate(columns)
    model.compile(keras.optimizers.SGD(0.0))
    loss = model.evaluate(columns, batch_size=10, verbose=0)
    rows = examples_of(columns)
    x, *_ = model.preprocessor.for_training(
        [[image] for image in columns["images"]], columns["prompts"], columns["responses"]
    )
    for batch in (columns, data_frame("pandas", columns), rows, x):
        model.reset_metrics()
        np.testing.assert_allclose(model.test_on_batch(batch), loss, rtol=1e-5)
        model.reset_metrics()
        np.testing.assert_allclose(model.train_on_batch(batch), loss, rtol=1e-5)
        answers = model.predict_on_batch(batch)
        if batch is x:
            assert answers.shape == (*x["token_ids"].shape, VOCAB_SIZE)
        else:
            assert answers == model.predict(rows, verbose=0)
    with pytest.raises(ValueError, match=r"\['sample_weight'\] have no effect"):
        model.train_on_batch(x, sample_weight=np.zeros(10))
    with pytest.raises(ValueError, match=r"\['class_weight'\] have no effect"):
        model.test_on_batch(x, class_weight={0: 1})
    with pytest.raises(ValueError, match=r"\['sample_weight'\] have no effect"):
        model.test_on_batch(x, None, np.zeros(10))


def test_a_prompt_for_all_images_of_a_batch(tokenizer, columns, monkeypatch):
    model = micro_model(tokenizer)
    model.compile(keras.optimizers.SGD(0.0))
    images = columns["images"]
    batch = {"images": images[:2], "prompts": "ocr"}

    def generate(images, prompts, **options):
        return [f"{prompt}: {len(row)}" for row, prompt in zip(images, prompts, strict=True)]

    monkeypatch.setattr(model, "generate", generate)
    assert model.predict(batch, verbose=0) == ["ocr: 1"] * 2
    assert model.predict_on_batch(batch) == ["ocr: 1"] * 2
    array = {**batch, "images": np.stack(images[:2])}
    for data in ([batch, batch], [array, array], iter([batch, batch])):
        assert model.predict(data, verbose=0) == ["ocr: 1"] * 4
    pair = {"images": images[:2], "prompt": "ocr"}  # as the prompt of an example is named
    assert model.predict([pair], verbose=0) == ["ocr: 2"]

    batch["responses"] = ["cat", "cat cat"]
    pair["response"] = "cat"
    (x,) = read([batch], tokenizer)
    assert x["images"].shape == (2, 1, 28, 28, 3)
    (x,) = read([pair] * 3, tokenizer, batch_size=3)
    assert x["images"].shape == (3, 2, 28, 28, 3)
    loss = model.evaluate(batch, verbose=0)
    for method in (model.test_on_batch, model.train_on_batch):
        model.reset_metrics()
        np.testing.assert_allclose(method(batch), loss, rtol=1e-5)
    batch["responses"] = "cat"  # for all, or of one example with two images
    assert read(batch, tokenizer, batch_size=2)[0]["images"].shape == (2, 1, 28, 28, 3)
    with pytest.raises(ValueError, match=r"one example or several.*'prefix' and 'suffix'; for a b"):
        read([batch], tokenizer)
    with pytest.raises(ValueError, match="Received a batch after an example"):
        read([{**batch, "images": images[0]}, {**batch, "prompts": ["ocr"]}], tokenizer)


def test_steps_compute_losses_once(tokenizer, columns, monkeypatch):
    """The metrics read single losses, the gradient of which would take the work again."""
    model = micro_model(tokenizer)
    model.compile("sgd")
    made = _backend.with_gradients
    again = []

    def counted(function):
        def with_upstream(*tensors, upstream=None):
            again.append(upstream)
            return function(*tensors, upstream=upstream)

        return made(with_upstream)

    monkeypatch.setattr(_backend, "with_gradients", counted)
    model.fit(columns, batch_size=5, verbose=0)
    assert again
    assert set(again) == {None}


@pytest.mark.skipif(_backend.BACKEND != "jax", reason="others keep no values elsewhere")
@pytest.mark.parametrize("method", ["evaluate", "test_on_batch", "predict_on_batch"])
def test_averages_outlive_other_steps(tokenizer, columns, method, tmp_path):
    model = micro_model(tokenizer)
    model.compile(keras.optimizers.SGD(0.1, use_ema=True))
    model.fit(columns, batch_size=5, verbose=0)
    averages = [ops.convert_to_numpy(v) for v in model.optimizer._model_variables_moving_average]
    data = columns
    if method == "predict_on_batch":
        images, prompts, responses, _ = batches.batch_examples(*columns.values())
        data, *_ = model.preprocessor.for_training(images, prompts, responses)
    getattr(model, method)(data)
    for variable, expected in zip(model.optimizer._model_variables_moving_average, averages):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), expected)
    model.fit(columns, batch_size=5, verbose=0)
    model.save(tmp_path / "model.keras")


@pytest.mark.skipif(_backend.BACKEND != "jax", reason="others keep no values elsewhere")
def test_weights_set_after_an_error_stay(tokenizer, columns):
    model = micro_model(tokenizer)
    model.compile(keras.optimizers.SGD(0.1))

    def failing(num_batches):
        for _ in range(num_batches):
            yield {name: column[:2] for name, column in columns.items()}
        raise KeyError("the file is gone")

    bad = {"images": np.zeros((2, 28, 28, 3), "float32"), "token_ids": np.zeros((2, 3, 4))}
    for spoil in (
        lambda: model.evaluate(failing(2), verbose=0),
        lambda: model.train_on_batch(columns),
        lambda: model.predict_on_batch(bad),
    ):
        for then in (
            lambda: model.evaluate(failing(1), verbose=0),
            lambda: model.predict_on_batch(bad),
        ):
            with contextlib.suppress(KeyError, ValueError):
                spoil()
            expected = [np.ones_like(array) for array in model.get_weights()]
            model.set_weights(expected)
            with pytest.raises((KeyError, ValueError)):
                then()
            for found, wanted in zip(model.get_weights(), expected):
                np.testing.assert_array_equal(found, wanted)


def test_the_vision_tower_in_another_model(tokenizer, columns, tmp_path):
    part = micro_model(tokenizer)
    images = part.preprocessor.load_images([[x] for x in columns["images"][:4]])[:, 0]
    inputs = keras.Input((28, 28, 3))
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling1D()(part.vision(inputs)))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    model.fit(images, np.ones((4, 2)), verbose=0)
    model.save(tmp_path / "model.keras")
    read = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(read.predict(images), model.predict(images), rtol=1e-5, atol=1e-6)
    part.enable_lora(2, pattern="vision-all-linear")
    with pytest.raises(ValueError, match="neither of LoRA nor of quantization"):
        model.save(tmp_path / "lora.keras")


def test_dropout_of_parts_goes_on(tokenizer, columns):
    """Called alone, too, they drop other values in each step."""
    model = micro_model(tokenizer)
    patterns = ["vision-all-linear", "all-linear", "projector"]
    model.enable_lora(2, dropout=0.5, pattern=patterns)
    for layer in model.lora_layers().values():
        layer.lora_kernel_b.assign(ops.ones(layer.lora_kernel_b.shape))
    images = model.preprocessor.load_images([columns["images"][:1]])[0]
    hidden = np.ones((1, 4, 16), "float32")
    positions, mask = np.arange(4)[None], np.ones((1, 4, 4), bool)
    for call in (
        lambda **options: model.vision(images, **options),
        lambda **options: model.encode_images(images, **options),
        lambda **options: model.text(hidden, positions, (mask, mask), **options)[0],
    ):
        first, second = (ops.convert_to_numpy(call(training=True)) for _ in range(2))
        assert np.abs(first - second).max() > 1e-4
        first, second = (ops.convert_to_numpy(call(training=False)) for _ in range(2))
        np.testing.assert_array_equal(first, second)


def test_data_may_come_from_answers(tokenizer, columns):
    """A generator that asks the model which it feeds."""
    model = micro_model(tokenizer)
    model.compile(keras.optimizers.SGD(0.1))
    before = [array.copy() for array in model.get_weights()]
    image, answers = columns["images"][0], []

    def asking():
        for _ in range(3):
            answers.append(model.generate(image, "ocr", max_new_tokens=2))
            yield {"images": [image], "prompts": ["ocr"], "responses": ["cat"]}

    model.fit(asking(), epochs=1, verbose=0)
    assert len(answers) == 3
    assert any((old != new).any() for old, new in zip(before, model.get_weights()))


def test_a_callback_may_evaluate_and_fail(tokenizer, columns):
    model = micro_model(tokenizer)
    model.compile(keras.optimizers.SGD(0.1))
    errors = []

    class Evaluate(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            model.evaluate(columns, batch_size=5, verbose=0)
            try:
                model.evaluate([{"images": 1}], verbose=0)
            except ValueError as error:
                errors.append(error)

    history = model.fit(columns, batch_size=5, verbose=0, callbacks=[Evaluate()]).history
    assert len(errors) == 2
    assert np.isfinite(history["loss"]).all()


def test_workers_of_a_py_dataset(tokenizer, columns):
    threads = set()

    class Slow(Loader):
        def __getitem__(self, index):
            threads.add(threading.current_thread())
            return super().__getitem__(index)

    loader = Slow(columns)
    loader.workers = 3
    data = batches.Batches(loader, micro_model(tokenizer).preprocessor, VOCAB_SIZE)
    found = [x["token_ids"] for (x,) in data.arrays()]
    threads.discard(threading.current_thread())  # the first batch is looked at
    assert threads
    expected = [x["token_ids"] for x in read(columns, tokenizer, batch_size=4)]
    for array, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(array, other)


def test_one_torch_loader_for_training_and_validation(tokenizer, columns):
    """With persistent workers all its iterators are one."""
    data = pytest.importorskip("torch.utils.data")
    options = {"batch_size": 5, "num_workers": 1, "persistent_workers": True}
    loader = data.DataLoader(examples_of(columns), collate_fn=list, **options)
    model = micro_model(tokenizer)
    model.compile(keras.optimizers.SGD(0.0))
    history = model.fit(loader, validation_data=loader, epochs=2, verbose=0).history
    np.testing.assert_allclose(history["val_loss"], history["loss"], rtol=1e-5)


@pytest.mark.skipif(_backend.BACKEND != "tensorflow", reason="ragged tensors are tensorflow's")
def test_ragged_batches(tokenizer):
    import tensorflow as tf

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (20 + 2 * i, 24 - i, 3), "uint8") for i in range(4)]
    specs = {
        "images": tf.TensorSpec((None, None, 3), tf.uint8),
        **dict.fromkeys(("prompts", "responses"), tf.TensorSpec((), tf.string)),
    }
    rows = [{"images": image, "prompts": "ocr", "responses": "cat"} for image in images]
    data = tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=specs)
    (found,) = read(data.ragged_batch(4), tokenizer)
    (expected,) = read(rows, tokenizer, batch_size=4)
    np.testing.assert_array_equal(found["images"], expected["images"])


def test_a_part_of_another_model_answers_in_its_fit(tokenizer, columns):
    part = micro_model(tokenizer)
    part.freeze(".")
    image = columns["images"][0]
    expected = part.generate(image, "ocr", max_new_tokens=3)

    class Classifier(keras.Model):
        def __init__(self):
            super().__init__()
            self.part, self.head = part, keras.layers.Dense(2)

        def call(self, images, training=None):
            return self.head(ops.mean(self.part.vision(images, training=training), axis=1))

    answers, tokenized = [], part.preprocessor.for_generation([[image]], ["ocr"])

    class Answers(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if _backend.BACKEND == "jax":
                for ask in (
                    lambda: part.generate(image, "ocr", max_new_tokens=3),
                    lambda: part.predict_on_batch(tokenized),
                ):
                    with pytest.raises(RuntimeError, match=r"`jax_state_sync\(\)` first"):
                        ask()
                self.model.jax_state_sync()
            answers.append(part.generate(image, "ocr", max_new_tokens=3))

    model = Classifier()
    model.compile("sgd", "mse")
    images = part.preprocessor.load_images([[x] for x in columns["images"][:4]])[:, 0]
    model.fit(images, np.ones((4, 2)), batch_size=4, verbose=0, callbacks=[Answers()])
    assert answers == [expected]


def test_an_empty_batch(tokenizer):
    model = micro_model(tokenizer)
    model.compile("sgd")
    for method in (model.train_on_batch, model.test_on_batch, model.predict_on_batch):
        with pytest.raises(ValueError, match="The batch is empty"):
            method([])


@pytest.mark.slow_if_compiled
def test_single_batches_of_several_lengths(tokenizer, columns):
    model = micro_model(tokenizer)
    model.compile(keras.optimizers.SGD(0.0))
    step, traces = model.train_step, []
    model.train_step = lambda *args: traces.append(args) or step(*args)
    losses = {}
    for length in (20, 24, 20, 24):
        model.preprocessor.sequence_length = length
        for method in (model.train_on_batch, model.test_on_batch):
            model.reset_metrics()
            losses.setdefault(method.__name__, []).append(method(columns)[0])
    for name, values in losses.items():
        np.testing.assert_allclose(values, losses["train_on_batch"][0], rtol=1e-5, err_msg=name)
    if _backend.BACKEND == "tensorflow":
        assert len(traces) == 2


@pytest.mark.skipif(_backend.BACKEND != "tensorflow", reason="torch traces nothing, jax once")
def test_a_step_is_traced_once(tokenizer, columns):
    model = micro_model(tokenizer)
    model.compile("adamw")
    step, traces = model.train_step, []
    model.train_step = lambda data: traces.append(data) or step(data)
    model.fit(columns, batch_size=5, epochs=2, verbose=0)
    assert len(traces) == 1


@pytest.mark.slow
def test_the_loss_is_that_of_full_logits(tokenizer, columns):
    """fit's loss equals Keras' own cross-entropy over all logits."""
    model = micro_model(tokenizer)
    model.compile("sgd")
    loss = model.evaluate(columns, batch_size=10, return_dict=True, verbose=0)["loss"]
    images, prompts, responses, _ = batches.batch_examples(*columns.values())
    x, y, weight = model.preprocessor.for_training(images, prompts, responses)
    log_probs = ops.convert_to_numpy(ops.log_softmax(model(x)))
    plain = -np.take_along_axis(log_probs, y[..., None], -1)[..., 0] * weight
    assert loss == pytest.approx(plain.sum() / 10, rel=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_it_would_have(tokenizer, columns, tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(*callbacks):
        model = micro_model(tokenizer, dropout=0.3)
        model.compile(keras.optimizers.Adam(0.01))
        return model.fit(columns, batch_size=4, epochs=4, verbose=0, callbacks=callbacks)

    expected = run().history["loss"]
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(backup, Interrupt())
    assert run(backup).history["loss"] == pytest.approx(expected[2:], rel=1e-6)


@pytest.mark.slow
def test_gradient_accumulation_is_a_larger_batch(tokenizer, columns):
    def weights(batch_size, steps):
        model = micro_model(tokenizer)
        model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps))
        data = {name: column[:4] for name, column in columns.items()}
        model.fit(data, batch_size=batch_size, shuffle=False, verbose=0)
        return ops.convert_to_numpy(model.text.embedding.embeddings)

    np.testing.assert_allclose(weights(2, 2), weights(4, None), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_low_precision(tokenizer, columns, policy):
    model = micro_model(tokenizer, dtype=policy)
    is_mixed = policy.startswith("mixed")
    model.compile(keras.optimizers.Adam(0.03) if is_mixed else keras.optimizers.SGD(1.0))
    assert hasattr(model.optimizer, "inner_optimizer") == (policy == "mixed_float16")
    losses = model.fit(columns, batch_size=10, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert all(np.isfinite(losses))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "muon"])  # which has Adam for vectors
def test_adam_does_nothing_in_bfloat16(tokenizer, columns, optimizer):
    model = micro_model(tokenizer, dtype="bfloat16")
    model.compile(optimizer)
    with pytest.raises(ValueError, match=r"with beta_2=0.999 moves no weight by Adam in bfloat16"):
        model.fit(columns, verbose=0)
    with pytest.raises(ValueError, match=r"with beta_2=0.999 moves no weight by Adam in bfloat16"):
        model.train_on_batch(columns)
    model.enable_lora(2)
    model.compile("adam")
    model.fit(columns, batch_size=10, verbose=0)


# Rematerialization, freezing


@pytest.fixture(scope="module")
def training_inputs(tokenizer):
    rng = np.random.default_rng(0)
    columns = {
        "images": list(rng.integers(0, 256, (2, 20, 24, 3), "uint8")),
        "prompts": ["ocr"] * 2,
        "responses": ["cat", "cat cat"],
    }
    (x,) = read(columns, tokenizer, batch_size=2)
    return {name: ops.convert_to_tensor(array) for name, array in x.items()}


def test_remat_changes_no_gradient(tokenizer, training_inputs):
    """Not even with dropout: a block that runs twice drops the same values."""

    def loss_and_gradients(remat):
        model = micro_model(tokenizer, dropout=0.4)
        model.enable_lora(2, dropout=0.5, pattern="(query|value|down)$")
        model.text.embedding.embeddings.trainable = True
        for path, variable in model.variables_by_path().items():
            if path.endswith("lora_kernel_b"):
                variable.assign(0.1 * np.random.default_rng(len(path)).normal(size=variable.shape))
        for index, seed in enumerate(step_seeds(model)):
            seed.state.assign([index, 0])
        if remat:
            model.enable_remat()
        return gradients(
            lambda: model(training_inputs, training=True)["loss"], model.trainable_variables
        )

    loss, found = loss_and_gradients(True)
    expected_loss, expected = loss_and_gradients(False)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for actual, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-6)
        assert np.abs(wanted).max() > 0


@pytest.mark.slow
def test_dropout_changes_from_step_to_step(tokenizer, training_inputs):
    model = micro_model(tokenizer, dropout=0.4)
    losses = [float(model(training_inputs, training=mode)["loss"]) for mode in (1, 1, 0, 0)]
    assert losses[0] != losses[1]
    assert losses[2] == losses[3]


@pytest.mark.slow_if_compiled
def test_freeze_and_unfreeze(tokenizer, columns):
    model = micro_model(tokenizer)
    model.freeze("embedding")
    paths = [v.path for v in model.trainable_variables]
    assert paths
    assert not any("embedding" in path for path in paths)
    model.compile(keras.optimizers.Adam(0.01))
    before = ops.convert_to_numpy(model.text.embedding.embeddings)
    model.fit(columns, batch_size=10, verbose=0)
    np.testing.assert_array_equal(ops.convert_to_numpy(model.text.embedding.embeddings), before)
    largest = max(int(np.prod(v.shape)) for v in model.optimizer.variables)
    assert largest < 16 * VOCAB_SIZE  # no slots for the embedding
    model.unfreeze("^text/embedding")
    assert model.text.embedding.embeddings.trainable
    with pytest.raises(ValueError, match=r"Call `compile` with a new optimizer"):
        model.fit(columns, verbose=0)
    with pytest.raises(ValueError, match=r"must match the path of a weight.*'vison'"):
        model.freeze("vison")
    with pytest.raises(ValueError, match=r"or a list of them\. Received: pattern=None"):
        model.freeze(None)
    with pytest.raises(ValueError, match=r"or a list of them\. Received: pattern=\[3\]"):
        model.freeze([3])
    with pytest.raises(ValueError, match=r"pattern='\(vision': missing \), unterminated"):
        model.freeze("(vision")
    with pytest.raises(ValueError, match="'audio'"):
        model.enable_remat(["audio"])
    with pytest.raises(ValueError, match=r"must be a tuple .*towers='vision'"):
        model.enable_remat("vision")
    model.freeze()
    with pytest.raises(ValueError, match="No weight is trainable"):
        model.fit(columns, verbose=0)
    model.trainable = False
    model.unfreeze("projector/kernel")
    assert [v.path for v in model.trainable_variables] == [model.projector.kernel.path]
    model.unfreeze()
    assert len(model.trainable_variables) == len(model.variables)


def test_callbacks_cannot_change_the_model(tokenizer, columns):
    """Keras has made the program of its steps."""
    model = micro_model(tokenizer)
    model.compile("sgd")
    changes = {"freeze": [], "unfreeze": [], "enable_remat": [], "enable_lora": [2]}
    changes["quantize"] = ["int8"]
    refused = []
    failing = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: 1 / 0)

    def change(epoch, logs):
        with pytest.raises(ZeroDivisionError):  # an inner one does not end the outer one
            model.fit(columns, batch_size=10, verbose=0, callbacks=[failing])
        for name, arguments in changes.items():
            with pytest.raises(RuntimeError, match=f"`{name}` cannot be called while `fit` runs"):
                getattr(model, name)(*arguments)
            refused.append(name)
        raise KeyError

    callback = keras.callbacks.LambdaCallback(on_epoch_end=change)
    with pytest.raises(KeyError):
        model.fit(columns, batch_size=5, callbacks=[callback], verbose=0)
    assert refused == list(changes)
    model.quantize("int8")  # also after a `fit` that an error ended


@pytest.mark.slow_if_compiled
def test_ids_of_any_integer_dtype(tokenizer, training_inputs):
    model = micro_model(tokenizer)
    model.compile("sgd")
    inputs = {name: ops.convert_to_numpy(array) for name, array in training_inputs.items()}
    expected = model.evaluate(inputs, batch_size=4, verbose=0)
    for dtype in ("int64", "uint16"):
        inputs["token_ids"] = inputs["token_ids"].astype(dtype)
        assert model.evaluate(inputs, batch_size=4, verbose=0) == expected
    losses = model({**inputs, "token_ids": ops.convert_to_tensor(inputs["token_ids"], "int64")})
    assert float(losses["loss"]) > 0
    del inputs["suffix_mask"]
    with pytest.raises(ValueError, match="needs 'suffix_mask', True on the answer"):
        model.evaluate(inputs, batch_size=4, verbose=0)


def test_another_frozen_block_changes_no_result(tokenizer, columns, training_inputs):
    """jax hands the variables to compiled functions in an order that depends on it."""
    model = micro_model(tokenizer)
    inputs = {k: ops.convert_to_numpy(x) for k, x in training_inputs.items() if k != "loss_mask"}
    model.compile("sgd")
    losses, logits = [], []
    for block in (0, 1):
        model.freeze(f"text/block_{block}/")
        losses.append(model.evaluate(columns, batch_size=10, verbose=0, return_dict=True)["loss"])
        logits.append(model.predict(inputs, verbose=0))
        with pytest.raises(ValueError, match=r"\['max_new_tokens'\] have no effect"):
            model.predict(inputs, max_new_tokens=3)
        model.unfreeze()
    assert losses[0] == losses[1]
    np.testing.assert_array_equal(*logits)


@pytest.mark.slow
def test_lora_on_quantized_layers(tokenizer, columns):
    model = micro_model(tokenizer)
    for layer in model._linear_layers().values():
        layer.quantize("int8")
    model.enable_lora(4, pattern=["all-linear", "vision/.*query"])
    model.compile(keras.optimizers.Adam(0.1))
    losses = model.fit(columns, batch_size=10, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.1


def test_compile_options_are_saved(tokenizer, tmp_path):
    model = micro_model(tokenizer)
    model.freeze("^vision/")
    model.enable_remat(["text"])
    model.compile(keras.optimizers.Adam(0.01), label_smoothing=0.1)
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(7)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.label_smoothing == 0.1
    assert int(loaded.optimizer.iterations) == 7
    assert (loaded.vision.use_remat, loaded.text.use_remat) == (False, True)
    assert len(loaded.trainable_variables) == len(model.trainable_variables)


def test_what_was_not_compiled_is_loaded_so(tokenizer, tmp_path):
    model = micro_model(tokenizer)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert not loaded.compiled  # AdamW would need twice the memory of the weights


@pytest.mark.slow_if_compiled
def test_predict_draws_as_generate_does(tokenizer, columns):
    model = micro_model(tokenizer)
    columns = {**columns, "images": [columns["images"][0]] * len(columns["images"])}
    options = {"sampler": "random", "seed": 1, "max_new_tokens": 4}
    expected = model.generate(columns["images"], "ocr", **options)
    assert len(set(expected)) > 2
    assert model.predict(columns, batch_size=4, verbose=0, **options) == expected


@pytest.mark.slow_if_compiled
def test_a_last_batch_of_one_is_not_compiled_anew(tokenizer, columns):
    model = micro_model(tokenizer)
    columns = {name: column[:3] for name, column in columns.items()}
    expected = model.generate(columns["images"], "ocr", max_new_tokens=2)
    calls, generate = [], model.generate
    model.generate = lambda images, *args, **options: (
        calls.append(len({id(image) for (image,) in images})) or generate(images, *args, **options)
    )
    assert model.predict(columns, batch_size=2, verbose=0, max_new_tokens=2) == expected
    assert calls == [2, 2]  # of one image alone it would be encoded first


@pytest.mark.slow_if_compiled
def test_the_length_may_change(tokenizer, columns):
    model = micro_model(tokenizer)
    model.compile(keras.optimizers.SGD(0.0))
    losses = []
    for _ in at_two_lengths(model):
        losses.append(model.evaluate(columns, batch_size=5, verbose=0)[0])
        model.fit(columns, batch_size=5, verbose=0)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    (batch,) = next(iter(model._batches(columns, None, 10).arrays()))
    model.preprocessor.sequence_length = 24
    history = model.fit(columns, batch_size=5, epochs=2, validation_data=batch, verbose=0).history
    assert history["val_loss"] == pytest.approx([losses[0]] * 2, rel=1e-5)


# What goes wrong


@pytest.mark.parametrize("data", [[], {"images": [], "prompts": [], "responses": []}, iter([])])
def test_no_data(tokenizer, data):
    with pytest.raises(ValueError, match=r"empty|at least one"):
        read(data, tokenizer)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"picture": 1}], r"Data must be.*Received a dict with \['picture'\]"),
        ([1, 2], "Received an item of int"),
        ([{"image": np.zeros((4, 4), "uint8"), "prefix": "ocr"}], "Training needs answers"),
        ({"images": [], "token_ids": []}, "empty"),
    ],
)
def test_data_of_another_kind(tokenizer, data, message):
    with pytest.raises(ValueError, match=message):
        read(data, tokenizer)


def test_batches_of_different_lengths(tokenizer, columns):
    model = micro_model(tokenizer)
    model.compile(keras.optimizers.SGD(0.01))
    batches = [
        next(iter(model._batches(columns, None, 4).arrays()))[0] for _ in at_two_lengths(model)
    ]
    if _backend.BACKEND == "tensorflow":
        with pytest.raises(Exception, match="all batches must have the same"):
            model.fit(iter(batches), verbose=0)
    else:
        assert np.isfinite(model.fit(iter(batches), verbose=0).history["loss"][0])


def test_a_larger_batch_after_the_first(tokenizer, columns):
    model = micro_model(tokenizer)
    model.compile(keras.optimizers.SGD(0.0))
    rows = [{name: column[:n] for name, column in columns.items()} for n in (2, 3)]
    if _backend.BACKEND == "tensorflow":
        with pytest.raises(Exception, match="no batch may have more examples than the first"):
            model.evaluate(rows, verbose=0)
    else:
        assert np.isfinite(model.evaluate(rows, verbose=0)[0])


@pytest.mark.slow_if_compiled
@pytest.mark.skipif(_backend.BACKEND == "torch", reason="Keras 3.15 refuses it with torch")
def test_several_steps_per_execution(tokenizer, columns):
    losses = []
    for count in (1, 2):  # of three steps
        model = micro_model(tokenizer)
        model.compile(keras.optimizers.SGD(0.1), steps_per_execution=count)
        before = model.evaluate(in_batches(columns), verbose=0)[0]
        fitted = model.fit(columns, batch_size=4, shuffle=False, verbose=0).history["loss"][0]
        after = model.evaluate(in_batches(columns), verbose=0)[0]
        losses.append((before, fitted, after))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert losses[0][0] > losses[0][1] > losses[0][2]


def test_token_ids_outside_the_vocabulary(tokenizer, columns):
    (x,) = read(columns, tokenizer, batch_size=10)
    x["token_ids"][0, 3] = VOCAB_SIZE
    with pytest.raises(ValueError, match=r"in \[0, 1664\), the vocabulary"):
        read(x, tokenizer)


def test_long_answers_are_cut_and_counted(tokenizer, columns, caplog):
    columns["responses"][3] = columns["responses"][7] = "cat " * 99
    data = batches.Batches(
        columns, Preprocessor(tokenizer, 28, sequence_length=16), VOCAB_SIZE, batch_size=4
    )
    data.on_epoch_begin()
    assert sum(x["loss_mask"].any(axis=1).sum() for (x,) in data.arrays()) == 10
    data.on_epoch_end()
    first, last = (record.getMessage() for record in caplog.records)
    assert "longer than sequence_length=16" in first
    assert last == "2 of 10 examples were longer than sequence_length=16 and were cut."


def test_prompts_that_leave_no_answer(tokenizer, columns, caplog):
    columns["prompts"][3] = "cat " * 99
    preprocessor = Preprocessor(tokenizer, 28, sequence_length=16)
    data = batches.Batches(columns, preprocessor, VOCAB_SIZE)
    data.on_epoch_begin()
    list(data.arrays())
    data.on_epoch_end()
    assert "Of 1 examples no answer was left" in caplog.text
    columns["prompts"] = ["cat " * 99] * 10
    data = batches.Batches(columns, preprocessor, VOCAB_SIZE)
    data.on_epoch_begin()
    list(data.arrays())
    with pytest.raises(ValueError, match=r"All prompts are longer than .*sequence_length=16"):
        data.on_epoch_end()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops(tokenizer, columns, tmp_path):
    model = micro_model(tokenizer)
    model.compile(keras.optimizers.SGD(1e30))
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    with pytest.raises(FloatingPointError, match="not finite in epoch 1"):
        model.fit(columns, batch_size=4, epochs=3, verbose=0, callbacks=[backup])
    assert not list(tmp_path.iterdir())  # damaged weights are not kept


@pytest.mark.slow_if_compiled
def test_a_generator_is_read_once(tokenizer, columns):
    model = micro_model(tokenizer)
    model.compile("sgd")
    with pytest.raises(ValueError, match="The generator is used up"):
        model.fit(in_batches(columns), epochs=2, verbose=0)


def test_examples_of_different_fields(tokenizer, columns):
    rows = examples_of(columns)
    del rows[5]["suffix"]
    with pytest.raises(ValueError, match=r"One lacks \['suffix'\]"):
        read(rows, tokenizer)
    rows = examples_of(columns)
    (expected,) = read(rows, tokenizer, batch_size=10)
    rows[0]["note"] = "of no concern"
    (x,) = read(rows, tokenizer, batch_size=10)
    np.testing.assert_array_equal(x["token_ids"], expected["token_ids"])


@pytest.mark.parametrize("change", [lambda images: images * 127 + 128, lambda images: images / 0])
def test_tokenized_images_in_another_range(tokenizer, columns, change):
    (x,) = read(columns, tokenizer, batch_size=10)
    with np.errstate(all="ignore"):
        images = change(x["images"])
    with pytest.raises(ValueError, match=r"finite floats in \[-1, 1\]"):
        read({**x, "images": images}, tokenizer)


def test_examples_without_an_image(tokenizer, training_inputs):
    x = {**training_inputs, "images": training_inputs["images"][:, None][:, :0]}
    with pytest.raises(ValueError, match=r"`images` must be \(B, M, 28, 28, 3\)"):
        micro_model(tokenizer)(x)


@pytest.mark.parametrize("name", ["sample_weight", "class_weight", "loss_mask"])
def test_raw_data_has_no_weights(tokenizer, columns, name):
    rows = [{**row, name: 0} for row in examples_of(columns)]
    for data in ({**columns, name: np.zeros(10)}, rows):
        with pytest.raises(ValueError, match=rf"Raw data has no \['{name}'\]"):
            read(data, tokenizer)


def test_raw_data_and_a_loss_of_ones_own(tokenizer, columns):
    model = micro_model(tokenizer)
    model.compile("sgd", loss="mse")
    for data in (columns, examples_of(columns), data_frame("pandas", columns)):
        for method in (model.fit, model.evaluate, model.train_on_batch, model.test_on_batch):
            with pytest.raises(ValueError, match="With a loss of your own pass arrays"):
                method(data)


def test_fit_before_compile(tokenizer, columns):
    model = micro_model(tokenizer)
    with pytest.raises(ValueError, match="Call `compile` with an optimizer before `fit`"):
        model.fit(columns)
    model.compile(None)
    with pytest.raises(ValueError, match="Call `compile` with an optimizer before `fit`"):
        model.fit(columns)


@pytest.mark.parametrize("x", [None, "cat.jpg"])
def test_predict_of_no_data(tokenizer, x):
    with pytest.raises(ValueError, match="`x` must be raw data as in `fit`"):
        micro_model(tokenizer).predict(x)


def test_bad_options(tokenizer, columns):
    model = micro_model(tokenizer)
    with pytest.raises(ValueError, match="label_smoothing=1"):
        model.compile("sgd", label_smoothing=1)
    with pytest.raises(ValueError, match="label_smoothing=None"):
        model.compile("sgd", label_smoothing=None)
    with pytest.raises(ValueError, match="no `metrics`"):
        model.compile("sgd", metrics=["accuracy"])
    with pytest.raises(ValueError, match="goes with `loss=None`"):
        model.compile("sgd", loss="mse", label_smoothing=0.1)
    model.compile("sgd")
    with pytest.raises(ValueError, match="answers are part of the data"):
        model.fit(columns, np.zeros(10), verbose=0)
    with pytest.raises(ValueError, match="`batch_size` must be"):
        model.fit(columns, batch_size=0, verbose=0)
    with pytest.raises(ValueError, match="calls no `callbacks`"):
        model.predict(columns, callbacks=[keras.callbacks.Callback()])
    with pytest.raises(ValueError, match=r"\['class_weight'\] have no effect"):
        model.fit(columns, class_weight={0: 1}, verbose=0)
    with pytest.raises(ValueError, match="not a CallbackList"):
        model.fit(columns, callbacks=keras.callbacks.CallbackList(), verbose=0)
    with pytest.raises(ValueError, match="long enough to split"):
        model.fit(in_batches(columns), validation_split=0.5, verbose=0)


@pytest.mark.parametrize("mode", [None, "int4"])
def test_nothing_holds_a_model_that_is_gone(tokenizer, columns, mode):
    """Not even its memory with tensorflow, whose gradient functions hold traces of variables."""

    def use():
        model = micro_model(tokenizer)
        if mode:
            model.quantize(mode)
        model.enable_lora(2)
        model.compile(keras.optimizers.SGD(0.1))
        model.fit(columns, batch_size=5, verbose=0)
        model.evaluate(columns, batch_size=5, verbose=0)
        model.score(columns["images"][0], "ocr", ["cat"])
        model.generate(columns["images"][:2], "ocr", max_new_tokens=2)
        model.predict(next(iter(read(columns, tokenizer, batch_size=2))), verbose=0)
        return [weakref.ref(variable) for variable in model.variables]

    def num_registered():
        if _backend.BACKEND != "tensorflow":
            return 0
        from tensorflow.python.framework import ops as tf_ops

        return len(tf_ops.gradient_registry.list())

    before = num_registered()
    variables = use()
    gc.collect()
    gc.collect()  # what the first freed may hold more
    assert all(variable() is None for variable in variables)
    assert num_registered() == before


def _start_script(name, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = os.path.join(os.path.dirname(__file__), name)
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def _errors(*runs):
    """Waits for all. list of what those that failed wrote."""
    errors = [run.communicate()[1] for run in runs]
    return [error for run, error in zip(runs, errors) if run.returncode]


@pytest.mark.slow
@pytest.mark.skipif(_backend.BACKEND != "jax", reason="keras.distribution needs jax")
def test_distribution():
    """Eight devices, weights and batch spread over them, learn what one device does."""
    assert not _errors(_start_script("distributed_training.py"))


@pytest.mark.slow
@pytest.mark.skipif(_backend.BACKEND != "jax", reason="keras.distribution needs jax")
def test_processes():
    """Two processes, as on several hosts, learn what one does; each writes all weights."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name = "training_in_processes.py"
    assert not _errors(_start_script(name, port, 0), _start_script(name, port, 1))


@pytest.mark.slow
@pytest.mark.skipif(_backend.BACKEND != "tensorflow", reason="tf.distribute needs tensorflow")
def test_mirrored_strategy():
    """Two devices, each with all weights and half of the batch, learn what one device does."""
    assert not _errors(_start_script("mirrored_training.py"))


@pytest.mark.slow
@pytest.mark.skipif(_backend.BACKEND != "torch", reason="torch imitates the accelerator")
def test_accelerator():
    """Nothing is left on the CPU that answering or training on an accelerator needs there."""
    registration = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot imitate one")
    assert not _errors(_start_script("torch_accelerator.py"))
