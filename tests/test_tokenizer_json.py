import json
import random
import struct

import pytest

from keras_pg2 import Tokenizer
from keras_pg2.tokenizer_json import sentencepiece_model

LOOKALIKES = ["<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<image>", "<0x41>", "<loc1024>"]
PARTS = [
    *LOOKALIKES,
    *["<loc0000>", "<loc1023>", "<seg000>", "<seg127>", "<loc", "12>", "▁", "▁▁", "<"],
    *[" ", "  ", "   ", "\n", "\n\n", "\n\n\n", "\t", "\t\t", "\r\n", "\0", "\xa0", "\u3000"],
    *["0", "7", "1234", "3.14", "the ", "and", "ing", "caption en", "a red ball", ";", "--", "---"],
    *["é", "e\u0301", "ß", "ﬁ", "Ω", "日本", "мир", "नमस्ते", "🙂", "👩\u200d🚀", "\ufffd", "\u202e"],
]


@pytest.fixture(scope="module")
def values(data):
    return json.loads((data / "hf_tiny_paligemma2" / "tokenizer.json").read_text())


@pytest.fixture
def changed(values):
    """A copy to change."""
    return json.loads(json.dumps(values))


@pytest.fixture(scope="module")
def rebuilt(data):
    return Tokenizer.from_file(data / "hf_tiny_paligemma2" / "tokenizer.json")


def _tokenizer(values):
    return Tokenizer(sentencepiece_model(json.dumps(values)))


def _random_texts(count):
    rng = random.Random(0)
    for _ in range(count):
        letters = [chr(rng.choice([rng.randrange(32, 127), rng.randrange(160, 0xD800)]))] * 2
        yield "".join(rng.choices([*PARTS, *letters], k=rng.randrange(1, 20)))


def _pieces(model):
    """The pieces of a SentencePiece model, each as its bytes: text, score and type."""
    pieces, start = [], 0
    while model[start] == 0x0A:
        assert model[start + 1] < 0x80
        end = start + 2 + model[start + 1]
        pieces.append(model[start + 2 : end])
        start = end
    return pieces


def test_pieces_scores_and_types_are_those_of_the_model(rebuilt, tokenizer):
    expected = _pieces(tokenizer.model)
    score = struct.pack("<f", 0)
    negative_zero = struct.pack("<f", -0.0)

    def canonical(piece):  # the type NORMAL may be left out
        return piece.replace(negative_zero, score).removesuffix(b"\x18\x01")

    assert len(expected) == 1664
    assert [canonical(p) for p in _pieces(rebuilt.model)] == [canonical(p) for p in expected]


def test_goldens(rebuilt, tokenizer, data):
    cases = json.loads((data / "tokenization_goldens.json").read_text())["cases"]
    assert len(cases) == 17
    for case in cases:
        for text in (case["prefix"], case["suffix"]):
            ids = rebuilt.encode(text)
            assert ids == tokenizer.encode(text)
            assert rebuilt.decode(ids) == tokenizer.decode(ids) == text


def test_random_texts(rebuilt, tokenizer):
    assert rebuilt.vocab_size == tokenizer.vocab_size == 1664
    for text in _random_texts(500):
        ids = rebuilt.encode(text)
        assert ids == tokenizer.encode(text), text
        assert rebuilt.decode(ids) == tokenizer.decode(ids), text


def test_random_ids(rebuilt, tokenizer):
    rng = random.Random(1)
    for _ in range(200):
        ids = rng.choices(range(1664), k=12)
        assert rebuilt.decode(ids) == tokenizer.decode(ids)


def test_merges_as_strings(changed, rebuilt):
    changed["model"]["merges"] = [" ".join(pair) for pair in changed["model"]["merges"]]
    assert _tokenizer(changed).model == rebuilt.model


def test_merges_decide_the_order(changed, rebuilt):
    """Not the ids: "re" goes before "or" once the merge of "or" is the last."""
    vocab, merges = changed["model"]["vocab"], changed["model"]["merges"]
    assert rebuilt.encode("ore") == [vocab["or"], vocab["e"]]
    merges.remove(["o", "r"])
    merges.append(["o", "r"])
    assert _tokenizer(changed).encode("ore") == [vocab["o"], vocab["re"]]


@pytest.mark.parametrize("keeps_byte", [False, True])
def test_tab_in_place_of_its_byte(changed, keeps_byte):
    """transformers writes so for Gemma's vocabulary, which unlike the tiny one has no tab."""
    vocab = changed["model"]["vocab"]
    token = next(token for token in changed["added_tokens"] if token["content"] == "\t")
    token["content"] = "another"
    vocab["another"] = vocab.pop("\t")
    expected = _tokenizer(changed)
    assert expected.encode("\t") == [vocab["<0x09>"]]
    vocab["\t"] = vocab["<0x09>"] if keeps_byte else vocab.pop("<0x09>")
    assert _tokenizer(changed).model == expected.model


def test_extra_tokens_outside_of_the_vocabulary(changed, rebuilt):
    vocab = changed["model"]["vocab"]
    changed["model"]["vocab"] = {piece: id for piece, id in vocab.items() if id < 512}
    assert _tokenizer(changed).model == rebuilt.model


def test_tokens_after_the_last_segment_are_left_out(changed, rebuilt):
    assert {"id": 1664, "content": "<image>"}.items() <= changed["added_tokens"][-1].items()
    changed["added_tokens"].append({"id": 1665, "content": "<mine>"})
    changed["model"]["vocab"]["<image>"] = 1664
    assert _tokenizer(changed).model == rebuilt.model


def test_other_ways_to_split(changed, rebuilt):
    changed["pre_tokenizer"] = None
    assert sentencepiece_model(json.dumps(changed)) == rebuilt.model
    changed["pre_tokenizer"] = {"type": "Metaspace", "prepend_scheme": "always"}
    with pytest.raises(ValueError, match="`pre_tokenizer` must be null or split at spaces"):
        sentencepiece_model(json.dumps(changed))


@pytest.mark.parametrize("normalizers", [1, 0, 2])
def test_normalizer(changed, rebuilt, normalizers):
    sequence = [changed["normalizer"]] * normalizers
    changed["normalizer"] = {"type": "Sequence", "normalizers": sequence}
    if normalizers == 1:
        assert _tokenizer(changed).model == rebuilt.model
    else:
        with pytest.raises(ValueError, match="`normalizer` must only replace spaces"):
            _tokenizer(changed)


@pytest.mark.parametrize("content", [b"{", b'{"model": }', b"{\xff}"])
def test_no_json(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is no JSON"):
        Tokenizer.from_file(path)


@pytest.mark.parametrize("name", ["model", "normalizer", "added_tokens"])
@pytest.mark.parametrize("value", [None, "text", ...])
def test_missing_fields(changed, name, value):
    changed[name] = value
    if value is ...:
        del changed[name]
    with pytest.raises(ValueError, match=rf"`{name}`.*\. Received: "):
        _tokenizer(changed)


@pytest.mark.parametrize("name", ["unk_token", "vocab", "merges"])
def test_missing_fields_of_the_model(changed, name):
    del changed["model"][name]
    with pytest.raises(ValueError, match=f"There must be a field `{name}`"):
        _tokenizer(changed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("type", "Unigram"),
        ("type", None),
        ("byte_fallback", False),
        ("ignore_merges", True),
        ("dropout", 0.1),
        ("continuing_subword_prefix", "##"),
        ("end_of_word_suffix", "</w>"),
    ],
)
def test_other_kinds_of_models(changed, name, value):
    changed["model"][name] = value
    with pytest.raises(ValueError, match=rf"`model\.{name}` must be .* Received: .*{value}"):
        _tokenizer(changed)


@pytest.mark.parametrize("piece", ["<pad>", "<eos>", "<bos>", "<unk>", "<0x00>", "<0xFF>"])
def test_missing_pieces(changed, piece):
    vocab = changed["model"]["vocab"]
    vocab["another"] = vocab.pop(piece)
    changed["added_tokens"] = [t for t in changed["added_tokens"] if t["content"] != piece]
    with pytest.raises(ValueError, match=f"no token .*{piece}"):
        _tokenizer(changed)


@pytest.mark.parametrize("id", [1663, 1, "7", -1, None, [7], 2.0])
def test_wrong_ids(changed, id):
    changed["model"]["vocab"]["the"] = id
    with pytest.raises(ValueError, match=r"Ids must be integers|must have one token"):
        _tokenizer(changed)


def test_gaps(changed):
    del changed["model"]["vocab"]["on"]
    with pytest.raises(ValueError, match=r"Each id in \[0, 1664\) .*1663 tokens"):
        _tokenizer(changed)


@pytest.mark.parametrize("merge", ["in", "i n g", ["i"], ["i", 1], 5, None, {"i": "n"}])
def test_wrong_merges(changed, merge):
    changed["model"]["merges"].append(merge)
    with pytest.raises(ValueError, match="must hold pairs of pieces"):
        _tokenizer(changed)


def test_merges_outside_of_the_vocabulary(changed):
    changed["model"]["merges"].append(["q", "q"])
    with pytest.raises(ValueError, match="must make pieces of"):
        _tokenizer(changed)


def test_merges_that_sentencepiece_cannot_order(changed):
    changed["model"]["merges"].append(["i", "n"])
    with pytest.raises(ValueError, match="all ways to one piece in a row"):
        _tokenizer(changed)


def test_other_control_ids(changed):
    for token in changed["added_tokens"][1:3]:  # as Llama has them
        token["id"] = changed["model"]["vocab"][token["content"]] = 3 - token["id"]
    with pytest.raises(ValueError, match="pad=0, eos=2, bos=1"):
        _tokenizer(changed)
