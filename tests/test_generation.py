import functools
import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_pg2 import Beam, Generation, Greedy, PaliGemma2, Sample, _backend
from keras_pg2 import generation as generation_module
from keras_pg2.attention import attention
from keras_pg2.gemma import GemmaBlock
from tests.conftest import logits_of

PROMPTS = ["caption en", "ocr", "answer en what is in the image?"]


def greedy_reference(model, inputs, num_tokens):
    """Token ids and log-probabilities without a cache: the whole sequence anew for each token."""
    length = inputs["token_ids"].shape[1]
    added = ((0, 0), (0, num_tokens))
    token_ids = np.pad(inputs["token_ids"], added)
    padding_mask = np.pad(inputs["padding_mask"], added)
    suffix_mask = np.pad(inputs["suffix_mask"], added, constant_values=True)
    log_probs = []
    for position in range(length, length + num_tokens):
        masks = {"padding_mask": padding_mask, "suffix_mask": suffix_mask}
        logits = logits_of(model, {"images": inputs["images"], "token_ids": token_ids, **masks})
        last = ops.convert_to_numpy(ops.log_softmax(logits, axis=-1))[0, position - 1]
        log_probs.append(last.max())
        token_ids[0, position] = last.argmax()
        padding_mask[0, position] = True
        if last.argmax() == 1:
            break
    return token_ids[0, length : position + 1], np.array(log_probs)


@pytest.mark.parametrize("response", ["", "a red"])
def test_cached_equals_uncached(model, image, response):
    """Also with the beginning of an answer, which is suffix: causal."""
    inputs = model.preprocessor.for_generation([[image]], ["caption en"], [response])
    token_ids, log_probs = greedy_reference(model, inputs, 10)
    answer = model.generate(image, "caption en", response, max_new_tokens=10, details=True)
    assert answer.token_ids.tolist() == token_ids.tolist()
    np.testing.assert_allclose(answer.log_probs, log_probs, atol=1e-4)


@pytest.mark.slow_if_compiled
@pytest.mark.parametrize("mode", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_cached_equals_uncached_if_quantized(data, image, mode):
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32", quantize=mode)
    inputs = model.preprocessor.for_generation([[image]], ["caption en"])
    token_ids, log_probs = greedy_reference(model, inputs, 10)
    answer = model.generate(image, "caption en", max_new_tokens=10, details=True)
    assert answer.token_ids.tolist() == token_ids.tolist()
    np.testing.assert_allclose(answer.log_probs, log_probs, atol=5e-4)
    assert "".join(model.stream(image, "caption en", max_new_tokens=10)) == answer.text


def test_cached_equals_uncached_in_paligemma1(paligemma1, image):
    inputs = paligemma1.preprocessor.for_generation([[image]], ["ocr"], ["a"])
    token_ids, log_probs = greedy_reference(paligemma1, inputs, 8)
    answer = paligemma1.generate(image, "ocr", "a", max_new_tokens=8, details=True)
    assert answer.token_ids.tolist() == token_ids.tolist()
    np.testing.assert_allclose(answer.log_probs, log_probs, atol=1e-4)


def test_cached_equals_uncached_with_a_window(data, image):
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32", sliding_window=4)
    inputs = model.preprocessor.for_generation([[image]], ["caption en"], ["a red"])
    token_ids, log_probs = greedy_reference(model, inputs, 8)
    answer = model.generate(image, "caption en", "a red", max_new_tokens=8, details=True)
    assert answer.token_ids.tolist() == token_ids.tolist()
    np.testing.assert_allclose(answer.log_probs, log_probs, atol=1e-4)


@pytest.mark.parametrize("sampler", [Greedy(), Beam(3)])
def test_a_ragged_batch_equals_one_by_one(model, image, sampler):
    images = [image, image[::-1], image[:, ::-1]]
    options = {"max_new_tokens": 12, "sampler": sampler, "details": True}
    responses = ["", "a red ball", "x"]
    batch = model.generate(images, PROMPTS, responses, **options)
    for row, answer in enumerate(batch):
        alone = model.generate(images[row], PROMPTS[row], responses[row], **options)
        assert answer.text == alone.text
        assert answer.token_ids.tolist() == alone.token_ids.tolist()
        # Those of a beam are sums.
        np.testing.assert_allclose(answer.log_probs, alone.log_probs, rtol=1e-5, atol=1e-4)


def test_long_prefixes_are_read_in_parts(model, image, monkeypatch):
    options = {"max_new_tokens": 6, "details": True}
    whole = model.generate([image, image[::-1]], PROMPTS[:2], **options)
    monkeypatch.setattr(model, "programs", _backend.Programs())
    monkeypatch.setattr(_backend, "MAX_TOKENS", 3)
    monkeypatch.setattr(_backend, "_MAX_ATTENTION_LOGITS", 64)
    parts = model.generate([image, image[::-1]], PROMPTS[:2], **options)
    for answer, expected in zip(parts, whole):
        assert answer.token_ids.tolist() == expected.token_ids.tolist()
        np.testing.assert_allclose(answer.log_probs, expected.log_probs, atol=1e-4)


def test_batches_are_split(model, image):
    images = [image, image[::-1], image[:, ::-1]]
    whole = model.generate(images, "ocr", max_new_tokens=6)
    model.generate(images[:2], "ocr", max_new_tokens=6)
    before = list(model.programs.compilations)
    assert model.generate(images, "ocr", max_new_tokens=6, batch_size=2) == whole
    assert model.programs.compilations == before  # the last batch is filled up
    assert len(set(whole)) > 1


@pytest.mark.slow
def test_keras_hub_samplers_with_more_images(model, image):
    """An image more and fewer tokens of text, in a cache of the same length."""
    samplers = pytest.importorskip("keras_hub").samplers
    sampler = samplers.GreedySampler()
    rng = np.random.default_rng(0)
    for num_images, length in ((1, 19), (2, 10)):
        inputs = {
            "images": rng.uniform(-1, 1, (1, num_images, 42, 42, 3)).astype("float32"),
            "token_ids": rng.integers(3, 500, (1, length)),
        }
        (answer,) = model.generate(inputs, sampler=sampler, max_new_tokens=6)
        (expected,) = model.generate(inputs, max_new_tokens=6)
        assert answer.token_ids.tolist() == expected.token_ids.tolist()


def test_several_images_per_example(model, image):
    """Tokens of the images follow each other; their order matters."""
    pair = [image, image[::-1]]
    answers = model.generate([pair, pair[::-1]], "ocr", max_new_tokens=6, details=True)
    x = model.preprocessor.for_generation([pair], ["ocr"])
    token_ids, log_probs = greedy_reference(model, x, 6)
    assert answers[0].token_ids.tolist() == token_ids.tolist()
    np.testing.assert_allclose(answers[0].log_probs, log_probs, atol=1e-4)
    assert not np.allclose(answers[0].log_probs[0], answers[1].log_probs[0])
    features = ops.convert_to_numpy(model.encode_images(x["images"]))
    assert features.shape == (1, 18, 40)
    single = ops.convert_to_numpy(model.encode_images(x["images"][:, 1]))
    np.testing.assert_allclose(features[:, 9:], single, atol=1e-5)


@pytest.mark.slow_if_compiled
def test_video_frames(model, image):
    frames = np.stack([np.roll(image, i, axis=0) for i in range(16)])
    assert isinstance(model.generate(frames[None], ["ocr"], max_new_tokens=2)[0], str)


# Forms of input and output


def test_forms_of_input(model, image):
    expected = model.generate(image, "ocr", max_new_tokens=6)
    assert isinstance(expected, str)
    same = [
        model.generate([image], ["ocr"], max_new_tokens=6),
        model.generate([image], "ocr", max_new_tokens=6),
        model.generate(image, ["ocr"], max_new_tokens=6),
        model.generate({"images": image[None], "prompts": ["ocr\n"]}, max_new_tokens=6),
    ]
    assert same == [[expected]] * len(same)
    inputs = model.preprocessor.for_generation([[image]], ["ocr"])
    (answer,) = model.generate(inputs, max_new_tokens=6)
    assert isinstance(answer, Generation)
    assert answer.text == expected
    assert answer.text == model.preprocessor.tokenizer.decode(answer.token_ids)


def test_dict_with_responses(model, image):
    expected = model.generate(image, "ocr", "a red", max_new_tokens=6)
    inputs = {"images": image, "prompts": "ocr", "responses": "a red"}
    assert model.generate(inputs, max_new_tokens=6) == expected
    assert expected != model.generate(image, "ocr", max_new_tokens=6)


def test_stream_joins_to_generate(model, image):
    images = [image, image[::-1]]
    expected = model.generate(images, PROMPTS[:2], max_new_tokens=20)
    pieces = list(model.stream(images, PROMPTS[:2], max_new_tokens=20))
    assert ["".join(column) for column in zip(*pieces)] == expected
    pieces = list(model.stream(image, PROMPTS[0], max_new_tokens=20))
    assert len(pieces) > 1
    assert "".join(pieces) == expected[0]


def test_the_first_piece_needs_no_decoding(model, image, monkeypatch):
    monkeypatch.setattr(model, "programs", _backend.Programs())
    pieces = model.stream(image, PROMPTS[0], max_new_tokens=5)
    monkeypatch.setattr(PaliGemma2, "decode", None)  # any call fails
    assert next(pieces) == model.preprocessor.tokenizer.decode(
        model.generate(image, PROMPTS[0], max_new_tokens=1, details=True).token_ids
    )


def test_stream_encodes_one_image_once(model, image, monkeypatch):
    expected = model.generate(image, PROMPTS[:2], max_new_tokens=6)
    encoded, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda one: encoded.append(one) or encode(one))
    pieces = list(model.stream(image, PROMPTS[:2], max_new_tokens=6))
    assert ["".join(column) for column in zip(*pieces)] == expected
    assert len(encoded) == 1
    assert encoded[0] is image


@pytest.mark.slow_if_compiled
def test_stream_of_beams(model, image):
    expected = model.generate(image, "ocr", max_new_tokens=6, sampler="beam")
    assert "".join(model.stream(image, "ocr", max_new_tokens=6, sampler="beam")) == expected


@pytest.mark.slow_if_compiled
def test_without_preprocessor(data, model, image):
    inputs = model.preprocessor.for_generation([[image]], ["ocr"])
    expected = model.generate(inputs, max_new_tokens=6)[0]
    bare = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32")
    bare.preprocessor = None
    (answer,) = bare.generate(inputs, max_new_tokens=6)
    assert answer.text == ""
    assert answer.token_ids.tolist() == expected.token_ids.tolist()
    with pytest.raises(ValueError, match="no preprocessor"):
        bare.generate(image, "ocr")
    with pytest.raises(ValueError, match="`stream` gives text"):
        bare.stream(inputs)


# Ends


def _end_after(model, monkeypatch, image, num_tokens):
    """Makes the token that greedy decoding gives at some step the end of the answer."""
    ids = model.generate(image, "ocr", max_new_tokens=num_tokens, details=True).token_ids
    monkeypatch.setattr(generation_module, "EOS_ID", int(ids[-1]))
    monkeypatch.setattr(model, "programs", _backend.Programs())
    return ids.tolist().index(ids[-1]) + 1


def test_rows_stop_at_eos(model, image, monkeypatch):
    count = _end_after(model, monkeypatch, image, 4)
    answer, other = model.generate([image, image[::-1]], "ocr", max_new_tokens=12, details=True)
    assert len(answer.token_ids) == len(answer.log_probs) == count
    assert len(other.token_ids) == 12


def test_the_loop_stops_early(model, image, monkeypatch):
    count = _end_after(model, monkeypatch, image, 4)
    calls = []
    decode = PaliGemma2.decode

    def spy(*args):
        calls.append(1)
        return decode(*args)

    monkeypatch.setattr(PaliGemma2, "decode", spy)
    steps = generation_module.token_steps(
        model,
        model.preprocessor.for_generation([[image]], ["ocr"]),
        Greedy(),
        200,
        [None],
        lambda: 200,
    )
    next(steps)
    token_ids, _ = steps.send(np.array([False]))
    assert token_ids.shape[1] <= count + 8


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(model, image, stream):
    text = model.generate(image, "ocr", max_new_tokens=12)
    stop = text[len(text) // 2 :][:3]
    expected = text[: text.index(stop)]
    if stream:
        assert "".join(model.stream(image, "ocr", max_new_tokens=12, stop=stop)) == expected
    else:
        answer = model.generate(image, "ocr", max_new_tokens=12, stop=("never", stop), details=True)
        assert answer.text == expected
        decoded = model.preprocessor.tokenizer.decode(answer.token_ids)
        assert stop in decoded
        assert stop not in model.preprocessor.tokenizer.decode(answer.token_ids[:-1])


def test_a_stop_string_that_began_before_another(model, image):
    """The first of them counts, though a later one is complete while its tokens come."""
    answer = model.generate(image, "ocr", max_new_tokens=12, details=True)
    texts = [model.preprocessor.tokenizer.decode(answer.token_ids[:n]) for n in range(1, 13)]
    num_waits = 0
    for cut in map(len, texts[2:10]):
        stop = answer.text[cut - 2 : cut], answer.text[cut - 3 : cut + 2]
        expected = answer.text[: min(map(answer.text.index, stop))]
        assert model.generate(image, "ocr", max_new_tokens=12, stop=stop) == expected
        for count, text in enumerate(texts, 1):
            found = [text.index(string) for string in stop if string in text]
            args = model, answer.token_ids[:count], stop
            assert generation_module._answer(*args, is_over=True)[0] == text[: min([99, *found])]
            text, _, is_stopped = generation_module._answer(*args)
            assert not is_stopped or text == expected
            num_waits += bool(found) and not is_stopped
    assert num_waits


def test_certain_length():
    certain = generation_module._certain_length
    assert certain("caf\ufffd", ()) == 3
    assert certain("caf\ufffd", ("afé",)) == 1
    assert certain("one stop?", ("stop!",)) == 9
    assert certain("one st", ("stop!", "top")) == 4


# Samplers


@pytest.mark.parametrize(
    "sampler",
    [
        "random",
        pytest.param("top_k", marks=pytest.mark.slow_if_compiled),
        "top_p",
        Sample(0.7, top_k=5, top_p=0.9),
    ],
)
def test_same_seed_same_text(model, image, sampler):
    options = {"sampler": sampler, "max_new_tokens": 12}
    text = model.generate(image, "ocr", seed=1, **options)
    assert model.generate(image, "ocr", seed=1, **options) == text
    assert any(model.generate(image, "ocr", seed=seed, **options) != text for seed in (2, 3, 4))
    assert model.generate([image, image], "ocr", seed=1, **options)[0] == text


def test_rows_and_batches_differ(model, image):
    options = {"sampler": "random", "max_new_tokens": 12, "seed": 1}
    texts = model.generate([image] * 4, "ocr", batch_size=2, **options)
    assert len(set(texts)) == 4
    assert model.generate([image] * 4, "ocr", **options) == texts


def test_no_seed_is_random(model, image):
    options = {"sampler": "random", "max_new_tokens": 12}
    assert len({model.generate(image, "ocr", **options) for _ in range(3)}) > 1


def test_the_same_text_on_every_backend(model, image):
    ids = model.generate(image, "ocr", sampler="random", seed=7, max_new_tokens=8, details=True)
    assert ids.token_ids.tolist() == [607, 34, 34, 1376, 1376, 690, 690, 690]


def _tokens(sampler, logits, uniforms):
    logits = ops.convert_to_tensor(np.array(logits, "float32")) / sampler.temperature
    if sampler.top_k or sampler.top_p:
        inputs = generation_module._sample_inputs(sampler, [0], 1, logits.shape[-1])
        logits = generation_module._filter(logits, int(inputs["top_k"]), inputs["top_p"])
    uniforms = ops.convert_to_tensor(np.array(uniforms, "float32"))
    return ops.convert_to_numpy(generation_module._sample(logits, uniforms)).tolist()


def test_samples_have_a_probability(run_in_program):
    """The sums of XLA rise a little between the allowed tokens, too: here at 221,456."""
    rng = np.random.default_rng(0)
    for _ in range(12):
        allowed = rng.choice(257_152, 40, replace=False)
        logits = np.full((1, 257_152), -1e30, "float32")
        logits[0, allowed] = rng.normal(size=40) * 2
    uniforms = np.append(np.linspace(1e-6, 1, 500), 0.9518522024154663).astype("float32")
    logits = ops.convert_to_tensor(logits)
    sample = run_in_program(lambda logits, uniform: generation_module._sample(logits, uniform))
    tokens = {int(sample(logits, ops.convert_to_tensor([uniform]))[0]) for uniform in uniforms}
    assert tokens <= set(allowed.tolist())
    assert len(tokens) > 10


def test_sampling_is_the_inverse_of_the_distribution():
    logits = np.log([[0.1, 0.2, 0.3, 0.4]] * 5)
    assert _tokens(Sample(), logits, [1e-7, 0.09, 0.11, 0.31, 1.0]) == [0, 0, 1, 2, 3]


def test_temperature():
    logits = np.log([[0.2, 0.8]] * 2)
    assert _tokens(Sample(temperature=0.5), logits, [0.05, 0.06]) == [0, 1]  # 0.04 : 0.64


def test_top_k():
    logits = np.log([[0.1, 0.2, 0.3, 0.4]] * 3)
    assert _tokens(Sample(top_k=2), logits, [1e-7, 0.42, 0.44]) == [2, 2, 3]  # 0.3 : 0.4
    assert _tokens(Sample(top_k=1), logits, [1e-7, 0.5, 1.0]) == [3, 3, 3]
    assert _tokens(Sample(top_k=99), logits, [1e-7, 0.5, 1.0]) == [0, 2, 3]


def test_top_p():
    logits = np.log([[0.1, 0.2, 0.3, 0.4]] * 3)
    assert _tokens(Sample(top_p=0.6), logits, [1e-7, 0.42, 0.44]) == [2, 2, 3]
    assert _tokens(Sample(top_p=0.01), logits, [1e-7, 0.5, 1.0]) == [3, 3, 3]
    assert _tokens(Sample(top_p=1.0), logits, [1e-7, 0.5, 1.0]) == [0, 2, 3]


def test_impossible_tokens_are_never_sampled():
    logits = np.full((3, 1000), -100.0)
    logits[:, 500] = 0
    assert _tokens(Sample(), logits, [1e-7, 0.5, 1.0]) == [500] * 3


@pytest.mark.slow_if_compiled
def test_one_beam_is_no_worse_than_immediate_end(model, image):
    """Beam search maximises the log-probability of the whole answer."""
    best = model.generate(image, "ocr", max_new_tokens=6, sampler=Beam(8), details=True)
    few = model.generate(image, "ocr", max_new_tokens=6, sampler=Beam(1), details=True)
    assert best.token_ids[-1] == few.token_ids[-1] == 1
    assert best.log_probs.sum() >= few.log_probs.sum() - 1e-5
    inputs = model.preprocessor.for_generation([[image]], ["ocr"])
    x = {name: array for name, array in inputs.items() if name != "padding_mask"}
    x["token_ids"] = np.append(x["token_ids"], [best.token_ids], axis=1)
    x["suffix_mask"] = np.append(x["suffix_mask"], [np.ones(len(best.token_ids), bool)], axis=1)
    log_probs = ops.convert_to_numpy(ops.log_softmax(model(x), axis=-1))[0]
    start = inputs["token_ids"].shape[1] - 1
    expected = [log_probs[start + i, token] for i, token in enumerate(best.token_ids)]
    np.testing.assert_allclose(best.log_probs, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GreedySampler", {}),
        pytest.param("TopKSampler", {"k": 5, "seed": 1}, marks=pytest.mark.slow_if_compiled),
        pytest.param("TopPSampler", {"p": 0.9, "seed": 1}, marks=pytest.mark.slow_if_compiled),
        ("RandomSampler", {"seed": 1}),
        ("BeamSampler", {"num_beams": 3}),
        ("ContrastiveSampler", {"k": 3, "alpha": 0.2}),
    ],
)
def test_keras_hub_samplers(model, image, name, options):
    samplers = pytest.importorskip("keras_hub").samplers
    sampler = getattr(samplers, name)(**options)
    answers = model.generate([image, image[::-1]], PROMPTS[:2], sampler=sampler, max_new_tokens=6)
    assert len(answers) == 2
    if name == "GreedySampler":
        assert answers == model.generate([image, image[::-1]], PROMPTS[:2], max_new_tokens=6)
    if name == "RandomSampler":  # its seed generator moves on
        again = model.generate([image, image[::-1]], PROMPTS[:2], sampler=sampler, max_new_tokens=6)
        assert again != answers


@pytest.mark.skipif(_backend.IS_COMPILED, reason="compiles for half a minute; the code is one")
def test_contrastive_search_does_not_see_padding(model, image):
    sampler = pytest.importorskip("keras_hub").samplers.ContrastiveSampler(k=5, alpha=0.8)
    prompts = [f"{'word ' * count}ocr" for count in range(6)]
    answers = model.generate(image, prompts, sampler=sampler, max_new_tokens=8)
    alone = [model.generate(image, p, sampler=sampler, max_new_tokens=8) for p in prompts]
    assert answers == alone


def test_all_beams_of_a_keras_hub_sampler(model, image):
    samplers = pytest.importorskip("keras_hub").samplers
    with pytest.raises(ValueError, match="leave out `return_all_beams`"):
        model.generate(image, "ocr", sampler=samplers.BeamSampler(return_all_beams=True))
    with pytest.raises(ValueError, match="`sampler` must be one of"):
        model.generate(image, "ocr", sampler=samplers.TopKSampler)


@pytest.mark.slow_if_compiled
def test_a_keras_hub_sampler_may_be_changed(model, image):
    sampler = pytest.importorskip("keras_hub").samplers.TopKSampler(k=50, seed=0)
    expected = model.generate(image, "ocr", max_new_tokens=6)
    assert model.generate(image, "ocr", max_new_tokens=6, sampler=sampler) != expected
    sampler.k = 1
    assert model.generate(image, "ocr", max_new_tokens=6, sampler=sampler) == expected


def test_keras_hub_samplers_that_are_alike_share_a_program(model, image):
    samplers = pytest.importorskip("keras_hub").samplers

    def answer(sampler):
        return model.generate(image, "ocr", sampler=sampler, max_new_tokens=8)

    first, second = (samplers.TopKSampler(k=50, seed=seed) for seed in (3, 4))
    expected = [answer(sampler) for sampler in (first, first, second, second)]
    assert len(set(expected)) == 4
    count = len(model.programs.compilations)
    again = [samplers.TopKSampler(k=50, seed=seed) for seed in (3, 4)]
    # In turns, so that each goes on with its own seed.
    found = [answer(sampler) for sampler in (*again, *again)]
    assert found == [expected[i] for i in (0, 2, 1, 3)]
    assert len(model.programs.compilations) == count


def test_a_keras_hub_sampler_takes_no_grammar(model, image):
    sampler = pytest.importorskip("keras_hub").samplers.GreedySampler()
    with pytest.raises(ValueError, match="keras_hub sampler takes no grammar"):
        model.detect(image, "cat", constrained=True, sampler=sampler)


# Compilations


@pytest.mark.slow
@pytest.mark.skipif(not _backend.IS_COMPILED, reason="torch runs eagerly: nothing is compiled")
def test_other_programs_stay_with_a_new_sampler(data, image):
    samplers = pytest.importorskip("keras_hub").samplers
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32")
    for k in (5, 6):
        model.generate(image, "caption", max_new_tokens=2)
        model.generate(image, "caption", sampler=samplers.TopKSampler(k=k), max_new_tokens=2)
    names = [name[0] for name in model.programs.compilations]
    assert sorted(names) == ["decode", "keras_hub", "keras_hub", "prefill"]


@pytest.mark.skipif(not _backend.IS_COMPILED, reason="torch runs eagerly: nothing is compiled")
def test_20_prompt_lengths_compile_at_most_3_programs(data):
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32")
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (1, 42, 42, 3)).astype("float32")
    for length in range(3, 63, 3):
        token_ids = rng.integers(3, 500, (1, length))
        model.generate({"images": images, "token_ids": token_ids}, max_new_tokens=5)
    assert len(model.programs.compilations) <= 3


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="a flag of torch")
def test_threads_leave_onednn_as_it_was(data, image):
    import concurrent.futures

    import torch

    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="bfloat16")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: model.generate(image, "ocr", max_new_tokens=6), range(8)))
    assert torch.backends.mkldnn.enabled


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="a flag of torch")
def test_threads_do_not_round_each_others_products(data, image):
    import threading

    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="bfloat16")
    candidates, is_over = ["cat", "two words", "x"], threading.Event()

    def score():
        return model.score(image, "ocr", candidates)

    def generate():
        while not is_over.is_set():
            model.generate(image, "ocr", max_new_tokens=24)

    expected = score()
    other = threading.Thread(target=generate)
    other.start()
    try:
        found = [score() for _ in range(20)]
    finally:
        is_over.set()
        other.join()
    np.testing.assert_array_equal(found, [expected] * 20)


@pytest.mark.skipif(_backend.BACKEND != "torch", reason="jax and tensorflow cannot be forked")
def test_a_fork_has_no_locks_of_other_threads(monkeypatch):
    import torch

    for name in ("_turns", "_layout_lock", "_graph_lock"):
        monkeypatch.setattr(_backend, name, getattr(_backend, name))  # put back at the end
    monkeypatch.setattr(_backend._onednn, "lock", _backend._onednn.lock)
    was_enabled, held = torch.backends.mkldnn.enabled, _backend._turns
    with held:
        _backend._count_users_without_onednn(1)
        assert not torch.backends.mkldnn.enabled
        _backend._renew_locks()
        assert _backend._turns is not held
        assert _backend._onednn.num_without == 0
        assert torch.backends.mkldnn.enabled == was_enabled


def test_prefill_costs_the_same_with_any_cache(model):
    if _backend.BACKEND != "jax":
        pytest.skip("jax only: it tells what a program needs")
    import jax

    def num_operations(cache_length):
        def program(images, token_ids):
            inputs = {"images": images, "token_ids": token_ids}
            return model.prefill(inputs, cache_length)[0]

        lowered = jax.jit(program).lower(np.zeros((1, 42, 42, 3)), np.ones((1, 4), "int32"))
        return lowered.cost_analysis()["flops"]

    assert num_operations(1000) < 1.01 * num_operations(20)


@pytest.mark.skipif(_backend.BACKEND == "torch", reason="torch runs eagerly: nothing is traced")
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_blocks_of_one_kind_are_traced_once(data, image, monkeypatch, quantize):
    """In prefill the last of 4 blocks is another kind: it computes less."""
    if _backend.BACKEND == "tensorflow" and not _backend._is_tf_on_cpu():
        pytest.skip("tensorflow compiles whole programs for a GPU")
    traced, method = [], GemmaBlock._finish

    @functools.wraps(method)
    def finish(self, x, *args):
        traced.append((self.name, tuple(x.shape)))
        return method(self, x, *args)

    monkeypatch.setattr(GemmaBlock, "_finish", finish)
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32", quantize=quantize)
    model.generate(image, "ocr", max_new_tokens=3)
    prefill = [("block_0", (1, 25, 40)), ("block_3", (1, 16, 40))]
    is_whole = _backend.BACKEND == "tensorflow" and quantize is None
    decode = [(f"block_{i}", (1, 1, 40)) for i in range(4 if is_whole else 1)]
    assert traced == prefill + decode


class Scale(keras.layers.Layer):
    """A user's own layer, whose attribute nobody else knows."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def call(self, x):
        return self.factor * x


def test_own_layers_in_blocks(data, image):
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32")
    for factor, block in enumerate(model.text.blocks):
        block._tracker.unlock()
        block.post_mlp_norm = Scale(factor / 4)
    inputs = model.preprocessor.for_generation([[image]], ["caption en"])
    token_ids, log_probs = greedy_reference(model, inputs, 6)
    answer = model.generate(image, "caption en", max_new_tokens=6, details=True)
    assert answer.token_ids.tolist() == token_ids.tolist()
    np.testing.assert_allclose(answer.log_probs, log_probs, atol=5e-4)


def test_blocks_of_several_kinds(data, image):
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32")
    blocks = model.text.blocks
    rng = np.random.default_rng(0)
    for block, alpha in zip(blocks, (1, 6, 6)):
        block.mlp.gate.enable_lora(2, alpha=alpha)
        for kernel in (block.mlp.gate.lora_kernel_a, block.mlp.gate.lora_kernel_b):
            kernel.assign(rng.normal(0, 0.3, kernel.shape))
    blocks[2].mlp.gate.merge_lora()
    blocks[3].mlp.gate.quantize("int8")
    model.vision.blocks[1].mlp.up.quantize("int4")
    inputs = model.preprocessor.for_generation([[image]], ["caption en"])
    token_ids, log_probs = greedy_reference(model, inputs, 6)
    answer = model.generate(image, "caption en", max_new_tokens=6, details=True)
    assert answer.token_ids.tolist() == token_ids.tolist()
    np.testing.assert_allclose(answer.log_probs, log_probs, atol=5e-4)


@pytest.mark.skipif(not _backend.IS_COMPILED, reason="torch runs eagerly: nothing is compiled")
def test_a_new_temperature_compiles_nothing(model, image):
    def generate(sampler):
        model.generate(image, "ocr", max_new_tokens=3, sampler=sampler)
        return list(model.programs.compilations)

    before = generate(Sample(0.5, top_k=3))
    assert generate(Sample(0.6, top_p=0.5)) == before


@pytest.mark.skipif(not _backend.IS_COMPILED, reason="torch runs eagerly: nothing is compiled")
def test_stream_and_generate_share_programs(data, image):
    model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", dtype="float32")
    model.generate(image, "ocr", max_new_tokens=9)
    before = list(model.programs.compilations)
    list(model.stream(image, "caption en", max_new_tokens=20))
    assert model.programs.compilations == before


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "must be a positive integer. Received: max_new_tokens=0"),
        ({"max_new_tokens": 2.5}, "`max_new_tokens`"),
        ({"batch_size": -1}, "`batch_size`"),
        ({"sampler": "nucleus"}, "`sampler` must be one of .*'top_p'.*Received: sampler='nucleus'"),
        ({"sampler": 3}, "`sampler`"),
        ({"sampler": Beam(10**6)}, "`num_beams` must be less than the vocabulary, .*=1000000"),
        ({"stop": ""}, "`stop`"),
        ({"stop": [3]}, "`stop`"),
        ({"stop": 5}, "`stop`"),
        ({"seed": -1}, "`seed` must be a non-negative integer"),
        ({"seed": "7"}, "`seed`"),
        ({"max_new_tokens": 9000}, "at most 8192 tokens .*Shorten the prompt"),
    ],
)
def test_bad_options(model, image, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(image, "ocr", **options)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (Sample, {"temperature": 0}),
        (Sample, {"temperature": float("nan")}),
        (Sample, {"temperature": 1e30}),
        (Sample, {"temperature": "1"}),
        (Sample, {"top_p": "1"}),
        (Sample, {"top_k": 0}),
        (Sample, {"top_k": 1.5}),
        (Sample, {"top_k": True}),
        (Sample, {"top_p": 0.0}),
        (Sample, {"top_p": 1.1}),
        (Beam, {"num_beams": 0}),
    ],
)
def test_bad_samplers(sampler, options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
        sampler(**options)


def test_samplers_of_numpy_integers():
    assert Sample(top_k=np.int64(5)) == Sample(top_k=5)
    assert Beam(np.int32(3)) == Beam(3)


def test_long_prompt(model, image):
    with pytest.raises(ValueError, match=r"at most 8192 tokens.*9 image tokens \+ \d+ tokens"):
        model.generate(image, "word " * 5000)
    with pytest.raises(ValueError, match=r"tokens.* \+ \d+ of the longest of `candidates`"):
        model.score(image, "ocr", ["word", "word " * 5000])


def test_bad_texts(model, image):
    with pytest.raises(ValueError, match=r"`prompts` must be a str or a list of str. Received: 3"):
        model.generate(image, 3)
    with pytest.raises(ValueError, match=r"a list of str. Received: None"):
        model.answer(image, None)
    for responses in (0, 3):
        with pytest.raises(ValueError, match=rf"`responses` must be .* Received: {responses}"):
            model.generate(image, "ocr", responses)


def test_bad_dicts(model, image):
    with pytest.raises(ValueError, match="'images' and 'prompts'"):
        model.generate({"image": image, "prompts": "ocr"})
    with pytest.raises(ValueError, match="not both"):
        model.generate({"images": image, "prompts": "ocr"}, "ocr")
    with pytest.raises(ValueError, match="`prompts` is missing"):
        model.generate(image)
    with pytest.raises(ValueError, match="Unknown: \\['mask'\\]"):
        model.generate({"images": image, "token_ids": np.ones((1, 3)), "mask": None})
    with pytest.raises(ValueError, match=r"\(B, 42, 42, 3\).*shape \(1, 50, 60, 3\)"):
        model.generate({"images": image[None], "token_ids": np.ones((1, 3))})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.full((1, 42, 42, 3), np.nan, "float32")}, "finite floats.*nan"),
        ({"images": np.full((1, 42, 42, 3), 255, "float32")}, r"in \[-1, 1\].*255"),
        ({"images": np.zeros((1, 42, 42, 3), "uint8")}, "dtype uint8"),
        ({"token_ids": np.ones((1, 0), int)}, r"at least one token.*shape \(1, 0\)"),
        ({"token_ids": np.full((1, 3), 1664)}, r"integers in \[0, 1664\).*1664"),
        ({"token_ids": np.ones((1, 3))}, "dtype float"),
        ({"padding_mask": np.zeros((1, 3), bool)}, "at least one real token"),
        ({"padding_mask": np.ones((1, 2), bool)}, r"`padding_mask` must be \(B, T\).*\(1, 2\)"),
        ({"token_ids": np.full((2, 3), 2)}, r"`token_ids` must be \(B, T\)"),
        ({"token_ids": [[2.0, 3.0]]}, "dtype float"),
    ],
)
def test_bad_tokenized_inputs(model, changes, message):
    inputs = {"images": np.zeros((1, 42, 42, 3), "float32"), "token_ids": np.full((1, 3), 2)}
    with pytest.raises(ValueError, match=message):
        model.generate(inputs | changes)


def test_stream_checks_at_once(model, image):
    with pytest.raises(ValueError, match="`max_new_tokens`"):
        model.stream(image, "ocr", max_new_tokens=0)


def test_empty_prompt_is_allowed(model, image):
    assert model.generate(image, "", max_new_tokens=2) is not None


# Compilation


@pytest.mark.skipif(_backend.BACKEND != "jax", reason="of jax")
def test_one_row_is_padded_on_a_gpu(model, image, monkeypatch):
    """Up to the last place of the cache."""
    # Lengths are rounded up: 16 of the prompt and 112 of the answer fill the cache.
    options = {"max_new_tokens": 112, "details": True}
    expected = model.generate(image, PROMPTS[0], **options)
    assert len(expected.token_ids) == 112
    shapes, extend = [], PaliGemma2.extend

    def counted(self, token_ids, cache, index):
        shapes.append(token_ids.shape)
        return extend(self, token_ids, cache, index)

    monkeypatch.setattr(PaliGemma2, "extend", counted)
    monkeypatch.setattr(model, "programs", _backend.Programs())
    monkeypatch.setattr(_backend, "has_jax_gpu", lambda: True)
    answer = model.generate(image, PROMPTS[0], **options)
    np.testing.assert_array_equal(answer.token_ids, expected.token_ids)
    np.testing.assert_allclose(answer.log_probs, expected.log_probs, atol=1e-4)
    model.generate([image] * 2, PROMPTS[:2], max_new_tokens=2)
    assert set(shapes) == {(1, 2), (2, 1)}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "quantize"), [("float32", None), ("bfloat16", "int4")])
def test_torch_compile(data, image, dtype, quantize):
    """The same answers; another length of the answer compiles nothing."""
    if _backend.BACKEND != "torch":
        pytest.skip("torch only: the others always compile")
    import torch

    folder = data / "hf_tiny_paligemma2"
    model = PaliGemma2.from_preset(folder, dtype=dtype, quantize=quantize)
    options = {"max_new_tokens": 12, "details": True}
    expected = model.generate(image, PROMPTS[0], **options)
    model.enable_torch_compile()
    compiled = model.generate(image, PROMPTS[0], **options)
    np.testing.assert_array_equal(compiled.token_ids, expected.token_ids)
    bound = 1e-4 if dtype == "float32" else 0.5
    np.testing.assert_allclose(compiled.log_probs, expected.log_probs, atol=bound)
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert count > 0
    assert torch.backends.mkldnn.enabled
    shorter = model.generate(image, PROMPTS[0], max_new_tokens=5, details=True)
    np.testing.assert_array_equal(shorter.token_ids, expected.token_ids[:5])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count
    model.enable_torch_compile(False)
    again = model.generate(image, PROMPTS[0], **options)
    np.testing.assert_array_equal(again.token_ids, expected.token_ids)


@pytest.mark.skipif(_backend.BACKEND != "jax", reason="of jax")
def test_compilation_cache(data, image, tmp_path):
    import jax

    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    try:
        folder = tmp_path / "programs"
        model = PaliGemma2.from_preset(data / "hf_tiny_paligemma2", compilation_cache=folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        model.generate(image, "ocr", max_new_tokens=3)
        assert any(folder.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        _backend.jax_cache.reset_cache()


@pytest.mark.slow  # with XLA's optimizations alone
def test_a_cache_of_one_row_stays_where_it_is():
    """XLA for CPUs would copy it four times for each token."""
    if _backend.BACKEND != "jax":
        pytest.skip("jax only: it shows the compiled program")
    import jax

    def step(state):
        x, index = state["x"], state["index"]
        key, value = (
            _backend.write(buffer, ops.swapaxes(x, 1, 2), index, axis=2)
            for buffer in state["cache"]
        )
        x = attention(x, key, value, logit_softcap=50.0)
        return {"x": x, "index": index + 1, "cache": [key, value]}

    def run(state):
        return _backend.loop(step, state, 5, lambda state: state["index"] > 100, 1)

    cache = [np.zeros((1, 4, 1024, 64), "float32")] * 2
    state = {"x": np.ones((1, 1, 4, 64), "float32"), "index": np.int32(0), "cache": cache}
    with jax.default_device(jax.devices("cpu")[0]):
        program = jax.jit(run).lower(state).compile().as_text()
    (body,) = re.findall(r" while\(.*body=%?([\w.-]+)", program)
    lines = re.search(rf"^%?{re.escape(body)} .*?^}}", program, re.DOTALL | re.MULTILINE)[0]
    assert "4,1024,64]" in lines
    assert not re.findall(r"4,1024,64\]\S* copy\(", lines)


def test_donated_memory_is_reused(run_in_program):
    """A cache stays where it is from call to call: a copy would take as much memory again."""
    if _backend.BACKEND == "tensorflow" and not _backend._is_tf_on_cpu():
        pytest.skip("needs a CPU: tensorflow tells no address of a GPU")

    def add(state, values):
        state["cache"] = [_backend.write(x, values, state["index"]) for x in state["cache"]]
        return state | {"index": state["index"] + values.shape[1]}

    def address(x):
        if _backend.BACKEND == "torch":
            return x.data_ptr()
        if _backend.BACKEND == "jax":
            return x.unsafe_buffer_pointer()
        x = x.read_value() if hasattr(x, "read_value") else x  # a variable
        return np.asarray(memoryview(x)).ctypes.data

    program = run_in_program(add, donate=True)
    state = {
        "cache": [ops.zeros((2, 4096)) for _ in range(2)],
        "index": ops.convert_to_tensor(5, "int32"),
    }
    expected = np.zeros((2, 4096), "float32")
    addresses = [address(x) for x in state["cache"]]
    for count in range(3):
        start = 5 + 2 * count
        expected[:, start : start + 2] = count
        state = program(state, ops.full((2, 2), count, "float32"))
        assert [address(x) for x in state["cache"]] == addresses
        for array in _backend.to_numpy(state["cache"]):
            np.testing.assert_array_equal(array, expected)
