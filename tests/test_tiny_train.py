"""The training of the tiny model: packing, what is learned, and going on after a stop."""

import dataclasses
import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_pg2 import _backend
from keras_pg2.config import PaliGemmaConfig, SiglipConfig
from keras_pg2.preprocessing import Preprocessor
from keras_pg2.tiny import train
from keras_pg2.tiny.scenes import SceneRenderer
from keras_pg2.tiny.tasks import train_tokenizer

MICRO = PaliGemmaConfig(
    vision=SiglipConfig(width=16, depth=1, mlp_dim=16, num_heads=2, image_size=112),
    text=dataclasses.replace(
        train.CONFIG.text, width=16, depth=2, mlp_dim=16, num_heads=2, num_kv_heads=1, head_dim=8
    ),
)

needs_torch = pytest.mark.skipif(_backend.IS_COMPILED, reason="the training runs on torch")


@pytest.fixture(scope="module")
def preprocessor(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return Preprocessor(train_tokenizer(path), 112)


@pytest.fixture(scope="module")
def teacher(preprocessor):
    renderer = SceneRenderer(kinds=("shape",))
    codes = np.random.default_rng(0).integers(0, 128, (len(renderer.sprites), 16))
    return train.Teacher(renderer, preprocessor, codes)


def micro_lessons(steps):
    """The three lessons with few steps and small batches."""
    changes = {"num_images": 2, "steps": steps, "easy_steps": 1, "learning_rate": (5e-3, 1e-3)}
    return [dataclasses.replace(lesson, **changes) for lesson in train.lessons()]


def micro_student(preprocessor, dtype="float32"):
    model = train.new_model(preprocessor, dtype=dtype, config=MICRO)
    return train.Student(model, is_compiled=False)


def tensors(batch):
    return {name: ops.convert_to_tensor(array) for name, array in batch.items()}


def pair(prefix, suffix):
    """Token ids and suffix mask of a pair with so many tokens, from 10 on."""
    ids = list(range(10, 10 + prefix + suffix))
    return ids, [False] * prefix + [True] * suffix


# Rows ---------------------------------------------------------------------------------------


def test_pack_puts_pairs_into_one_row():
    row = train.pack([pair(2, 2), pair(1, 3)], length=8, num_targets=6)
    assert row["token_ids"].tolist() == [10, 11, 12, 10, 11, 12, 0, 0]
    assert row["pairs"].tolist() == [1, 1, 1, 2, 2, 2, 0, 0]
    assert row["blocks"].tolist() == [0, 0, 1, 0, 1, 2, 0, 0]
    assert row["places"].tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert row["valid"].tolist() == [True] * 6 + [False] * 2
    assert row["target_places"].tolist() == [1, 2, 3, 4, 5, 0]
    assert row["targets"].tolist() == [12, 13, 11, 12, 13, 0]
    assert row["target_weights"].tolist() == [1, 1, 1, 1, 1, 0]


def test_pack_leaves_out_what_does_not_fit():
    row = train.pack([pair(2, 2), pair(4, 3), pair(1, 3), pair(1, 2)], length=6, num_targets=4)
    assert row["pairs"].tolist() == [1, 1, 1, 4, 4, 0]
    assert row["targets"].tolist() == [12, 13, 11, 12]


def test_a_packed_pair_sees_the_image_and_itself():
    row = train.pack([pair(2, 2), pair(1, 2)], length=6, num_targets=4)
    mask, positions = train.masks_and_positions(tensors({k: v[None] for k, v in row.items()}), 2)
    expected = [
        [1, 1, 0, 0, 0, 0, 0, 0],  # the image
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],  # the first prefix
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],  # its suffix
        [1, 1, 0, 0, 0, 1, 0, 0],  # the second prefix
        [1, 1, 0, 0, 0, 1, 1, 0],  # its suffix
    ]
    assert ops.convert_to_numpy(mask)[0, :7].astype(int).tolist() == expected
    assert ops.convert_to_numpy(positions)[0, :7].tolist() == [0, 1, 2, 3, 4, 2, 3]


def test_a_lone_pair_is_seen_by_the_image_too():
    row = train.pack([pair(2, 3)], length=5, num_targets=3)
    mask, positions = train.masks_and_positions(tensors({k: v[None] for k, v in row.items()}), 2)
    expected = [
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0],
    ]
    assert ops.convert_to_numpy(mask)[0, :6].astype(int).tolist() == expected
    assert ops.convert_to_numpy(positions)[0, :6].tolist() == [0, 1, 2, 3, 4, 5]


@needs_torch
def test_lone_pairs_have_the_logits_of_the_model(preprocessor, teacher):
    student = micro_student(preprocessor)
    batch = teacher.batch(micro_lessons(4)[2], 0)
    features = student.model.vision(batch["images"].astype("float32") / 127.5 - 1)
    logits = student._logits(features, tensors(batch), training=False)
    expected = student.model(
        {
            "images": np.repeat(batch["images"].astype("float32") / 127.5 - 1, 4, axis=0),
            "token_ids": batch["token_ids"],
            "padding_mask": batch["valid"],
            "suffix_mask": batch["blocks"] > 0,
        }
    )
    expected = np.take_along_axis(
        ops.convert_to_numpy(expected), batch["target_places"][..., None], axis=1
    )
    is_target = batch["target_weights"] > 0
    np.testing.assert_allclose(
        ops.convert_to_numpy(logits)[is_target], expected[is_target], atol=1e-4
    )


@needs_torch
def test_packed_pairs_do_not_change_each_other(preprocessor):
    student = micro_student(preprocessor)
    features = np.random.default_rng(0).normal(size=(2, 64, 16)).astype("float32")
    features[1] = features[0]
    rows = [train.pack([pair(3, 4), other], 20, 12) for other in (pair(2, 5), pair(6, 1))]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    batch["image_index"] = np.arange(2)
    logits = ops.convert_to_numpy(student._logits(features, tensors(batch), training=False))
    np.testing.assert_allclose(logits[0, :4], logits[1, :4], atol=1e-5)


def test_batches_depend_on_the_step_alone(teacher):
    lesson = micro_lessons(4)[1]
    for one, other in zip(
        list(teacher.batches(lesson, 2)), list(teacher.batches(lesson))[2:], strict=True
    ):
        for name, array in one[0].items():
            np.testing.assert_array_equal(array, other[0][name])


# Losses -------------------------------------------------------------------------------------


def token_losses(logits, targets, blur):
    inputs = {
        "targets": np.array([targets], "int32"),
        "target_weights": np.full((1, len(targets)), 1 / len(targets), "float32"),
        "blur": np.array([blur], "float32"),
    }
    return train.token_losses(ops.convert_to_tensor(logits[None]), 640, tensors(inputs))


def test_without_blur_the_loss_is_cross_entropy():
    logits = np.random.default_rng(0).normal(size=(3, 1792)).astype("float32")
    targets = [5, 640, 1700]
    results = token_losses(logits, targets, blur=0.05)
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[range(3), targets]
    assert float(results["token_loss"]) == pytest.approx(expected.mean(), rel=1e-5)


def test_blurred_locations_are_best_where_the_bell_is():
    bins = np.arange(1024)
    logits = np.full((1, 1792), -100, "float32")
    logits[0, 640:1664] = np.maximum(-0.5 * ((bins - 300) / 8) ** 2, -100)
    at_bell = float(token_losses(logits, [940], blur=8.0)["token_loss"])
    entropy = math.log(8 * math.sqrt(2 * math.pi * math.e))
    assert at_bell == pytest.approx(entropy, rel=1e-3)
    assert at_bell < float(token_losses(logits, [944], blur=8.0)["token_loss"])
    pixels = token_losses(logits, [950], blur=8.0)["location_pixels"]
    assert float(pixels) == pytest.approx(10 * 112 / 1023, rel=1e-4)


def test_near_locations_have_near_embeddings(preprocessor):
    model = train.new_model(preprocessor, dtype="float32", config=MICRO)
    table = ops.convert_to_numpy(model.text.embedding.embeddings)[640:1664]
    near = np.linalg.norm(table[1:] - table[:-1], axis=1).mean()
    far = np.linalg.norm(table[512:] - table[:-512], axis=1).mean()
    assert near < 0.6 * far


# Training -----------------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize("number", [0, 1, 2])
def test_each_lesson_lowers_its_loss(preprocessor, teacher, number, tmp_path):
    lesson = dataclasses.replace(micro_lessons(6)[number], learning_rate=(0.1, 0.1))
    student = micro_student(preprocessor)
    run = train.Run(tmp_path, student, teacher, [lesson])
    run._compile()
    batch = tensors(teacher.batch(lesson, 0))
    before = float(ops.stop_gradient(student(batch)["loss"]))
    student.fit(((batch,) for _ in range(6)), steps_per_epoch=6, shuffle=False, verbose=0)
    assert float(ops.stop_gradient(student(batch)["loss"])) < before - 0.1


@needs_torch
def test_a_stopped_run_goes_on_as_it_would_have(preprocessor, teacher, tmp_path):
    plan = micro_lessons(4)

    def run(folder, stop_after=None):
        run = train.Run(tmp_path / folder, micro_student(preprocessor), teacher, plan)
        run.resume()
        if stop_after is not None:
            run.log = _stop_after(run, stop_after)
        run.train(verbose=0)
        return run

    whole = run("whole")
    for stop_after in ((0, 2), (1, 3)):
        with pytest.raises(KeyboardInterrupt):
            run("parts", stop_after)
    parts = run("parts")
    for path, weight in whole.averaged_weights().items():
        np.testing.assert_array_equal(weight, parts.averaged_weights()[path], err_msg=path)


def test_a_run_that_goes_on_has_its_options(tmp_path):
    path = tmp_path / "options.json"
    none = {"minutes": None, "seed": None}
    began = {"minutes": 3.0, "seed": 0}
    assert train.options_of_run(path, {"minutes": 3.0, "seed": None}, False) == began
    assert train.options_of_run(path, none, True) == began
    assert train.options_of_run(path, {"minutes": 3.0, "seed": 0}, True) == began
    with pytest.raises(ValueError, match=r"has --minutes 3\.0, and cannot go on with 4"):
        train.options_of_run(path, {"minutes": 4.0, "seed": None}, True)
    assert train.options_of_run(path, none, True) == began
    assert train.options_of_run(path, none, False) == {"minutes": 130.0, "seed": 0}
    # `--resume` where nothing has begun
    given = {"minutes": 4.0, "seed": 1}
    assert train.options_of_run(tmp_path / "other.json", given, True) == given


def _stop_after(run, place):
    """A log that saves and stops the run at a step of a lesson."""

    def log(**entry):
        if (run.lesson_number, run.step) == place:
            run.save()
            raise KeyboardInterrupt

    return log


@pytest.fixture(autouse=True)
def log_every_step(monkeypatch):
    monkeypatch.setattr(train, "_LOG_SECONDS", 0)


@needs_torch
def test_matrices_in_stacks_move_as_with_muon():
    shapes = [(8, 8), (8, 8), (4, 16), (16, 4), (5,)]
    moved = []
    for kind in (keras.optimizers.Muon, train.StackedMuon):
        variables = [
            keras.Variable(np.random.default_rng(1).normal(size=shape), dtype="float32")
            for shape in shapes
        ]
        start = [ops.convert_to_numpy(v).copy() for v in variables]
        optimizer = kind(0.01, weight_decay=0.1)
        rng = np.random.default_rng(2)
        for _ in range(2):
            gradients = [rng.normal(size=shape).astype("float32") for shape in shapes]
            optimizer.apply(list(map(ops.convert_to_tensor, gradients)), variables)
        moved.append([ops.convert_to_numpy(v) - s for v, s in zip(variables, start)])
    for one, other in zip(*moved):
        assert np.linalg.norm(one - other) < 0.1 * np.linalg.norm(one)  # bfloat16


def test_lessons_grow_with_the_time():
    for short, long in zip(train.lessons(17), train.lessons(170), strict=True):
        assert short.steps == pytest.approx(long.steps / 10, abs=1)
    rate = train.WarmHoldCosine(train.lessons()[2])
    steps = train.lessons()[2].steps
    assert float(rate(0)) < 1e-5
    assert float(rate(60)) == pytest.approx(3e-4, rel=0.01)
    assert float(rate(steps)) == pytest.approx(0, abs=1e-8)
