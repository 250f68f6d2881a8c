"""Text to token ids and back."""

import os
import re

import sentencepiece

from keras_pg2 import tokenizer_json

PAD_ID, EOS_ID, BOS_ID = 0, 1, 2
NUM_LOCATIONS, NUM_SEGMENTS = 1024, 128

_LOCATIONS = [f"<loc{i:04d}>" for i in range(NUM_LOCATIONS)]
_SEGMENTS = [f"<seg{i:03d}>" for i in range(NUM_SEGMENTS)]
_EXTRA_TOKENS = re.compile(r"(<loc(?:0\d{3}|10[01]\d|102[0-3])>|<seg(?:0\d{2}|1[01]\d|12[0-7])>)")


class Tokenizer:
    """Gemma's SentencePiece model with PaliGemma's 1,024 location and 128 segment tokens.

    Control tokens spelled out in a text (`<bos>`, `<eos>`, `<pad>`) stay text: users cannot
    inject them.

    Args:
        model: bytes, the serialized SentencePiece model (`tokenizer.model`), with or without
            the location and segment tokens; when absent they follow the last piece.

    Attributes:
        vocab_size: int, V.
        location_ids, segment_ids: lists of int, of `<loc0000>`, … and of `<seg000>`, ….

    Raises:
        ValueError: if `model` is no SentencePiece model, or one with other control ids.

    Example:
        >>> tokenizer = Tokenizer.from_file("tokenizer.model")
        >>> tokenizer.decode(tokenizer.encode("<loc0012> cat"))
        '<loc0012> cat'
    """

    def __init__(self, model):
        self.model = model
        try:
            if not isinstance(model, bytes) or not model:  # SentencePiece 0.2.1 crashes on these
                raise TypeError("it is empty, or not of bytes")
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                "`model` must be the bytes of a SentencePiece model (tokenizer.model). "
                f"Received: {type(model).__name__}, which could not be read: {error}"
            ) from error
        ids = (self._pieces.pad_id(), self._pieces.eos_id(), self._pieces.bos_id())
        if ids != (PAD_ID, EOS_ID, BOS_ID):
            raise ValueError(
                "`model` must be PaliGemma's tokenizer.model, with the ids pad=0, eos=1, bos=2. "
                f"Received: a model with pad={ids[0]}, eos={ids[1]}, bos={ids[2]}"
            )
        num_pieces = self._pieces.get_piece_size()
        first = self._pieces.piece_to_id(_LOCATIONS[0])
        self._first_extra = num_pieces if first == self._pieces.unk_id() else first
        extra = _LOCATIONS + _SEGMENTS
        self._extra_ids = {token: self._first_extra + i for i, token in enumerate(extra)}
        self._extra_tokens = {id: token for token, id in self._extra_ids.items()}
        self.vocab_size = max(num_pieces, self._first_extra + len(extra))
        ids = list(self._extra_tokens)
        self.location_ids, self.segment_ids = ids[:NUM_LOCATIONS], ids[NUM_LOCATIONS:]

    @property
    def model_with_extra_tokens(self):
        """The SentencePiece model with the location and segment tokens in it, as bytes."""
        if self._first_extra < self._pieces.get_piece_size():
            return self.model
        # A protocol buffer grows by appending: field 1 is a piece, with its text (1), score (2)
        # and type (3), here 4, user-defined.
        pieces = [token.encode() for token in _LOCATIONS + _SEGMENTS]
        fields = [b"\x0a%c%b\x15\0\0\0\0\x18\4" % (len(piece), piece) for piece in pieces]
        return self.model + b"".join(b"\x0a%c%b" % (len(field), field) for field in fields)

    @classmethod
    def from_file(cls, path):
        """Reads `tokenizer.model`, or Hugging Face's `tokenizer.json`.

        Args:
            path: path of either file, recognised by its content.

        Returns:
            Tokenizer.

        Raises:
            FileNotFoundError: if there is no file.
            ValueError: if it is neither, or has not PaliGemma's control ids.
        """
        with open(os.path.expanduser(path), "rb") as file:
            content = file.read()
        is_json = content.startswith((b"{", b"\xef\xbb\xbf{"))  # no SentencePiece model starts so
        try:
            return cls(tokenizer_json.sentencepiece_model(content) if is_json else content)
        except ValueError as error:
            raise ValueError(f"The file {os.fspath(path)!r} is no tokenizer: {error}") from error

    def encode(self, text):
        """Token ids of a text, without `<bos>` and `<eos>`.

        Args:
            text: str.

        Returns:
            list of int.

        Raises:
            ValueError: if it is no str, or has a lone surrogate, half of a character.
        """
        if not isinstance(text, str):
            raise ValueError(f"`text` must be a str. Received: {text!r:.80}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"The text is no valid Unicode: {error}") from error
        # The extra tokens cut the text, as user-defined symbols do inside SentencePiece.
        ids = []
        for part in _EXTRA_TOKENS.split(text):
            if part in self._extra_ids:
                ids.append(self._extra_ids[part])
            else:
                ids.extend(self._pieces.encode(part))
        return ids

    def decode(self, ids):
        """Text of token ids; `<pad>`, `<bos>` and `<eos>` give nothing.

        Args:
            ids: iterable of int.

        Returns:
            str.

        Raises:
            ValueError: if an id is outside the vocabulary.
        """
        text, pieces = [], []
        for id in map(int, ids):
            if not 0 <= id < self.vocab_size:
                raise ValueError(f"Token ids must be in [0, {self.vocab_size}). Received: {id}")
            if id in self._extra_tokens:
                text += [self._pieces.decode(pieces), self._extra_tokens[id]]
                pieces = []
            elif id not in (PAD_ID, EOS_ID, BOS_ID):
                pieces.append(id)
        return "".join(text) + self._pieces.decode(pieces)
