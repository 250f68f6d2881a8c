"""The embedded preset, as it is shipped."""

import json
import random

import keras
import numpy as np
import pytest

import keras_pg2
from keras_pg2 import _backend
from keras_pg2.checkpoints.presets import TINY
from keras_pg2.tiny import SAMPLES
from keras_pg2.tiny.evaluate import evaluate
from keras_pg2.tiny.scenes import SceneRenderer
from keras_pg2.tiny.tasks import tasks


@pytest.fixture(scope="module")
def tiny():
    return keras_pg2.PaliGemma2.from_preset(TINY, dtype="float32")


def test_answers_about_the_samples(tiny, data):
    """The same on every backend, to the letter."""
    expected = json.loads((data / "tiny_answers.json").read_text())
    assert set(expected) == set(SAMPLES)
    for name, answers in expected.items():
        prompts = list(answers)
        texts = tiny.generate(SAMPLES[name], prompts, batch_size=6)
        assert dict(zip(prompts, texts)) == answers


def test_objects_in_a_sample(tiny):
    """Real boxes and masks: two crosses of one colour, and no third."""
    found = tiny.detect(SAMPLES["shapes"], "cross ; heart")
    assert [item.label for item in found] == ["heart", "cross", "cross"]
    assert all(item.score > 0.2 for item in found)
    image = keras_pg2.preprocessing.image_pixels(SAMPLES["shapes"])
    (heart,) = tiny.segment(SAMPLES["shapes"], "heart")
    is_purple = image[..., 1] < 100
    assert (heart.mask & is_purple).sum() / (heart.mask | is_purple).sum() > 0.75


def test_what_is_not_there_is_not_found(tiny):
    assert len(tiny.detect(SAMPLES["shapes"], "star")) == 0
    assert len(tiny.detect(SAMPLES["digits"], "7")) == 0


def test_score_ranks_answers(tiny):
    scores = tiny.score(
        SAMPLES["two_digits"], "answer en what is the sum of the digits?", list("0123456789")
    )
    assert int(np.argmax(scores)) == 6
    assert np.exp(scores).sum() < 1


@pytest.mark.slow
def test_scores_of_the_model_card(tiny):
    metrics = evaluate(tiny, num_examples=100, renderer=SceneRenderer("test"))
    floors = {
        "ocr/exact": 0.85,
        "answer/exact": 0.88,
        "caption/exact": 0.85,
        "detect/recall": 0.85,
        "detect/iou": 0.80,
        "segment/mask iou": 0.60,
    }
    for name, floor in floors.items():
        assert metrics[name] >= floor, name


@pytest.mark.slow
def test_lora_learns_a_new_question():
    """From chance to nine in ten, by 120 steps of LoRA."""
    model = keras_pg2.PaliGemma2.from_preset(TINY, dtype="float32")
    held_out, renderer = SceneRenderer("test"), SceneRenderer("train", drawings=4)
    kinds = ("answer top-most",)
    before = evaluate(model, 100, renderer=held_out, kinds=kinds)["answer top-most/exact"]
    assert before < 0.5
    rng = random.Random(0)
    examples = []
    while len(examples) < 120 * 32:
        scene = renderer.scene(rng)
        for prompt, answer in tasks(scene, rng, kinds):
            examples.append({"image": scene.image, "prefix": prompt, "suffix": answer})
    keras.utils.set_random_seed(0)
    model.preprocessor.sequence_length = 24
    model.enable_lora(rank=8, pattern="all-linear")
    model.compile(keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(4e-3, 120)))
    model.fit(examples, batch_size=32, verbose=0)
    after = evaluate(model, 200, renderer=held_out, kinds=kinds)["answer top-most/exact"]
    assert after >= 0.9


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="a dict of torch modules")
def test_the_state_of_a_loaded_model(tiny):
    state = keras_pg2.PaliGemma2.from_preset(TINY, dtype="float32").state_dict()
    fresh = keras_pg2.PaliGemma2(tiny.config)
    fresh.load_state_dict(state)  # which has the same names
    variables = zip(fresh.variables, tiny.variables, strict=True)
    assert all((a.numpy() == b.numpy()).all() for a, b in variables)
