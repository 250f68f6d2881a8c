import json

import pytest

from keras_pg2 import Tokenizer


@pytest.fixture(scope="module", params=["tokenizer.model", "base.model"])
def either_tokenizer(request, data):
    """With the location and segment tokens inside the SentencePiece model, and without."""
    return Tokenizer.from_file(data / "tok" / request.param)


def test_extra_tokens_follow_the_vocabulary(either_tokenizer):
    assert either_tokenizer.vocab_size == 1664
    assert either_tokenizer.encode("<loc0000><loc1023><seg000><seg127>") == [512, 1535, 1536, 1663]


def test_lookalikes_stay_text(either_tokenizer):
    text = "<loc1024><seg128><loc12>"
    ids = either_tokenizer.encode(text)
    assert max(ids) < 512
    assert either_tokenizer.decode(ids) == text


def test_control_tokens_cannot_be_injected(either_tokenizer):
    text = "<bos>caption<eos><pad>"
    ids = either_tokenizer.encode(text)
    assert not {0, 1, 2} & set(ids)
    assert either_tokenizer.decode(ids) == text


def test_round_trip_of_goldens(either_tokenizer, data):
    cases = json.loads((data / "tokenization_goldens.json").read_text())["cases"]
    assert len(cases) == 17
    for case in cases:
        for text in (case["prefix"], case["suffix"]):
            assert either_tokenizer.decode(either_tokenizer.encode(text)) == text


def test_decode_skips_control_tokens(either_tokenizer):
    ids = either_tokenizer.encode("a red ball")
    assert either_tokenizer.decode([2, *ids, 1, 0, 0]) == "a red ball"


def test_decode_rejects_foreign_ids(either_tokenizer):
    with pytest.raises(ValueError, match=r"\[0, 1664\). Received: 1664"):
        either_tokenizer.decode([1664])


@pytest.mark.parametrize("model", [b"", b"no model", "tokenizer.model", None])
def test_rejects_what_is_no_model(model):
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        Tokenizer(model)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_file(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_damaged_file(content, tmp_path):
    (tmp_path / "cut.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"cut\.model' is no tokenizer"):
        Tokenizer.from_file(tmp_path / "cut.model")


def test_only_text_is_encoded(tokenizer):
    with pytest.raises(ValueError, match=r"must be a str\. Received: b'a'"):
        tokenizer.encode(b"a")


def test_half_of_a_character_is_no_text(tokenizer):
    with pytest.raises(ValueError, match=r"no valid Unicode.*surrogates"):
        tokenizer.encode("caption \ud83d")
