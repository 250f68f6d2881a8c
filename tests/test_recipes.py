import dataclasses
import re

import keras
import numpy as np
import pytest
from keras import ops

import keras_pg2
from keras_pg2 import recipes


def _rates(schedule, steps):
    return [float(ops.convert_to_numpy(schedule(step))) for step in steps]


# The table


@pytest.mark.parametrize(
    ("name", "size", "values"),
    [
        # epochs, batch, learning rate, decay, dropout, smoothing, beams, tokens
        ("cococap", 224, (5, 256, 1e-5, 1e-6, 0, 0, 2, 32)),
        ("textcaps", 448, (5, 256, 1e-5, 1e-6, 0, 0, 3, 32)),
        ("scicap", 224, (80, 256, 3e-5, 0, 0.1, 0.1, 1, 96)),
        ("screen2words", 448, (10, 256, 1e-5, 0, 0.3, 0.2, 1, 24)),
        ("widgetcap", 448, (4, 64, 3e-6, 3e-7, 0.1, 0.1, 1, 32)),
        ("vqav2", 224, (10, 256, 1e-5, 1e-6, 0, 0, 1, 32)),
        ("vqav2", 448, (10, 256, 1e-5, 0, 0, 0, 1, 32)),
        ("nlvr2", 224, (3, 256, 1e-5, 1e-6, 0, 0, 1, 64)),
        ("nlvr2", 448, (10, 256, 3e-6, 3e-7, 0, 0, 1, 64)),
        ("tallyqa", 896, (2, 256, 7e-6, 7e-7, 0, 0, 1, 32)),
        ("ocrvqa", 448, (3, 128, 3e-6, 0, 0, 0, 1, 32)),
        ("ocrvqa", 896, (3, 128, 1e-5, 0, 0, 0, 1, 32)),
        ("textvqa", 896, (10, 256, 3e-6, 0, 0, 0, 1, 32)),
        ("infovqa", 448, (3, 128, 1e-5, 1e-6, 0, 0.4, 1, 48)),
        ("stvqa", 896, (3, 32, 3e-6, 3e-7, 0, 0.1, 1, 48)),
        ("refcoco", 224, (100, 256, 3e-5, 0, 0.1, 0.3, 1, 48)),
        ("refcoco", 896, (100, 64, 1e-5, 0, 0.0, 0.3, 1, 48)),
        ("forkme", 224, (15, 32, 1e-5, 3e-7, 0, 0, 1, 128)),
        ("default", 448, (10, 256, 1e-5, 0, 0, 0, 1, None)),
    ],
)
def test_literal_values(name, size, values):
    recipe = recipes.get(name, size)
    assert values == (
        *(recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.weight_decay),
        *(recipe.dropout, recipe.label_smoothing, recipe.num_beams, recipe.text_length),
    )


def test_every_recipe_is_in_range():
    for name, sizes in recipes.RECIPES.items():
        for size, recipe in sizes.items():
            assert size in (224, 448, 896), name
            assert recipe.source, name
            assert recipe.learning_rate is None or 1e-6 <= recipe.learning_rate <= 1e-4, name
            assert 0 <= recipe.weight_decay <= 1e-6, name
            assert 0 <= recipe.label_smoothing < 0.5, name
            assert 0 <= recipe.dropout < 0.5, name


def test_sizes_in_between():
    assert recipes.get("nlvr2", 42) is recipes.get("nlvr2", 224) is recipes.get("nlvr2", 336)
    assert recipes.get("nlvr2", 896) is recipes.get("nlvr2", 448)
    assert recipes.get("ocr") is recipes.get("ocr", 896)


def test_unknown_task():
    with pytest.raises(ValueError, match=r"`name` must be one of .*'vqav2'.*name='vqa2'"):
        recipes.get("vqa2")


def test_frozen_paths(model):
    paths = model.variables_by_path()
    frozen = [p for p in paths if re.search(recipes.get("science_qa").frozen, p)]
    assert frozen == [p for p in paths if not p.startswith("text/")]
    assert recipes.get("gqa", 224).frozen is None
    assert recipes.get("gqa", 448).frozen


def test_lora_values_suit_the_model(data):
    model = keras_pg2.PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32")
    recipe = recipes.get("lora")
    model.enable_lora(**recipe.lora)
    assert len(model.lora_layers()) == 7 * model.config.text.depth
    assert isinstance(recipe.optimizer(100), keras.optimizers.Adam)


# The schedule


def test_schedule_at_start_peak_and_end():
    schedule = recipes.get("default").schedule(2560, batch_size=256, epochs=10)  # 100 steps
    rates = _rates(schedule, [0, 1, 5, 6, 5 + 95 / 2, 100, 200])
    middle = 1e-5 * 0.5 * (1 + np.cos(np.pi * 1 / 95))
    np.testing.assert_allclose(rates, [0, 2e-6, 1e-5, middle, 5e-6, 0, 0], rtol=1e-5, atol=1e-12)


def test_epochs_end_with_a_smaller_batch():
    schedule = recipes.get("default").schedule(1000, batch_size=256, epochs=5)
    assert _rates(schedule, [1, 20]) == pytest.approx([1e-5, 0], abs=1e-12)
    assert _rates(schedule, [19])[0] > 1e-8


def test_batch_size_leaves_the_learning_rate_alone():
    schedule = recipes.get("default").schedule(100, batch_size=1, epochs=1)
    assert _rates(schedule, [5]) == pytest.approx([1e-5])


def test_steps_in_place_of_epochs():
    recipe = recipes.get("ocr")
    assert _rates(recipe.schedule(10), [750, 15_000]) == pytest.approx([1e-5, 0], abs=1e-12)
    assert recipe.schedule(9, batch_size=8).get_config() == recipe.schedule(10).get_config()
    assert _rates(recipe.schedule(256 * 20, epochs=1), [1, 20]) == pytest.approx([1e-5, 0])


def test_a_single_step_learns():
    assert _rates(recipes.get("default").schedule(3, epochs=1), [0]) == pytest.approx([1e-5])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vsr", {}, r"appendix B, gives no `learning_rate`.*replace\(recipe, learning_rate="),
        ("mimic_cxr", {}, "gives no `batch_size`"),
        ("default", {"num_examples": 0}, "`num_examples` must be positive"),
        ("default", {"batch_size": 0}, "`batch_size` must be positive. Received: batch_size=0"),
        ("default", {"epochs": -1}, "`epochs` must be positive"),
        ("default", {"accumulate": 0}, "`accumulate` must be a positive integer"),
        ("ocr", {"accumulate": 2.5}, "`accumulate` must be a positive integer. Received: .*=2.5"),
        ("ocr", {"accumulate": True}, "`accumulate` must be a positive integer"),
        ("default", {"accumulate": 3}, "`accumulate` must divide the batch size, 256.*=3"),
        (
            "default",
            {"num_examples": 20, "batch_size": 256, "epochs": 10, "accumulate": 64},
            "must not exceed the batches of the whole training, 50",
        ),
        ("forkme", {}, "`model` must be given"),
    ],
)
def test_missing_and_bad_values(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        recipes.get(name).optimizer(**{"num_examples": 100, **arguments})


# The optimizer


def test_no_decay_is_adam():
    optimizer = recipes.get("okvqa").optimizer(1000)
    assert not isinstance(optimizer, keras.optimizers.AdamW)
    assert optimizer.global_clipnorm == 1.0
    assert optimizer.epsilon == 1e-8


def test_decay_follows_the_schedule_not_the_learning_rate(data):
    """big_vision's way: kernels of the vision tower and the projector lose `wd * schedule`."""
    model = keras_pg2.PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32")
    recipe = dataclasses.replace(recipes.get("ai2d"), weight_decay=0.25)
    assert recipe.learning_rate == 1e-5
    optimizer = recipe.optimizer(40, batch_size=1, epochs=1, model=model)  # 2 steps of warm-up
    decaying = ["vision/block_0/mlp/up/kernel", "projector/kernel"]
    names = [*decaying, "projector/bias", "text/block_0/mlp/up/kernel"]
    variables = [model.variables_by_path()[name] for name in names]
    optimizer.build(variables)
    before = [ops.convert_to_numpy(v).copy() for v in variables]
    for _ in range(3):  # the schedule is at 0, 1/2 and 1
        optimizer.apply([ops.zeros(v.shape) for v in variables])
    for name, variable, value in zip(names, variables, before):
        share = (1 - 0.125) * (1 - 0.25) if name in decaying else 1
        np.testing.assert_allclose(
            ops.convert_to_numpy(variable), value * share, rtol=1e-5, err_msg=name
        )


@pytest.mark.slow_if_compiled
def test_nothing_decays_where_the_kernels_are_frozen(data, image):
    """Keras' AdamW fails on torch when no weight decays."""
    model = keras_pg2.PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32")
    recipe = recipes.get("activitynet_cap")
    assert recipe.weight_decay
    model.freeze("vision|projector")
    optimizer = recipe.optimizer(2, batch_size=2, epochs=1, model=model)
    assert not isinstance(optimizer, keras.optimizers.AdamW)
    model.compile(optimizer=optimizer)
    examples = [{"image": image, "prefix": "a", "suffix": "b"}] * 2
    assert np.isfinite(model.fit(examples, batch_size=2, verbose=0).history["loss"]).all()


def test_gradients_are_clipped_together():
    optimizer = recipes.get("default").optimizer(1, epochs=1)
    gradients = optimizer._clip_gradients([ops.array([30.0]), ops.array([40.0])])
    values = [float(ops.convert_to_numpy(g)[0]) for g in gradients]
    assert values == pytest.approx([0.6, 0.8], rel=1e-4)


def test_accumulated_batches_end_the_schedule_together():
    """Keras counts batches, not steps: the schedule does too."""
    recipe = recipes.get("default")
    optimizer = recipe.optimizer(8, batch_size=4, epochs=2, accumulate=2)  # 8 batches
    variable = keras.Variable(np.ones(3, "float32"))
    optimizer.build([variable])
    rates = []
    for _ in range(8):
        rates.append(float(ops.convert_to_numpy(optimizer.learning_rate)))
        optimizer.apply([ops.ones(3)])
    assert rates[:2] == pytest.approx([0, 1e-5])
    assert rates[4] == pytest.approx(1e-5 * 0.5 * (1 + np.cos(np.pi * 3 / 7)))
    assert float(ops.convert_to_numpy(optimizer.learning_rate)) == pytest.approx(0, abs=1e-12)
    assert ops.convert_to_numpy(variable)[0] == pytest.approx(1 - sum(rates[1::2]), abs=1e-7)


def test_wrong_names_and_sizes():
    with pytest.raises(ValueError, match=r"`name` must be one of .*Received: name=\['vqav2'\]"):
        recipes.get(["vqav2"])
    with pytest.raises(ValueError, match=r"`image_size` must be a number\. Received: .*='448'"):
        recipes.get("vqav2", image_size="448")
