"""The token loop: prefill once, then decode one token at a time on the device.

The loop's state is a dict of tensors. `_prefill` makes it, `_advance` extends it by up to n tokens
and stops early when every row is done. `generate` advances by all tokens at once, `stream` by a
few, so both run the same compiled program.
"""

import dataclasses
import functools
import math
import numbers
import time

import numpy as np
from keras import ops, tree

from keras_pg2 import _backend
from keras_pg2.config import check_positive
from keras_pg2.preprocessing import align_right, check_tokenized
from keras_pg2.tokenizer import EOS_ID, PAD_ID

_TEXT_INPUTS = ("token_ids", "padding_mask", "suffix_mask")
_NEVER = -1e30  # log-probability of what must not be chosen; finite, so that sums stay finite
_BUCKETS = (16, *(2**n for n in range(6, 31)))  # lengths of text; most prompts fit in the first
_CACHE_MULTIPLE = 128
_GRAMMAR_MULTIPLE = 64
_SUFFIX_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most likely token at each step."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A random token at each step. The filters apply in the order of the arguments.

    The random numbers come from NumPy, one stream per example: a seed draws the same ones on
    every backend and with every batch size, so that in one dtype the text is the same, rounding
    aside.

    Args:
        temperature: float, divides the logits; below 1 is closer to greedy.
        top_k: int or None, only the k most likely tokens are kept.
        top_p: float or None, only the most likely tokens that together reach the
            probability `top_p` are kept.

    Raises:
        ValueError: if an argument is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        is_number = isinstance(self.temperature, numbers.Real)
        if not is_number or not 1e-6 <= self.temperature <= 1e6:
            raise ValueError(
                "`temperature` must be in [1e-6, 1e6]; for the most likely token use "
                f"`sampler='greedy'`. Received: temperature={self.temperature!r}"
            )
        if self.top_k is not None:
            check_positive(top_k=self.top_k)
        is_number = isinstance(self.top_p, numbers.Real)
        if self.top_p is not None and not (is_number and 0 < self.top_p <= 1):
            raise ValueError(f"`top_p` must be in (0, 1] or None. Received: top_p={self.top_p!r}")


@dataclasses.dataclass(frozen=True)
class Beam:
    """Beam search for the answer of the highest log-probability, without length penalty.

    Only answers that end within `max_new_tokens` count, so that a low limit favours short ones.

    Args:
        num_beams: int, unfinished answers kept at each step.

    Raises:
        ValueError: if `num_beams` is no positive integer.

    Source: big_vision `trainers/proj/paligemma/predict_fns.py`, `_beam_sample_output`.
    """

    num_beams: int = 4

    def __post_init__(self):
        check_positive(num_beams=self.num_beams)


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generated answer.

    Attributes:
        text: str, without prompt and control tokens; "" if the model has no preprocessor.
        token_ids: int32 (n,), up to and including `<eos>` if it was reached.
        log_probs: float32 (n,), natural logarithm of the probability that the model gave to
            each token, before temperature and filters; None with a keras_hub sampler.
    """

    text: str
    token_ids: np.ndarray
    log_probs: np.ndarray | None


class Grammar:
    """The tokens that may follow each other, as a table of states.

    It begins without a state. What is not allowed is forbidden; in each state that can be reached
    something must be allowed.

    Args:
        vocab_size: int, of the tokenizer.

    Attributes:
        starts: list of int, the state in which all examples begin, or each of them.
        must_grow: list of int, states whose token must have a greater id than the one two
            before it.
    """

    def __init__(self, vocab_size):
        self.starts, self.must_grow = [], []
        self._classes = np.zeros(vocab_size, "int32")  # of tokens; 0 is never allowed
        self._num_classes = 1
        self._next = []  # of each state: dict of class to state

    def add_class(self, token_ids):
        """Makes tokens interchangeable. Returns the number of their class.

        Raises:
            ValueError: if one of them is in a class already, or outside of the vocabulary.
        """
        ids = np.array(token_ids, "int32", ndmin=1)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self._classes)):
            raise ValueError(
                f"`token_ids` must be in [0, {len(self._classes)}). Received: {ids.min()} to "
                f"{ids.max()}"
            )
        if known := ids[self._classes[ids] > 0].tolist():
            raise ValueError(f"Tokens are in one class at most. In another are {known[:9]}")
        self._classes[ids] = self._num_classes
        self._num_classes += 1
        return self._num_classes - 1

    def add_state(self):
        """Returns the number of a new state, in which nothing is allowed yet."""
        self._next.append({})
        return len(self._next) - 1

    def allow(self, state, token_class, then):
        """Allows tokens of a class in a state; the state `then` follows."""
        self._next[state][token_class] = then

    def allow_tokens(self, state, token_ids):
        """Allows a sequence of tokens. Returns the state after it.

        Raises:
            ValueError: if one of them is interchangeable with others.
        """
        for id in token_ids:
            token_class = int(self._classes[id]) or self.add_class([id])
            if (self._classes == token_class).sum() > 1:
                raise ValueError(f"Token {id} is interchangeable with others: it is in a class.")
            if token_class not in self._next[state]:
                self.allow(state, token_class, self.add_state())
            state = self._next[state][token_class]
        return state

    def tables(self, vocab_size):
        """The grammar as arrays, rounded up in size, so that few programs are compiled.

        Returns:
            dict of "classes" int32 (vocab_size,), "next" int32 (states, classes), -1 where nothing
            is allowed, and "must_grow" bool (states,).

        Raises:
            ValueError: if the grammar is of a larger vocabulary, or some state does not exist or
                allows nothing.
        """
        if len(self._classes) > vocab_size:
            raise ValueError(
                f"The grammar has {len(self._classes)} tokens, but the model only {vocab_size}."
            )
        named = [*self.starts, *self.must_grow, *(x for then in self._next for x in then.values())]
        if unknown := set(named) - set(range(len(self._next))):
            raise ValueError(
                f"The grammar has no states {sorted(unknown)}: call `add_state` first."
            )
        if stuck := [state for state, then in enumerate(self._next) if not then]:
            raise ValueError(f"In the states {stuck[:9]} of the grammar nothing is allowed.")
        num_states = -(-len(self._next) // _GRAMMAR_MULTIPLE) * _GRAMMAR_MULTIPLE
        num_classes = -(-self._num_classes // _GRAMMAR_MULTIPLE) * _GRAMMAR_MULTIPLE
        table = np.full((num_states, num_classes), -1, "int32")
        for state, then in enumerate(self._next):
            table[state, list(then)] = list(then.values())
        must_grow = np.zeros(num_states, bool)
        must_grow[self.must_grow] = True
        classes = np.pad(self._classes, (0, vocab_size - len(self._classes)))
        return {"classes": classes, "next": table, "must_grow": must_grow}


SAMPLERS = {
    "greedy": Greedy(),
    "random": Sample(),
    "top_k": Sample(top_k=40),
    "top_p": Sample(top_p=0.9),
    "beam": Beam(),
}


def get_sampler(sampler):
    """A sampler from its name.

    Args:
        sampler: one of the names in `SAMPLERS`; `Greedy`, `Sample` or `Beam`; or a
            `keras_hub.samplers.Sampler`.

    Returns:
        Greedy, Sample, Beam or `keras_hub.samplers.Sampler`.

    Raises:
        ValueError: if it is none of these, or wants all beams.
    """
    if isinstance(sampler, str) and sampler in SAMPLERS:
        return SAMPLERS[sampler]
    if getattr(sampler, "return_all_beams", False):
        raise ValueError(
            "Of a keras_hub sampler's beams only the best is wanted: leave out `return_all_beams`."
        )
    if isinstance(sampler, (Greedy, Sample, Beam)) or _is_keras_hub(sampler):
        return sampler
    raise ValueError(
        f"`sampler` must be one of {sorted(SAMPLERS)}, a `Greedy`, `Sample` or `Beam` object, or "
        f"a `keras_hub.samplers.Sampler`. Received: sampler={sampler!r}"
    )


def _is_keras_hub(sampler):
    is_sampler = hasattr(sampler, "get_next_token") and hasattr(sampler, "compute_probabilities")
    return is_sampler and not isinstance(sampler, type)


def row_seeds(seed, count):
    """One independent seed for each of the next `count` examples, see `seed_sequence`."""
    return seed_sequence(seed).spawn(count)


def seed_sequence(seed):
    """A `numpy.random.SeedSequence` from an int, None or another, which stays what it is.

    Raises:
        ValueError: if `seed` is something else, or negative.
    """
    if isinstance(seed, np.random.SeedSequence):
        return seed
    if seed is not None and (not isinstance(seed, (int, np.integer)) or seed < 0):
        raise ValueError(f"`seed` must be a non-negative integer or None. Received: seed={seed!r}")
    return np.random.SeedSequence(seed)


def token_steps(
    model, inputs, sampler, max_new_tokens, seeds, num_steps, grammar=None, starts=None
):
    """Generates tokens for one batch, some at a time.

    Args:
        model: PaliGemma2.
        inputs: dict of "images" float (B, M, I, I, 3) or "image_tokens" float (B, M · P, D), and
            "token_ids" int (B, T), "padding_mask" and "suffix_mask" bool (B, T), padding first.
        sampler: see `get_sampler`.
        max_new_tokens: int.
        seeds: list of B seeds, see `row_seeds`.
        num_steps: callable without arguments, how many tokens to generate next; its value
            may change from call to call.
        grammar: Grammar or None, what may be generated.
        starts: list of B int, the state of the grammar in which each row begins.

    Yields:
        token_ids: int32 (B, n), all new tokens so far, `<pad>` after a row's end.
        log_probs: float32 (B, n), or None with a keras_hub sampler.

    The caller sends a bool (B,) array back, the rows that it declares done.
    """
    inputs, cache_length, buffer_length = _pad_to_buckets(model, inputs, max_new_tokens)
    inputs = _backend.to_tensors(inputs)
    if _is_keras_hub(sampler):
        if grammar is not None:
            raise ValueError("A keras_hub sampler takes no grammar, nor `constrained=True`.")
        yield _keras_hub_tokens(model, inputs, sampler, cache_length, max_new_tokens), None
        return
    choice, method, is_beam = {}, sampler, isinstance(sampler, Beam)
    if isinstance(sampler, Sample):
        choice = _sample_inputs(sampler, seeds, buffer_length, model.config.text.vocab_size)
        method = "filtered" if sampler.top_k or sampler.top_p else "random"
    if grammar is not None:
        choice["grammar"] = grammar.tables(model.config.text.vocab_size)
        choice["place"] = np.array(starts, "int32")
    name = ("prefill", method, cache_length, buffer_length, grammar is not None)
    start = functools.partial(_prefill, model, method, cache_length, buffer_length)
    prefill = model.programs.get(model, name, start, in_parts=True, record=True)
    advance = model.programs.get(
        model,
        ("decode", method, grammar is not None),
        lambda state, limit: _advance(model, method, state, limit),
        donate=True,
        # With int4 a token takes long anyway, and memory counts.
        in_parts=getattr(model.text.embedding.quantized, "mode", None) == "int4",
    )
    state = prefill(inputs, _backend.to_tensors(choice))
    names = ("best_tokens", "best_log_probs") if is_beam else ("tokens", "log_probs")
    while True:
        outputs = [state[name] for name in (*names, "count", "done")]
        tokens, log_probs, count, done = _backend.to_numpy(outputs)
        stopped = yield tokens[:, :count], log_probs[:, :count]
        if not is_beam:  # beam search may still find a better answer than one that ended
            done = done | stopped
        if count >= max_new_tokens or done.all():
            return
        limit = min(count + num_steps(), max_new_tokens)
        state["done"], limit = _backend.to_tensors([done, np.int32(limit)])
        state = advance(state, limit)


def _sample_inputs(sampler, seeds, length, vocab_size):
    """Numbers that are inputs of the programs, so that a new temperature compiles nothing."""
    streams = [np.random.default_rng(seed) for seed in seeds]
    return {
        "uniforms": np.stack([1 - rng.random(length, "float32") for rng in streams]),
        "temperature": np.float32(sampler.temperature),
        "top_k": np.int32(min(sampler.top_k or vocab_size, vocab_size)),
        "top_p": np.float32(sampler.top_p or 1),
    }


def _pad_to_buckets(model, inputs, num_added, added_by="`max_new_tokens`"):
    """Inputs, cache and buffer length; rounded up if programs are compiled or recorded."""
    num_image_tokens = model.num_image_tokens(inputs)
    length = inputs["token_ids"].shape[1]
    limit = model.config.text.max_positions
    if num_image_tokens + length + num_added > limit:
        raise ValueError(
            f"The model reads at most {limit} tokens (`max_positions`). Received: "
            f"{num_image_tokens} image tokens + {length} tokens of text in the longest of "
            f"`prompts` + {num_added} of {added_by}. Shorten the prompt, or lower that number."
        )
    total = length + num_added
    is_compiled = _backend.IS_COMPILED or model.programs.compile_steps or _backend.has_torch_gpu()
    if is_compiled:
        length = next(bucket for bucket in _BUCKETS if length <= bucket)
        total = math.ceil((length + num_added) / _CACHE_MULTIPLE) * _CACHE_MULTIPLE
    added = ((0, 0), (length - inputs["token_ids"].shape[1], 0))
    inputs = inputs | {x: np.pad(inputs[x], added) for x in _TEXT_INPUTS if x in inputs}
    return inputs, num_image_tokens + total, total if is_compiled else num_added


# The loop -----------------------------------------------------------------------------------


def _prefill(model, method, cache_length, buffer_length, inputs, choice):
    """Runs the prefix and chooses the first token; `choice` is what `method` needs to choose."""
    logits, _, cache = model.prefill(inputs, cache_length)
    batch_size, length = logits.shape[0], inputs["token_ids"].shape[1]
    state = {
        "cache": cache,
        "index": ops.zeros((), "int32") + (model.num_image_tokens(inputs) + length),
        "count": ops.zeros((), "int32"),
        "done": ops.zeros((batch_size,), "bool"),
        "tokens": ops.zeros((batch_size, buffer_length), "int32") + PAD_ID,  # `ops.full` waits
        "log_probs": ops.zeros((batch_size, buffer_length), "float32"),
        **choice,
    }
    if "grammar" in state:
        state["recent"] = ops.zeros((batch_size, 2), "int32")
    if isinstance(method, Beam):
        state, logits = _as_beams(state, logits, method.num_beams)
    return _choose(method, state, logits)


def _as_beams(state, logits, beams):
    """The state and logits of single rows, of which beam search makes many."""
    batch_size, length = state["tokens"].shape
    scores = ops.zeros((batch_size, beams), "float32")
    is_later = ops.zeros_like(scores, "int32") + ops.arange(beams, dtype="int32") > 0
    names = {"place", "recent"} & set(state)
    rows = {name: ops.repeat(state[name], beams, axis=0) for name in names}
    return {
        **state,
        **rows,
        "cache": _repeat_cache(state["cache"], beams),
        "tokens": ops.zeros((batch_size, beams, length), "int32") + PAD_ID,
        "log_probs": ops.zeros((batch_size, beams, length), "float32"),
        "scores": _backend.masked_fill(scores, is_later, _NEVER),
        "best_tokens": state["tokens"],
        "best_log_probs": state["log_probs"],
        "best_score": ops.zeros((batch_size,), "float32") + 2 * _NEVER,
    }, ops.repeat(logits, beams, axis=0)


def _advance(model, method, state, limit):
    """Decodes until `limit` tokens are there or all rows are done."""
    num_rows = state["done"].shape[0] * (method.num_beams if isinstance(method, Beam) else 1)
    is_quantized = model.text.embedding.quantized is not None
    pads = num_rows == 1 and _backend.has_jax_gpu() and not is_quantized

    def step(state):
        token, index, cache = (state[name] for name in ("token", "index", "cache"))
        if pads:
            # XLA for GPUs makes slow products of one row, and several kernels of its norms. So a
            # second token follows, over which the next step writes; the cache has room for it,
            # since an answer's last token is never read.
            hidden, cache = model.extend(ops.stack([token, token], axis=1), cache, index)
            logits = model.text.logits(hidden[:, 0])
        else:
            logits, _, cache = model.decode(token, cache, index)
        return _choose(method, state | {"cache": cache, "index": index + 1}, logits)

    max_steps = limit - state["count"]
    return _backend.loop(step, state, max_steps, lambda state: ops.all(state["done"]), num_rows)


def _choose(method, state, logits):
    """Appends one token to each row, given its logits float32 (B, V)."""
    log_probs = ops.log_softmax(logits, axis=-1)
    if "grammar" in state:
        allowed = _allowed(state, logits.shape[-1])
        logits = _backend.masked_fill(logits, ops.logical_not(allowed), _NEVER)
    if isinstance(method, Beam):
        if "grammar" in state:
            log_probs = _backend.masked_fill(log_probs, ops.logical_not(allowed), _NEVER)
        return _choose_beams(method, state, log_probs)
    if method in ("random", "filtered"):
        logits = logits / state["temperature"]
        if method == "filtered":
            logits = _filter(logits, state["top_k"], state["top_p"])
        token = _sample(logits, ops.take(state["uniforms"], state["count"], axis=1))
    else:
        token = ops.cast(ops.argmax(logits, axis=-1), "int32")
    done = state["done"]
    log_prob = ops.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
    log_prob = _backend.masked_fill(log_prob, done, 0.0)
    token = _backend.masked_fill(token, done, PAD_ID)
    if "grammar" in state:
        state = _follow_grammar(state, token)
    return state | {
        "token": token,
        "tokens": _backend.write(state["tokens"], token[:, None], state["count"]),
        "log_probs": _backend.write(state["log_probs"], log_prob[:, None], state["count"]),
        "count": state["count"] + 1,
        "done": ops.logical_or(done, token == EOS_ID),
    }


def _allowed(state, vocab_size):
    """bool (rows, V), the tokens that the grammar allows next."""
    grammar, place = state["grammar"], state["place"]
    then = ops.take(ops.take(grammar["next"], place, axis=0), grammar["classes"], axis=1)
    is_greater = ops.arange(vocab_size, dtype="int32") > state["recent"][:, :1]
    may_shrink = ops.logical_not(ops.take(grammar["must_grow"], place, axis=0))
    return ops.logical_and(then >= 0, ops.logical_or(is_greater, may_shrink[:, None]))


def _follow_grammar(state, token):
    """The state with the rows' places in the grammar after a token int32 (rows,)."""
    grammar = state["grammar"]
    token_class = ops.take(grammar["classes"], token, axis=0)
    then = ops.take(grammar["next"], state["place"], axis=0)
    then = ops.take_along_axis(then, token_class[:, None], axis=1)[:, 0]
    return state | {
        "place": _backend.masked_fill(then, then < 0, 0),  # rows that are done stay anywhere
        "recent": ops.stack([state["recent"][:, 1], token], axis=1),
    }


def _filter(logits, top_k, top_p):
    """Rules out all but the most likely tokens: `top_k` ≤ V, then those that reach `top_p`."""
    ordered = ops.flip(ops.sort(logits, axis=-1), axis=-1)
    lowest = ops.take(ordered, top_k - 1, axis=-1)[:, None]
    ordered = _backend.masked_fill(ordered, ordered < lowest, _NEVER)
    cumulative = ops.cumsum(ops.softmax(ordered, axis=-1), axis=-1)
    last = ops.sum(ops.cast(cumulative[:, :-1] < top_p, "int32"), axis=-1, keepdims=True)
    lowest = ops.maximum(lowest, ops.take_along_axis(ordered, last, axis=-1))
    return _backend.masked_fill(logits, logits < lowest, _NEVER)


def _sample(logits, uniform):
    """Token ids int32 (B,) at the quantile `uniform` float32 (B,) in (0, 1]."""
    probs = ops.softmax(logits, axis=-1)
    cumulative = ops.cumsum(probs, axis=-1)
    # XLA's sums may rise a little where nothing is added, even past the sum of all. So a token has
    # a probability, and the target is below the sum at the last that has one.
    cumulative = _backend.masked_fill(cumulative, probs <= 0, 0)
    target = uniform[:, None] * ops.max(cumulative, axis=-1, keepdims=True)
    return ops.cast(ops.argmax(ops.cast(cumulative >= target, "int32"), axis=-1), "int32")


def _choose_beams(sampler, state, log_probs):
    """One step of beam search over log-probabilities float32 (B · beams, V)."""
    beams = sampler.num_beams
    count, scores = state["count"], state["scores"]
    batch_size = scores.shape[0]
    log_probs = ops.reshape(log_probs, (batch_size, beams, -1))
    best = _best_ended(state, log_probs[:, :, EOS_ID])

    # Extend each by its most likely tokens other than `<eos>` and keep the best.
    top_log_probs, top_tokens = ops.top_k(log_probs, beams + 1)
    candidates = _backend.masked_fill(top_log_probs, top_tokens == EOS_ID, _NEVER)
    candidates = candidates + scores[:, :, None]
    scores, chosen = ops.top_k(ops.reshape(candidates, (batch_size, -1)), beams)
    chosen = ops.cast(chosen, "int32")
    parent = chosen // (beams + 1)

    def pick(candidates):
        candidates = ops.reshape(candidates, (batch_size, -1))
        return ops.reshape(ops.take_along_axis(candidates, chosen, axis=-1), (-1,))

    token = ops.cast(pick(top_tokens), "int32")
    rows = ops.reshape(parent + ops.arange(batch_size, dtype="int32")[:, None] * beams, (-1,))

    def extend(array, values):
        array = ops.reshape(_take_beams(array, parent), (batch_size * beams, -1))
        array = _backend.write(array, values[:, None], count)
        return ops.reshape(array, (batch_size, beams, -1))

    extended = {
        "tokens": extend(state["tokens"], token),
        "log_probs": extend(state["log_probs"], pick(top_log_probs)),
    }
    if "grammar" in state:
        for name in ("place", "recent"):
            state = state | {name: ops.take(state[name], rows, axis=0)}
        # While the grammar allowed no end, the best beam stands in.
        is_open = (best["best_score"] < _NEVER / 2)[:, None]
        for name, array in extended.items():
            best[f"best_{name}"] = ops.where(is_open, array[:, 0], best[f"best_{name}"])
        state = _follow_grammar(state, token)
    return state | {
        "cache": tree.map_structure(lambda array: ops.take(array, rows, axis=0), state["cache"]),
        "token": token,
        **extended,
        "scores": scores,
        **best,
        "count": count + 1,
        # Scores only fall, so an unfinished answer below the best finished one cannot win.
        "done": ops.logical_or(state["done"], scores[:, 0] < best["best_score"]),
    }


def _best_ended(state, ended):
    """The best of the finished answers and of those that would end now.

    Args:
        state: dict of tensors.
        ended: float32 (B, beams), log-probability of `<eos>` after each unfinished answer.

    Returns:
        dict of the new "best_score", "best_tokens" and "best_log_probs".
    """
    scores, count = state["scores"] + ended, state["count"]
    beam = ops.argmax(scores, axis=-1)[:, None]
    score = ops.take_along_axis(scores, beam, axis=-1)[:, 0]
    tokens = _take_beams(state["tokens"], beam)[:, 0]
    tokens = _backend.write(tokens, ops.cast(ops.zeros_like(beam) + EOS_ID, "int32"), count)
    log_probs = _take_beams(state["log_probs"], beam)[:, 0]
    log_probs = _backend.write(log_probs, ops.take_along_axis(ended, beam, axis=-1), count)
    is_better = score > state["best_score"]
    return {
        "best_score": ops.where(is_better, score, state["best_score"]),
        "best_tokens": ops.where(is_better[:, None], tokens, state["best_tokens"]),
        "best_log_probs": ops.where(is_better[:, None], log_probs, state["best_log_probs"]),
    }


def _take_beams(array, beam):
    return ops.take_along_axis(array, ops.cast(beam, "int32")[:, :, None], axis=1)


def _repeat_cache(cache, beams):
    return tree.map_structure(lambda array: ops.repeat(array, beams, axis=0), cache)


def _keras_hub_tokens(model, inputs, sampler, cache_length, max_new_tokens):
    """Runs the loop of a keras_hub sampler. Returns int32 (B, max_new_tokens)."""

    def function(sampler, inputs):
        num_image_tokens = model.num_image_tokens(inputs)
        batch_size, length = inputs["token_ids"].shape
        _, hidden, cache = model.prefill(inputs, cache_length)
        # Contrastive search compares with all of them: padding counts as the last real one.
        hidden = ops.where(inputs["padding_mask"][..., None], hidden, hidden[:, -1:])
        blank = ops.zeros((batch_size, max_new_tokens), "int32")

        def next(prompt, cache, index):
            # keras_hub feeds the last token of the prefix again; its keys do not change.
            token = ops.take(prompt, index - 1, axis=1)
            return model.decode(token, cache, index - 1 + num_image_tokens)

        prompt = sampler(
            next=next,
            prompt=ops.concatenate([inputs["token_ids"], blank], axis=1),
            cache=cache,
            index=length,
            # Padding counts as prompt, so that it is never overwritten.
            mask=ops.concatenate([ops.ones((batch_size, length), "bool"), blank > 0], axis=1),
            stop_token_ids=(EOS_ID,),
            hidden_states=ops.pad(hidden, ((0, 0), (0, max_new_tokens), (0, 0))),
            model=model,
        )
        return prompt[:, length:]

    name = ("keras_hub", cache_length, max_new_tokens)
    outputs = model.programs.run_with_sampler(model, name, function, sampler, inputs)
    return _backend.to_numpy(outputs)


# Scores -------------------------------------------------------------------------------------


def score_suffixes(model, inputs, suffixes, batch_size):
    """The log-likelihoods of several suffixes to one prefix, which is read once.

    Args:
        model: PaliGemma2.
        inputs: see `token_steps`, of one row.
        suffixes: list of lists of int, token ids with `<eos>`.
        batch_size: int, suffixes in one batch.

    Returns:
        float32 NumPy array, (number of suffixes,).
    """
    length = max(2, *map(len, suffixes))
    if _backend.IS_COMPILED:
        num_known = model.num_image_tokens(inputs) + inputs["token_ids"].shape[1]
        rounded = math.ceil(length / _SUFFIX_MULTIPLE) * _SUFFIX_MULTIPLE
        length = max(length, min(rounded, model.config.text.max_positions - num_known))
    longest = "the longest of `candidates`"
    inputs, cache_length, _ = _pad_to_buckets(model, inputs, length, longest)
    start = model.num_image_tokens(inputs) + inputs["token_ids"].shape[1]
    count = len(suffixes)
    batch_size = min(batch_size, count)
    token_ids = np.full((-(-count // batch_size) * batch_size, length), PAD_ID, "int32")
    weights = np.zeros(token_ids.shape, "float32")
    for row, suffix in enumerate(suffixes):
        token_ids[row, : len(suffix)] = suffix
        weights[row, : len(suffix)] = 1

    def read_prefix(inputs):
        _, hidden, cache = model.prefill(inputs, cache_length)
        return hidden[:, -1:], cache

    def score(hidden, cache, token_ids, weights):
        rows = token_ids.shape[0]
        following, _ = model.extend(token_ids[:, :-1], _repeat_cache(cache, rows), start)
        hidden = ops.concatenate([ops.repeat(hidden, rows, axis=0), following], axis=1)
        return model.suffix_log_likelihoods(hidden, token_ids, weights)

    programs = model.programs
    name = ("read_prefix", cache_length)
    read_prefix = programs.get(model, name, read_prefix, in_parts=True, record=True)
    score = programs.get(model, ("score", start), score)
    state = read_prefix(_backend.to_tensors(inputs))
    scores = []
    for row in range(0, len(token_ids), batch_size):
        batch = (array[row : row + batch_size] for array in (token_ids, weights))
        scores.append(_backend.to_numpy(score(*state, *_backend.to_tensors([*batch]))))
    return np.concatenate(scores)[:count]


# Text ---------------------------------------------------------------------------------------


def generate_batch(model, inputs, sampler, max_new_tokens, stop, seeds, grammar=None, starts=None):
    """Completes one batch.

    Args:
        model: PaliGemma2.
        inputs, sampler, max_new_tokens, seeds, grammar, starts: see `token_steps`.
        stop: tuple of str; an answer ends before the first of them.

    Returns:
        list of Generation.
    """

    def num_steps():  # strings are looked for in text, on the host, now and then
        return 16 if stop else max_new_tokens

    steps = token_steps(model, inputs, sampler, max_new_tokens, seeds, num_steps, grammar, starts)
    token_ids, log_probs = next(steps)
    while True:
        answers = [_answer(model, row, stop) for row in token_ids]
        try:
            token_ids, log_probs = steps.send(np.array([is_stopped for *_, is_stopped in answers]))
        except StopIteration:
            answers = [_answer(model, row, stop, is_over=True) for row in token_ids]
            break
    return [
        Generation(
            text=text,
            token_ids=token_ids[row, :count],
            log_probs=None if log_probs is None else log_probs[row, :count],
        )
        for row, (text, count, _) in enumerate(answers)
    ]


def stream_batch(model, inputs, sampler, max_new_tokens, stop, seeds):
    """Completes one batch piece by piece.

    Args: those of `generate_batch`. Beam search knows no piece before its end.

    Yields:
        list of str, what became certain in each row since the last piece.
    """
    is_beam = isinstance(sampler, Beam)
    seconds_per_token = 1.0

    def num_steps():  # about ten pieces a second, of one token when tokens are slower
        return max_new_tokens if is_beam else math.ceil(0.1 / seconds_per_token)

    steps = token_steps(model, inputs, sampler, max_new_tokens, seeds, num_steps)
    token_ids, _ = next(steps)
    shown = [0] * len(token_ids)
    is_last = False
    while True:
        answers = [_answer(model, row, stop, is_last) for row in token_ids]
        if is_last or not is_beam:
            certain = [
                text if is_stopped or is_last else text[: _certain_length(text, stop)]
                for text, _, is_stopped in answers
            ]
            pieces = [text[length:] for text, length in zip(certain, shown)]
            shown = [max(length, len(text)) for text, length in zip(certain, shown)]
            if any(pieces):
                yield pieces
        if is_last:
            return
        known, start = token_ids.shape[1], time.perf_counter()
        try:
            token_ids, _ = steps.send(np.array([is_stopped for *_, is_stopped in answers]))
            seconds_per_token = (time.perf_counter() - start) / max(1, token_ids.shape[1] - known)
        except StopIteration:
            is_last = True


def _answer(model, token_ids, stop, is_over=False):
    """Text, number of tokens, and whether the row ended, by `<eos>` or by a stop string.

    `is_over` says that no token follows. Else a stop string that began before another one may
    still become complete.
    """
    ends = np.flatnonzero(token_ids == EOS_ID)
    count = int(ends[0]) + 1 if len(ends) else len(token_ids)
    if model.preprocessor is None:
        return "", count, bool(len(ends))
    decode = model.preprocessor.tokenizer.decode
    text = decode(token_ids[:count])
    positions = {string: text.find(string) for string in stop if string in text}
    first = min(positions.values(), default=None)
    is_over = is_over or len(ends)
    if first is None or (not is_over and _certain_length(text, stop) < first):
        return text, count, bool(len(ends))
    found = [string for string, position in positions.items() if position == first]
    while count > 1 and any(string in decode(token_ids[: count - 1]) for string in found):
        count -= 1
    return text[:first], count, True


def _certain_length(text, stop):
    """Length of the text that later tokens cannot change or cut off."""
    text = text.rstrip("\ufffd")  # the first bytes of a character
    length = len(text)
    for string in stop:
        for size in range(1, len(string)):
            if text.endswith(string[:size]):
                length = min(length, len(text) - size)
    return length


def align_inputs(inputs, vocab_size):
    """Tokenized inputs of a user to the layout of `token_steps`.

    Args:
        inputs: dict of NumPy arrays: "images" float (B, M, I, I, 3) or (B, I, I, 3) or
            "image_tokens" float (B, M · P, D), "token_ids" int (B, T), and optionally
            "padding_mask" and "suffix_mask" bool (B, T); padding may be anywhere.
        vocab_size: int, V.

    Returns:
        dict of NumPy arrays, padding first.

    Raises:
        ValueError: if a row has no token, ids are no integers below `vocab_size`, or images are
            not finite floats in [-1, 1].
    """
    token_ids = inputs["token_ids"]
    if not token_ids.size:
        raise ValueError(
            "`token_ids` must be (B, T), at least one token of one example. Received: shape "
            f"{token_ids.shape}"
        )
    check_tokenized(token_ids, inputs.get("images"), vocab_size)
    vision = {name: inputs[name] for name in {"images", "image_tokens"} & set(inputs)}
    if "images" in vision:
        images = inputs["images"]
        vision["images"] = images[:, None] if images.ndim == 4 else images
    padding_mask = inputs.get("padding_mask", np.ones_like(token_ids)).astype(bool)
    suffix_mask = inputs.get("suffix_mask", np.zeros_like(token_ids)).astype(bool)
    if not padding_mask.any(axis=1).all():
        raise ValueError("Each row of `padding_mask` must have at least one real token.")
    return {
        **vision,
        **align_right(
            [
                (ids[real], suffix[real])
                for ids, real, suffix in zip(token_ids, padding_mask, suffix_mask, strict=True)
            ]
        ),
    }
