"""A SentencePiece model rebuilt from Hugging Face's `tokenizer.json`.

The numbers of fields and types are those of SentencePiece's `src/sentencepiece_model.proto`.
"""

import json
import struct

_CONTROL_PIECES = ("<pad>", "<eos>", "<bos>")
_BYTE_PIECES = [f"<0x{i:02X}>" for i in range(256)]
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BPE = 2

_REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_MODEL_OPTIONS = {  # what SentencePiece does too; a missing field is None
    "type": ("BPE",),
    "byte_fallback": (True,),
    "ignore_merges": (False, None),
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
}


def sentencepiece_model(content):
    """Rebuilds `tokenizer.model` from `tokenizer.json`, as transformers wrote it for PaliGemma.

    Tokens after the last segment token, such as `<image>`, are left out.

    Args:
        content: bytes or str, the content of `tokenizer.json`.

    Returns:
        bytes, a serialized SentencePiece model that gives the same ids.

    Raises:
        ValueError: if it is no JSON, lacks fields, or describes another kind of tokenizer.
    """
    try:
        values = json.loads(content)
    except ValueError as error:
        raise ValueError(f"The tokenizer.json is no JSON; download it again. {error}") from error
    model = _field(values, "model", dict)
    for name, expected in _MODEL_OPTIONS.items():
        if model.get(name) not in expected:
            raise _error(f"`model.{name}` must be {expected[0]!r}", model.get(name))
    normalizer = _field(values, "normalizer", dict)
    if normalizer.get("normalizers", [normalizer]) != [_REPLACE_SPACES]:
        raise _error("`normalizer` must only replace spaces by '▁'", normalizer)
    splitter = values.get("pre_tokenizer")  # one that finds no spaces any more does nothing
    if splitter is not None and splitter.get("type") != "Split":
        raise _error("`pre_tokenizer` must be null or split at spaces", splitter)
    unknown = _field(model, "unk_token", str)
    added = {
        _field(token, "content", str): _field(token, "id", int)
        for token in _field(values, "added_tokens", list)
    }
    pieces = _pieces(_field(model, "vocab", dict), added)

    types = dict.fromkeys(pieces, _NORMAL)
    types |= {piece: _USER_DEFINED for piece in added if piece in types}
    types |= dict.fromkeys(_BYTE_PIECES, _BYTE)
    types |= dict.fromkeys(_CONTROL_PIECES, _CONTROL)
    types[unknown] = _UNKNOWN
    missing = set(types).difference(pieces)
    if missing:
        expected = "`model.vocab` must hold `model.unk_token`, <pad>, <eos>, <bos> and 256 bytes"
        raise _error(expected, f"no token {sorted(missing)}")
    scores = _scores(_field(model, "merges", list), types)
    return _serialize(pieces, types, scores, unknown)


def _error(expected, received):
    return ValueError(
        f"{expected}, as in PaliGemma's tokenizer.json. Use that file, or PaliGemma's "
        f"tokenizer.model. Received: {received!r:.200}"
    )


def _field(values, name, kind):
    if not isinstance(values, dict) or name not in values:
        raise _error(f"There must be a field `{name}`", values)
    if type(values[name]) is not kind:
        raise _error(f"`{name}` must be of type {kind.__name__}", values[name])
    return values[name]


def _pieces(vocab, added):
    """list of str, the pieces by id."""
    ids = dict(vocab)
    # transformers writes the tab where Gemma's vocabulary has the byte of the tab.
    if "\t" in ids and ids.get("<0x09>", ids["\t"]) == ids["\t"]:
        ids["<0x09>"] = ids.pop("\t")
    size = len(ids)
    ids |= added
    wrong = [(piece, id) for piece, id in ids.items() if type(id) is not int or id < 0]
    if wrong:
        raise _error("Ids must be integers from 0 on", wrong)
    size = ids.get("<seg127>", size - 1) + 1
    ids = {piece: id for piece, id in ids.items() if id < size}
    pieces = {id: piece for piece, id in ids.items()}
    if not len(pieces) == len(ids) == size:
        wrong = f"{len(ids)} tokens with {len(pieces)} different ids"
        raise _error(f"Each id in [0, {size}) must have one token", wrong)
    return [pieces[id] for id in range(size)]


def _scores(merges, types):
    """dict of normal piece to score: SentencePiece makes the piece of the highest score first."""
    scores, last = {}, None
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list) and [type(part) for part in pair] == [str, str]):
            raise _error("`model.merges` must hold pairs of pieces", merge)
        piece = "".join(pair)
        if piece not in types:
            raise _error("`model.merges` must make pieces of `model.vocab`", merge)
        if types[piece] != _NORMAL or piece == last:
            continue
        if piece in scores:  # a piece has one score, thus one place in the order
            raise _error("`model.merges` must list all ways to one piece in a row", merge)
        scores[piece] = -len(scores)
        last = piece
    # Pieces that no merge makes, mostly single characters, come last, in the order of ids.
    for piece, type_ in types.items():
        if type_ == _NORMAL:
            scores.setdefault(piece, -len(scores))
    return scores


def _serialize(pieces, types, scores, unknown):
    """A SentencePiece `ModelProto` in protobuf's wire format."""
    ids = {piece: pieces.index(piece) for piece in (unknown, *_CONTROL_PIECES)}
    pad, eos, bos = _CONTROL_PIECES
    trainer = (
        _integer(3, _BPE)
        + _integer(4, len(pieces))
        + _integer(35, True)  # byte_fallback
        + b"".join(_integer(40 + i, ids[piece]) for i, piece in enumerate((unknown, bos, eos, pad)))
        + b"".join(_string(45 + i, piece) for i, piece in enumerate((unknown, bos, eos, pad)))
    )
    normalizer = (
        _string(1, "identity")
        + _integer(3, False)  # add_dummy_prefix
        + _integer(4, False)  # remove_extra_whitespaces
        + _integer(5, True)  # escape_whitespaces
    )
    messages = [
        _message(1, _string(1, p) + _float(2, scores.get(p, 0)) + _integer(3, types[p]))
        for p in pieces
    ]
    return b"".join(messages) + _message(2, trainer) + _message(3, normalizer)


def _varint(value):
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def _integer(field, value):
    return _varint(field << 3) + _varint(value)


def _float(field, value):
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field, value):
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _string(field, value):
    return _message(field, value.encode())
