"""The one file that imports jax, tensorflow or torch.

Everything else is `keras.ops` and Keras layers. What is here, Keras lacks: compiled programs
over a model's variables, loops that stop early, in-place cache writes, products of low-precision
operands with a float32 result, and variables without values.
"""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import logging
import math
import os
import threading
import types

import keras
import numpy as np
from keras import ops
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import in_stateless_scope

_LOG = logging.getLogger(__name__)
BACKEND = keras.config.backend()
IS_COMPILED = BACKEND != "torch"  # whether programs are compiled for the shapes of their inputs
_MAX_FEW_ROWS = 8  # for which products on a CPU have code of their own; more need another layout
# From more rows on, products with a quantized matrix are faster if it is decoded before.
MAX_QUANTIZED_ROWS = {
    "jax": {"int8": 64, "int4": 64},
    "tensorflow": {"int8": 64, "int4": 16},
    "torch": {"int8": 16, "int4": 64},
}.get(BACKEND)
# Finite, so that a row with no visible key gives a uniform softmax instead of NaN.
MASKED_LOGIT = -2.3819763e38
_INNER_TILES = 8  # of torch's product of int4 on a GPU
_INT4_COLUMNS = 16 * _INNER_TILES  # that lie beside each other there
_KEYS_CAST = 512  # keys, and values, that are cast to float32 at a time where that is faster
_MAX_ATTENTION_LOGITS = 2**20  # of a head and example, in memory at a time
# The same of all heads and examples with torch on a CPU, where larger memory than 32 MiB goes back
# to the system when it is freed, and is cleared page by page when it is taken again.
_MAX_CPU_LOGITS = 2**22
_MAX_NORMALIZED = 2**20  # elements of an RMS norm there, so that they stay in a cache
_GRAPHS_SHARE = 16  # of a GPU's memory is the most that the ends of CUDA graphs may take
_NUM_REFINED = 512  # logits of a row that are computed in float32, see `refined`

if BACKEND == "jax":
    import jax
    import jax.numpy as jnp
    from jax.experimental.compilation_cache import compilation_cache as jax_cache
elif BACKEND == "tensorflow":
    import tensorflow as tf
    from tensorflow.python.framework import ops as tf_ops
elif BACKEND == "torch":
    import torch

    try:
        from keras.src.backend.torch.core import get_device, to_torch_dtype
    except ImportError:  # Keras 3.16
        from keras.src.backend.torch.ops.core import get_device, to_torch_dtype

    _CPU = getattr(torch.cpu, "get_capabilities", dict)()
    _HAS_AMX = _CPU.get("amx_bf16", False)
    # torch multiplies float32 by MKL, which takes 2 to 3 times as long as oneDNN on CPUs of AMD.
    # With AVX2 alone oneDNN loses that again if it has to lay the weights of many rows out anew.
    _PREFERS_ONEDNN = "AMD" in _CPU.get("cpu_name", "") and torch.backends.mkldnn.is_available()
    # Dtypes that torch multiplies fast on this CPU. Without AVX-512 those of 16 bits are not.
    _CPU_DTYPES = {torch.float32, torch.float64}
    if torch.backends.mkldnn.is_available():
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            _CPU_DTYPES.add(torch.bfloat16)
        if torch.ops.mkldnn._is_mkldnn_fp16_supported():
            _CPU_DTYPES.add(torch.float16)
else:
    raise ImportError(
        "keras_pg2 runs on the Keras backends jax, tensorflow and torch. "
        f"Received: KERAS_BACKEND={BACKEND!r}. Set the environment variable KERAS_BACKEND "
        "(or the field `backend` of ~/.keras/keras.json) before the first import of keras."
    )


# Tokens whose activations inside an MLP are in memory at a time; fewer on a CPU with torch, for the
# same reason as _MAX_CPU_LOGITS.
MAX_TOKENS = 768 if BACKEND == "torch" and not torch.cuda.is_available() else 2048


# Compiled programs --------------------------------------------------------------------------


_state = threading.local()
_layout_lock, _graph_lock = threading.Lock(), threading.Lock()
_broken_graphs = []
_onednn = types.SimpleNamespace(lock=threading.Lock(), num_without=0, was_enabled=None)
_turns = threading.RLock()  # of threads that run programs on a CPU, see `_turn`


def _renew_locks():
    """Makes a forked process forget the threads that it does not have."""
    global _layout_lock, _graph_lock, _turns
    _layout_lock, _graph_lock, _turns = threading.Lock(), threading.Lock(), threading.RLock()
    _onednn.lock = threading.Lock()
    if _onednn.num_without:
        _onednn.num_without, torch.backends.mkldnn.enabled = 0, _onednn.was_enabled


if BACKEND == "torch" and hasattr(os, "register_at_fork"):  # the others cannot be forked
    os.register_at_fork(after_in_child=_renew_locks)


def in_program():
    """Whether this thread runs, or traces, one of a model's programs."""
    return getattr(_state, "in_program", False)


class Programs:
    """Compiled functions of a model, made once each and kept with the model.

    jax and tensorflow compile a program once per set of input shapes; torch runs it eagerly,
    without gradients, or compiles the steps of its loops, and on a GPU records CUDA graphs.

    Args:
        compile_steps: bool, whether torch compiles the steps of loops.

    Attributes:
        compilations: list of str, the name of a program for each time it was traced.
        functions: dict, Keras' functions by name and shapes, see `PaliGemma2._use_function_for`.
        graphs: `_Graphs`, CUDA graphs that were recorded; None if torch has no GPU.
    """

    def __init__(self, compile_steps=False):
        self.compile_steps, self.graphs = compile_steps, _Graphs() if has_torch_gpu() else None
        self.compilations, self.functions = [], {}
        self._programs, self._sampler_programs, self._parts = {}, {}, {}
        self._content, self._places, self._sampler = [], [], None
        self._lock, self._sampler_lock = threading.Lock(), threading.RLock()

    def get(self, model, name, function, sampler=None, donate=False, in_parts=False, record=False):
        """The compiled form of `function`.

        Args:
            model: keras.Model, whose variables the function reads.
            name: hashable. `function` must do the same whenever the name is the same.
            function: callable, from nested structures of tensors to one; it updates no variable.
            sampler: keras_hub sampler or None, which may be updated. Only the last one's are kept.
            donate: bool, whether the memory of the first argument may be reused, a dict of the
                structure and shapes of the output. It must not be used again.
            in_parts: bool, whether tensorflow on a CPU compiles `part`s alone, to save memory.
            record: bool, whether torch on a GPU records it, which must not wait for the GPU.

        Returns:
            callable with the signature of `function`.
        """
        with self._lock:
            self._forget_outdated(model, sampler)
            programs = self._programs if sampler is None else self._sampler_programs
            if name not in programs:
                in_parts = in_parts and BACKEND == "tensorflow" and _is_tf_on_cpu()

                def traced(*args):
                    if IS_COMPILED:
                        self.compilations.append(name)
                    _state.in_program, _state.programs, _state.name = True, self, name
                    _state.parts = self._parts if in_parts or BACKEND == "jax" else None
                    try:
                        return function(*args)
                    finally:
                        _state.in_program, _state.programs, _state.parts = False, None, None

                if record and self.graphs:
                    traced = functools.partial(_by_graph, self.graphs, name, traced)
                updated = [] if sampler is None else sampler.variables
                programs[name] = _compile(model, traced, updated, donate, in_parts)
            return programs[name]

    def run_with_sampler(self, model, name, function, sampler, *args):
        """Runs a program with a sampler of keras_hub, compiled once for all that are alike.

        Args:
            model: see `get`.
            name: tuple, see `get`.
            function: as that of `get`, with a sampler before its arguments.
            sampler: keras_hub sampler, whose seed goes on.
            *args: tensors.

        Returns:
            what `function` returns.
        """
        with self._sampler_lock:  # all threads' samplers that are alike share the variables of one
            same = self._sampler if _are_alike(self._sampler, sampler) else sampler
            name = (*name, repr(_config_but_seed(sampler)))  # which may have been changed
            program = self.get(model, name, functools.partial(function, same), sampler=same)
            for variable, value in zip(same.variables, sampler.variables):
                variable.assign(value)
            try:
                return program(*args)
            finally:
                for variable, value in zip(sampler.variables, same.variables):
                    variable.assign(value)

    def _forget_outdated(self, model, sampler):
        if sampler is not None and sampler is not self._sampler:
            self._sampler_programs, self._sampler = {}, sampler
        layers = model._flatten_layers()
        # Every program depends on these. `model.variables` goes through each layer many times.
        content = [layer for layer in layers if getattr(layer, "is_merged", False)]
        for kind in ("_trainable_variables", "_non_trainable_variables", "_seed_generators"):
            content += [x for layer in layers for x in getattr(layer, kind)]
        places = [*map(id, content), *(self.graphs.addresses(content) if self.graphs else ())]
        if places != self._places:
            self._programs, self._sampler_programs, self._parts = {}, {}, {}
            self._content, self._places = content, places
            if self.graphs:
                self.graphs.renew([layer for layer in layers if layer is not model])
            if self.compile_steps and BACKEND == "torch":  # compiled code must not do it
                for variable in model.variables:
                    if variable.name == "kernel":
                        _lay_out(variable)


def _are_alike(*samplers):
    """Whether samplers of keras_hub itself do the same but for their seeds."""
    if len({type(x) for x in samplers}) > 1:
        return False
    first, second = map(_config_but_seed, samplers)
    return type(samplers[0]).__module__.startswith("keras_hub.") and first == second


def _config_but_seed(sampler):
    return {name: value for name, value in sampler.get_config().items() if name != "seed"}


def part(method):
    """A method of a layer, traced once in a program for all layers of one kind.

    Args:
        method: of a layer. It reads variables of that layer alone and updates none.

    Returns:
        callable with the signature of the method; of its arguments, those that are no tensors
        must be hashable.
    """
    parts = getattr(_state, "parts", None)
    return method if parts is None else functools.partial(_call_part, parts, method)


if BACKEND == "jax":
    _jit = jax.jit
elif BACKEND == "tensorflow":
    _jit = functools.partial(tf.function, jit_compile=True, autograph=False)


def _call_part(parts, method, *args, **kwargs):
    """Calls a method of a layer by its trace in `parts`, made if missing."""
    layer, leaves = method.__self__, keras.tree.flatten((args, kwargs))
    tensors = [x for x in leaves if ops.is_tensor(x)]
    constants = tuple(None if ops.is_tensor(x) else (x,) for x in leaves)
    kinds = tuple(map(_kind, layer._flatten_layers()))
    variables = layer.variables
    shapes = tuple((x.shape, x.dtype) for x in (*variables, *tensors))
    key = (method.__name__, tuple(kwargs), constants, kinds, shapes)
    if key not in parts:
        # Without the leaves, which would keep the whole trace of this program.
        structure = keras.tree.map_structure(lambda _: None, (args, kwargs))

        def function(values, tensors):
            tensors = iter(tensors)
            leaves = [next(tensors) if x is None else x[0] for x in constants]
            packed_args, packed_kwargs = keras.tree.pack_sequence_as(structure, leaves)
            _state.parts = None  # a part has none
            try:
                with keras.StatelessScope(state_mapping=zip(variables, values)):
                    return method(*packed_args, **packed_kwargs)
            finally:
                _state.parts = parts

        parts[key] = _jit(function)
    return parts[key]([_on_one_device(variable.value) for variable in variables], tensors)


def _on_one_device(value):
    """The value of a variable that tensorflow has on several devices, on the first of them."""
    is_on_several = BACKEND == "tensorflow" and isinstance(value, tf.distribute.DistributedValues)
    return value.values[0] if is_on_several else value


def _is_known(layer):
    """Whether it is no layer of a user's own, of which we do not know what it does."""
    return type(layer).__module__.startswith(("keras.", "keras_pg2."))


def _kind(layer):
    lora = getattr(layer, "lora", None), getattr(layer, "is_merged", None)
    # Attributes of a layer that is not known may matter.
    return (type(layer), layer.compute_dtype, *lora) if _is_known(layer) else layer


def _compile_jax(model, function, updated, donate, in_parts):
    variables = model.variables  # a program is forgotten when there are others

    def stateless(values, updated_values, *args):
        read = [*zip(variables, values), *zip(updated, updated_values)]
        with keras.StatelessScope(state_mapping=read) as scope:
            outputs = function(*args)
        return outputs, [scope.get_current_value(variable) for variable in updated]

    jitted = jax.jit(stateless, donate_argnums=(2,) if donate else ())

    def run(*args):
        was_synced = getattr(model, "_jax_state_synced", True)
        model.jax_state_sync()  # in the middle of `fit`, Keras holds the values elsewhere
        model._jax_state_synced = was_synced  # so that it goes on with them, which do not change
        _check_values(variables)
        if jax.process_count() > 1:
            _check_same_inputs(variables, args)
        values = [variable.value for variable in variables]
        outputs, new_values = jitted(values, [v.value for v in updated], *args)
        for variable, value in zip(updated, new_values):
            variable.assign(value)
        return outputs

    return run


def _compile_tensorflow(model, function, updated, donate, in_parts):
    is_in_place = donate and not in_parts
    called = functools.partial(_update, function) if is_in_place else function
    compiled = tf.function(called, jit_compile=not in_parts, autograph=False)
    by_signature = {}  # kept here, since tf.function warns of many shapes

    def run(*args):
        args = (_moved_to_variables(args[0]), *args[1:]) if is_in_place else args
        signature = tuple((x.shape, x.dtype) for x in keras.tree.flatten(args))
        if signature not in by_signature:
            # Of specs: traced with the variables themselves, it would keep them.
            specs = keras.tree.map_structure(tf.type_spec_from_value, args)
            by_signature[signature] = compiled.get_concrete_function(*specs)
        outputs = by_signature[signature](*args)
        return _with_variables(args[0], outputs) if is_in_place else outputs

    return run


def _update(function, state, *args):
    """Calls a function of a structure of tensors and variables, and writes into the variables.

    Returns:
        The structure that the function returns, with None for what is written.
    """

    def write(old, new):
        if not isinstance(old, tf.Variable):
            return new
        old.assign(new)

    read = keras.tree.map_structure(tf.convert_to_tensor, state)
    return keras.tree.map_structure(write, state, function(read, *args))


def _moved_to_variables(state):
    """The structure of a dict with variables in place of its float tensors; empties the dict.

    XLA reuses the memory of variables alone, and only where nothing else refers to it. On a GPU
    integers cannot be such variables.
    """
    moved = keras.tree.map_structure(
        lambda x: x if isinstance(x, tf.Variable) or not x.dtype.is_floating else tf.Variable(x),
        state,
    )
    state.clear()
    return moved


def _with_variables(state, outputs):
    """What `_update` returned, with the variables of its argument where they were written."""
    return keras.tree.map_structure(lambda old, new: old if new is None else new, state, outputs)


def _compile_torch(model, function, updated, donate, in_parts):
    def run(*args):
        # The dtype policy says in what it computes, and not the caller's autocast.
        device = torch.device(get_device()).type
        with torch.inference_mode(), torch.autocast(device, enabled=False), _turn(device):
            return function(*args)

    return run


def _turn(device):
    """What a program runs in: on CPUs one at a time, see `_without_onednn_for_one_row`."""
    return _turns if device == "cpu" and not _HAS_AMX else contextlib.nullcontext()


_compile = {
    "jax": _compile_jax,
    "tensorflow": _compile_tensorflow,
    "torch": _compile_torch,
}[BACKEND]


def compiled(function):
    """On torch a compiled form of a function of tensors, for training; elsewhere the same one.

    jax and tensorflow compile whole training steps. torch runs them eagerly, where on a CPU
    the many passes over memory take longer than the products: compiled blocks are three times
    as fast. Each set of shapes is compiled anew, which takes seconds.

    Args:
        function: callable, of which nothing but tensors may change from call to call.

    Returns:
        callable with the signature of `function`.
    """
    if BACKEND != "torch":
        return function
    return _torch_compile(function)


def _torch_compile(function):
    # Each block of each batch size counts as another form of the same function.
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(function, dynamic=False)


def sync_values(model):
    """Gives the variables their values, which Keras holds elsewhere in its loops on jax."""
    if BACKEND == "jax":
        model.jax_state_sync()
        # Keras would write these again, over later ones. It is to read the variables instead.
        model._jax_state, model._jax_state_synced = None, True


@contextlib.contextmanager
def synced_values(model):
    """Runs a call of Keras between two `sync_values`, the second after an error, too."""
    sync_values(model)
    _check_values(model.variables)
    try:
        yield
    finally:
        sync_values(model)


def _check_values(variables):
    """Raises a RuntimeError if the variables have no values, for which Keras would make others."""
    if any(variable._value is None for variable in variables):
        raise RuntimeError(
            "The model around this one holds the weights now. Call its `jax_state_sync()` first."
        )


def strategy_scope(model):
    """The scope of a model's `tf.distribute` strategy, where its optimizer's variables belong."""
    if BACKEND == "tensorflow":
        return model.distribute_strategy.scope()
    return contextlib.nullcontext()


def num_replicas(model):
    """How many copies of a model `tf.distribute` trains together."""
    return model.distribute_strategy.num_replicas_in_sync if BACKEND == "tensorflow" else 1


def share_of_replica(mean, count):
    """What a replica's mean over `count` examples adds to that over all, with `tf.distribute`.

    Keras adds up the gradients of the replicas, of which some may have fewer examples that count.
    """
    replica = tf.distribute.get_replica_context() if BACKEND == "tensorflow" else None
    if replica is None or replica.num_replicas_in_sync == 1:
        return mean
    total = replica.all_reduce(tf.distribute.ReduceOp.SUM, count)
    return mean * count / ops.maximum(total, 1)


@contextlib.contextmanager
def whole_step():
    """A context for a whole step of `fit`, `evaluate` or `predict`, which is run or traced.

    torch computes in what the dtype policy says. tensorflow forgets functions with a gradient of
    their own, such as Keras' sum over replicas, which it keeps for good, and by their graphs all
    variables of the model. It needs them for gradients outside of the step alone.
    """
    if BACKEND == "torch":
        with torch.autocast(torch.device(get_device()).type, enabled=False):
            yield
        return
    known = getattr(tf_ops.gradient_registry, "_registry", {}) if BACKEND == "tensorflow" else {}
    before = set(known)
    try:
        yield
    finally:
        for name in set(known) - before:
            known.pop(name, None)


def unshare(variables):
    """Gives each variable memory of its own on jax, where training steps write over it.

    Keras has weights share that of their averages when `use_ema` ends `fit`; the next step, of
    any kind, would delete the averages.
    """
    if BACKEND == "jax":
        seen = set()
        for variable in variables:
            if id(variable.value) in seen:
                variable.assign(jnp.copy(variable.value))
            seen.add(id(variable.value))


def compilation_cache(folder):
    """Keeps compiled programs in a folder from now on, for later processes. See `from_preset`."""
    folder = os.path.abspath(os.path.expanduser(folder))
    if BACKEND == "jax":
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax_cache.reset_cache()  # jax decides at its first program whether to have one
    elif BACKEND == "torch":
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    else:  # the cache that tensorflow 2.21 has reports errors when it is read on a CPU
        _LOG.warning("`compilation_cache` has no effect with tensorflow.")


def loop(step, state, max_steps, is_done, num_rows):
    """Applies `state = step(state)` up to `max_steps` times, stopping early.

    Args:
        step: callable, from state to state.
        state: nested structure of tensors.
        max_steps: int32 scalar tensor, or int.
        is_done: callable, from state to bool scalar tensor.
        num_rows: int, rows that the products in a step have.

    Returns:
        The last state.
    """
    if BACKEND == "torch":
        return _torch_loop(step, state, max_steps, is_done, num_rows)
    # The state goes around without axes of length 1: XLA for CPUs copies what has them, such as a
    # cache of one row, four times in each step.
    shapes = [x.shape for x in keras.tree.flatten(state)]

    def squeezed(state):
        return [
            ops.reshape(x, [length for length in x.shape if length != 1])
            for x in keras.tree.flatten(state)
        ]

    def restored(arrays):
        return keras.tree.pack_sequence_as(state, list(map(ops.reshape, arrays, shapes)))

    _, arrays = ops.while_loop(
        lambda count, arrays: ops.logical_and(
            count < max_steps, ops.logical_not(is_done(restored(arrays)))
        ),
        lambda count, arrays: (count + 1, squeezed(step(restored(arrays)))),
        (ops.zeros((), "int32"), squeezed(state)),
    )
    return restored(arrays)


def _torch_loop(step, state, max_steps, is_done, num_rows):
    programs, max_steps, recording = _state.programs, int(max_steps), None
    graphs = programs.graphs if _is_on_cuda(state) else None
    if may_record := graphs and graphs.is_active:
        key = graphs.key(_state.name, [state])
        recording = graphs.take(key)
    if recording:
        _write(recording.outputs, state)
        state = recording.outputs
    elif programs.compile_steps:
        step = _torch_compile(step)
        # A tensor made outside of this mode would be another kind of input, compiled anew.
        state = keras.tree.map_structure(lambda x: x if x.is_inference() else x.clone(), state)
    # `matmul` cannot do this inside compiled code.
    without_onednn = _without_onednn_for_one_row(num_rows)
    with without_onednn if programs.compile_steps and not _HAS_AMX else contextlib.nullcontext():
        for count in range(max_steps):
            # Each look at a GPU costs a wait.
            if (count % 8 == 0 or not graphs) and bool(is_done(state)):
                break
            if may_record and not recording and count == 1 and max_steps > 2:
                recording = graphs.record(key, step, [state], state)
                may_record = recording is not None
            if recording:
                recording.graph.replay()
            else:
                state = step(state)
    if recording and graphs.has_room(key, state):
        state = _copies(state)  # the next call writes over it
        graphs.keep(key, recording)
    return state


def _by_graph(graphs, name, function, *args):
    """Calls a function of tensors by a CUDA graph, from the second time with their shapes on."""
    if not (graphs.is_active and _is_on_cuda(args)):
        return function(*args)
    key = graphs.key(name, args)
    recording = graphs.take(key)
    if not recording:
        outputs = function(*args)
        # Most shapes never come again.
        if graphs.is_first(key) or not graphs.has_room(key, [args, outputs]):
            return outputs
        recording = graphs.record(key, function, _copies(args), _copies(outputs))
        if not recording:
            return outputs
    _write(recording.inputs, args)
    recording.graph.replay()
    outputs = _copies(recording.outputs)  # the next call writes over them
    graphs.keep(key, recording)
    return outputs


def _is_on_cuda(tensors):
    return any(x.is_cuda for x in keras.tree.flatten(tensors))


class _Recording:
    """A call as a CUDA graph, since it takes a host long to launch thousands of operations.

    Args:
        graph: torch.cuda.CUDAGraph.
        inputs: nested structure of tensors, whose memory the graph reads.
        outputs: nested structure of tensors, whose memory it writes.
    """

    def __init__(self, graph, inputs, outputs):
        self.graph, self.inputs, self.outputs = graph, inputs, outputs
        self.num_bytes = _num_bytes([inputs, outputs])


class _Graphs:
    """The CUDA graphs of a model. Each belongs to one caller from `take` or `record` to `keep`.

    Attributes:
        is_active: bool, whether calls may be recorded.
    """

    def __init__(self):
        self.is_active, self._lock = True, threading.Lock()
        self._known, self._failed, self._version = set(), set(), 0
        self.clear()

    def clear(self):
        """Frees the memory of those that nobody has taken."""
        with self._lock:
            self._recordings, self._last = {}, {}

    def addresses(self, content):
        """Where the values of the variables are: graphs read them there."""
        return [x._value.data_ptr() for x in content if isinstance(x, keras.Variable)]

    def renew(self, layers):
        """Clears them for a model of these layers."""
        self._version += 1  # so that what is given back later is not kept any more
        self.clear()
        self._known.clear()
        # Other layers may wait for the GPU, which a graph cannot hold.
        self.is_active = all(map(_is_known, layers))

    def key(self, name, args):
        """What tells apart the calls that need graphs of their own."""
        tensors = keras.tree.flatten(args)
        shapes = tuple((x.shape, x.dtype) for x in tensors)
        return name, torch.cuda.current_stream(tensors[0].device), shapes, self._version

    def is_first(self, key):
        """Whether it is asked this for the first time."""
        with self._lock:
            is_first = key not in self._known
            self._known.add(key)
            return is_first

    def has_room(self, key, tensors):
        """Whether a recording that reads and writes these tensors would be kept."""
        return _num_bytes(tensors) <= self._room(key) // 2

    def _room(self, key):
        return torch.cuda.get_device_properties(key[1].device).total_memory // _GRAPHS_SHARE

    def take(self, key):
        """The _Recording of such a call, or None."""
        with self._lock:
            return self._recordings.pop(key, None)

    def keep(self, key, recording):
        """Gives back a recording for the next call, in place of older ones if there is no room.

        One of earlier weights is thrown away.
        """
        with self._lock:
            if key[3] != self._version:
                return
            self._recordings[key] = recording
            while sum(kept.num_bytes for kept in self._recordings.values()) > self._room(key):
                del self._recordings[next(iter(self._recordings))]

    def record(self, key, function, args, outputs):
        """Records a call.

        Args:
            key: see `key`.
            function: callable, from tensors to tensors, that ran before. It must not wait for the
                GPU.
            args: list of its arguments, nested structures of tensors.
            outputs: nested structure of tensors, such as the function returns.

        Returns:
            _Recording, or None if the call cannot be recorded.
        """
        name, stream, *_ = key
        if name in self._failed:
            return None
        graph, last = torch.cuda.CUDAGraph(), self._last.pop(stream, None)
        # Not `torch.cuda.graph`, which first waits for all threads and empties the cache of memory.
        # Instead a graph takes over the memory of the last one: of what both make on the way, since
        # they run on one stream, never at once. What they read and write is not in it.
        try:
            with _graph_lock, torch.cuda.stream(_graph_stream(stream.device)):
                # Allocates what products of this thread need; a graph would never free it.
                torch.mm(*torch.ones(2, 1, 1, device=stream.device))
                graph.capture_begin(last and last.pool(), capture_error_mode="thread_local")
                try:
                    _write(outputs, function(*args))
                finally:
                    graph.capture_end()
        except Exception as error:
            _LOG.warning("%s is slow, since no CUDA graph could be made: %s", name[0], error)
            _broken_graphs.extend((graph, last, self._recordings))  # torch still refers to them
            self.clear()
            self._failed.add(name)
            return None
        self._last[stream] = graph
        return _Recording(graph, args, outputs)


def _write(tensors, new_tensors):
    """Writes a structure of tensors into the memory of another one."""
    for old, new in zip(keras.tree.flatten(tensors), keras.tree.flatten(new_tensors)):
        if old.data_ptr() != new.data_ptr():
            old.copy_(new)


def _copies(tensors):
    return keras.tree.map_structure(torch.clone, tensors)


def _num_bytes(tensors):
    return sum(x.nbytes for x in {x.data_ptr(): x for x in keras.tree.flatten(tensors)}.values())


@functools.cache
def _graph_stream(device):
    """A stream on which graphs are recorded."""
    return torch.cuda.Stream(device)


def repeat(step, count, state):
    """`state = step(index, state)` for each index below `count`.

    Args:
        step: callable, from an int32 scalar (or int) and a state to a state.
        count: int32 scalar tensor, or int.
        state: nested structure of tensors.

    Returns:
        The last state.
    """
    if BACKEND == "torch":
        for index in range(int(count)):
            state = step(index, state)
        return state
    return ops.fori_loop(0, count, step, state)


def in_chunks(function, tensors, max_length, shared=()):
    """`function(*shared, *tensors)`, with a part of axis 1 at a time, which bounds memory.

    Args:
        function: callable, from tensors to one of the shape and dtype of the first of `tensors`.
        tensors: list of tensors of one length along axis 1.
        max_length: int, of a part.
        shared: list of tensors that each part needs as a whole.
    """
    length = tensors[0].shape[1]
    if isinstance(length, int) and length > max_length and BACKEND == "torch":
        shared = [x.contiguous() for x in shared]  # or products would copy them for each part
    function = functools.partial(function, *shared)
    if not isinstance(length, int) or length <= max_length:
        return function(*tensors)
    return (_looped if IS_COMPILED and in_program() else _unrolled)(function, tensors, max_length)


def _unrolled(function, tensors, max_length):
    length = tensors[0].shape[1]
    chunk_length = -(-length // -(-length // max_length))  # no short chunk at the end
    starts = range(0, length, chunk_length)
    outputs, outer = [], chunk_number()
    try:
        for _state.chunk, start in enumerate(starts):
            outputs.append(function(*(x[:, start : start + chunk_length] for x in tensors)))
    finally:
        _state.chunk = outer
    return ops.concatenate(outputs, axis=1)


def chunk_number():
    """int, which chunk of a sequence `in_chunks` computes at the moment, other than in programs."""
    return getattr(_state, "chunk", 0)


def _looped(function, tensors, max_length):
    # Outputs are written over inputs that were read. Otherwise XLA for CPUs begins with all parts,
    # or with the memory of all outputs, at once.
    length = tensors[0].shape[1]
    chunk_length = equal_part(length, max_length)
    if 2 * chunk_length < max_length:  # no fitting divisor
        count = -(-length // max_length)
        chunk_length = -(-length // count)
        padding = count * chunk_length - length
        pads = [[(0, 0)] * len(x.shape) for x in tensors]
        padded = [ops.pad(x, [pad[0], (0, padding), *pad[2:]]) for x, pad in zip(tensors, pads)]
        return _looped(function, padded, chunk_length)[:, :length]

    def step(index, outputs):
        start = index * chunk_length
        parts = [read(x, start, chunk_length) for x in (outputs, *tensors[1:])]
        return write(outputs, function(*parts), start)

    return repeat(step, length // chunk_length, tensors[0])


def equal_part(length, max_length):
    """The largest length, at most `max_length`, of which a whole number makes up `length`."""
    counts = range(math.ceil(length / max_length), length + 1)
    return next(length // count for count in counts if length % count == 0)


def by_position(function, tensors):
    """`function(*tensors)`; torch on a CPU takes a position (axis 1) at a time, in its caches.

    Args:
        function: callable, from tensors (B, T, …) to several of such shapes, which treats positions
            alike.
        tensors: list of tensors, the first of which is large.
    """
    if BACKEND != "torch" or tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        return function(*tensors)
    parts = [function(*part) for part in zip(*(x.split(1, dim=1) for x in tensors))]
    return [torch.cat(part, dim=1) for part in zip(*parts)]


def rotate(x, cos, sin):
    """Rotates the pairs `(j, j + H / 2)` of each head of float (B, T, N, H), in float32.

    `cos` and `sin` are those of `attention.rotary_angles`. torch, run eagerly, takes half as many
    operations for whole rows as for halves. By halves a training step of 3B needs 0.2 GiB less on
    a TPU, by its compiler.
    """
    half = x.shape[-1] // 2
    if BACKEND == "torch":
        return torch.addcmul(x * cos, torch.roll(x, half, -1), sin)
    x = ops.cast(x, "float32")
    first, second, cos, sin = x[..., :half], x[..., half:], cos[..., half:], sin[..., half:]
    return ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rms_normalize(x, scale, eps):
    """`ops.rms_normalization(x, 1 + scale)` in the dtype of `x`.

    Here and in `torch_attention` torch is called directly, since a Keras operation takes longer
    there than the computation for one token.
    """
    if BACKEND == "torch":
        is_long = x.device.type == "cpu" and x.ndim == 3
        length = max(1, _MAX_NORMALIZED // (x.shape[0] * x.shape[2])) if is_long else math.inf
        return in_chunks(functools.partial(_torch_rms_normalize, scale, eps), [x], length)
    return ops.rms_normalization(x, 1.0 + ops.cast(scale, "float32"), epsilon=eps)


def _torch_rms_normalize(scale, eps, x):
    normalized = torch.nn.functional.rms_norm(x.float(), scale.shape, eps=eps)
    rounded = None if torch.is_grad_enabled() else torch.empty_like(x)  # an operation less
    return torch.addcmul(normalized, normalized, scale, out=rounded).to(x.dtype)


def torch_layer_norm(x, layer):
    """As Keras' layer norm `layer`: computed in float32, rounded once, without casts of its own."""
    weights = layer.gamma.value, layer.beta.value
    return torch.nn.functional.layer_norm(x, x.shape[-1:], *weights, eps=layer.epsilon)


def has_fused_attention(query, key):
    """Whether torch attends without soft cap, and with no logits in memory, faster than we do."""
    if BACKEND != "torch" or key.shape[1] not in (1, query.shape[2]):
        return False
    return not (torch.is_grad_enabled() and _is_slow(query))  # of which the gradient is slow


def fused_attention(query, key, value, mask):
    """`attention.attention` without soft cap, see `has_fused_attention`."""
    if mask is not None:  # added: a row with no visible key gives no NaN, see MASKED_LOGIT
        lowest = max(MASKED_LOGIT, torch.finfo(query.dtype).min)
        mask = (~mask[:, None]).to(query.dtype) * lowest
    heads = (-1, query.shape[2], -1, -1)
    operands = query.transpose(1, 2), key.expand(heads), value.expand(heads)
    output = torch.nn.functional.scaled_dot_product_attention(*operands, mask, scale=1.0)
    return output.transpose(1, 2)


def max_queries(query, key):
    """How many queries' logits may be in memory at a time; shapes as in `attention.attention`."""
    limit = _MAX_ATTENTION_LOGITS
    if BACKEND == "torch" and query.device.type == "cpu":
        limit = min(limit, _MAX_CPU_LOGITS // (query.shape[0] * query.shape[2]))
    return max(1, limit // key.shape[2]) if isinstance(key.shape[2], int) else math.inf


def torch_attention(query, key, value, mask, logit_softcap):
    """`attention.attention` without gradients, in the memory of the logits."""
    batch_size, query_length, num_heads, head_dim = query.shape
    num_kv_heads, key_length = key.shape[1:3]
    query = query.view(batch_size, query_length, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    query = query.reshape(batch_size, num_kv_heads, -1, head_dim)  # (B, K, G · T, H)
    is_slow = _is_slow(query)
    if is_slow:  # cast part by part, so that they stay in a cache
        size = _KEYS_CAST if query.shape[2] <= _MAX_FEW_ROWS else key_length
        query, keys = query.float(), key.split(size, dim=2)
        parts = [torch.matmul(query, part.float().transpose(2, 3)) for part in keys]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    elif _has_tiles(query) and query.shape[2] <= _MAX_FEW_ROWS:  # as in `_few_times`
        logits = torch.matmul(key, query.transpose(2, 3)).transpose(2, 3).contiguous().float()
    else:
        logits = torch.matmul(query, key.transpose(2, 3)).float()
    if logit_softcap is not None:
        logits = logits.div_(logit_softcap).tanh_().mul_(logit_softcap)
    logits = logits.view(batch_size, num_kv_heads, -1, query_length, key_length)
    if mask is not None:
        logits = logits.masked_fill_(~mask[:, None, None], MASKED_LOGIT)
    probs = torch.softmax(logits, dim=-1).flatten(2, 3)
    if is_slow:
        parts = zip(probs.split(size, dim=-1), value.split(size, dim=2))
        products = (torch.matmul(weights, part.float()) for weights, part in parts)
        output = functools.reduce(torch.add, products).to(value.dtype)
    else:
        output = torch.matmul(probs.to(value.dtype), value)
    return output.view(batch_size, num_heads, query_length, head_dim).transpose(1, 2)


def attention_logits(query, key):
    """Products float32 (B, K, T, G, S) of queries (B, T, K, G, H) and keys (B, K, S, H)."""
    if BACKEND == "tensorflow" and query.shape[1] == 1 and _is_tf_on_cpu():
        return _logits_of_one(query, key)
    if BACKEND != "jax":
        return einsum_float32("btkgh,bksh->bktgs", query, key)
    if not has_jax_gpu():  # on a CPU faster with the key first, on a TPU the same
        return jnp.moveaxis(einsum_float32("btkgh,bksh->bkstg", query, key), 2, 4)
    # With T and G as one axis XLA for GPUs has one kernel from here to the product with the values.
    batch_size, length, num_kv_heads, group_size, head_dim = query.shape
    rows = jnp.swapaxes(query, 1, 2).reshape(batch_size, num_kv_heads, -1, head_dim)
    logits = einsum_float32("bkmh,bksh->bkms", rows, key)
    return logits.reshape(batch_size, num_kv_heads, length, group_size, -1)


def _logits_of_one(query, key):
    # Head by head: XLA is half as fast with all those that share a key.
    heads = [query[:, 0, :, head] for head in range(query.shape[3])]
    logits = [einsum_float32("bksh,bkh->bks", key, head) for head in heads]
    return ops.stack(logits, axis=2)[:, :, None]


def _is_tf_on_cpu():
    return not any(map(tf.config.get_visible_devices, ("GPU", "TPU")))


def recomputed(function):
    """The function, but for its gradient it is computed again; nothing inside is kept.

    For what is cheap to compute and large to keep: norms, gates, attention probabilities.
    Only jax gains from it, so elsewhere the function stays what it is.
    """
    return functools.partial(_call_recomputed, function) if BACKEND == "jax" else function


def _call_recomputed(function, *args):
    if _is_eager(args):
        return function(*args)
    # A function of its own each time: jax remembers the trace of one, and what it closed over.
    return jax.checkpoint(lambda *args: function(*args))(*args)


def with_gradients(function):
    """A differentiable function whose gradients are computed in its forward pass.

    Args:
        function: callable from tensors to `(loss, extras, gradients)`: a float32 scalar, a tuple of
            float tensors, and for each argument the gradient of the loss, or None. Called with
            `upstream` too, a tuple of a factor of the loss and one of each extra, the gradients are
            of the sum of these products: it is called again for the gradient of an extra.

    Returns:
        callable from tensors to `(loss, extras)`.
    """
    if BACKEND == "jax":

        @jax.custom_vjp
        def differentiable(*tensors):
            return function(*tensors)[:2]

        def forward(*tensors):
            tensors = [x.value for x in tensors]
            loss, extras, gradients = function(*tensors)
            return (loss, extras), (gradients, tensors)

        def backward(residuals, upstream):
            (gradients, tensors), (scale, extras) = residuals, upstream
            is_zero = [isinstance(x, jax.custom_derivatives.SymbolicZero) for x in (scale, *extras)]
            values = [
                jnp.zeros(x.shape, x.dtype) if zero else x
                for x, zero in zip((scale, *extras), is_zero)
            ]
            if not all(is_zero[1:]):
                gradients, values = function(*tensors, upstream=values)[2], [1.0]
            # Scaled before they are cast: float16 has little room.
            return tuple(
                g if g is None else (g * values[0]).astype(x.dtype)
                for g, x in zip(gradients, tensors)
            )

        differentiable.defvjp(forward, backward, symbolic_zeros=True)
        return differentiable

    if BACKEND == "tensorflow":

        @tf.custom_gradient
        def differentiable(*tensors):
            loss, extras, gradients = function(*tensors)

            def backward(scale, *extras):
                found = gradients
                if not all(map(_is_surely_zero, extras)):
                    found, scale = function(*tensors, upstream=(scale, *extras))[2], 1.0
                return [
                    g if g is None else tf.cast(tf.cast(g, "float32") * scale, x.dtype)
                    for g, x in zip(found, tensors)
                ]

            return (loss, *extras), backward

    else:

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(context, *tensors):
                loss, extras, context.gradients = function(*tensors)
                context.set_materialize_grads(False)
                context.save_for_backward(*tensors)
                context.shapes = [(x.shape, x.device) for x in extras]
                return (loss, *extras)

            @staticmethod
            def backward(context, scale, *extras):
                tensors, gradients = context.saved_tensors, context.gradients
                context.gradients = None  # they are large
                if gradients is None or scale is None or any(x is not None for x in extras):
                    zeros = [torch.zeros(shape, device=device) for shape, device in context.shapes]
                    extras = [zero if x is None else x for x, zero in zip(extras, zeros)]
                    upstream = (0.0 if scale is None else scale, *extras)
                    gradients, scale = function(*tensors, upstream=upstream)[2], 1.0
                return tuple(
                    g if g is None else (g * scale).to(x.dtype) for g, x in zip(gradients, tensors)
                )

        differentiable = Differentiable.apply

    def unpack(*tensors):
        loss, *extras = differentiable(*tensors)
        return loss, tuple(extras)

    return unpack


def _is_surely_zero(x):
    """Whether a tensor is the zeros that tensorflow makes for what has no gradient."""
    if hasattr(x, "numpy"):
        return not x.numpy().any()
    if x.op.type == "Fill":
        x = x.op.inputs[1]
    value = tf.get_static_value(x)
    return x.op.type == "ZerosLike" or (value is not None and not value.any())


def needs_gradients(*tensors):
    """Whether gradients of the tensors, or of what made them, may be asked for."""
    is_for_values = in_program() or _is_eager(tensors)
    return torch.is_grad_enabled() if BACKEND == "torch" else not is_for_values


def _is_eager(tensors):
    """Whether jax computes with the tensors at once, neither compiling nor differentiating."""
    return BACKEND == "jax" and not any(isinstance(x, jax.core.Tracer) for x in tensors)


def prefetch(function, batches, threads=1):
    """An iterator over `function(*batch)` for each batch, in order.

    Threads begin at once, and stay one batch each ahead. They make tensors where the caller would.
    """
    function = _on_this_device(function)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    batches = iter(batches)
    pending = collections.deque(
        pool.submit(function, *batch) for batch in itertools.islice(batches, threads)
    )

    def results():
        try:
            while pending:
                ready = pending.popleft()
                pending.extend(
                    pool.submit(function, *batch) for batch in itertools.islice(batches, 1)
                )
                yield ready.result()
        finally:
            pool.shutdown(cancel_futures=True)

    return results()


def _on_this_device(function):
    """The function, which in any thread makes tensors on the default device of this thread."""
    if BACKEND == "tensorflow":  # has none per thread
        return function
    device = jax.config.jax_default_device if BACKEND == "jax" else get_device()
    scope = jax.default_device if BACKEND == "jax" else keras.device

    def call(*args):
        with scope(device):
            return function(*args)

    return call


def tf_dataset(batches, sample):
    """A `tf.data.Dataset` of batches that all have the structure and shapes of `sample`.

    Args:
        batches: callable, gives an iterator over nested structures of NumPy arrays.
        sample: one of them.
    """
    signature = keras.tree.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype), sample)
    return tf.data.Dataset.from_generator(batches, output_signature=signature).prefetch(1)


# Arrays -------------------------------------------------------------------------------------


def reshape(x, shape):
    """`ops.reshape`, which with torch takes longer than most operations on a GPU."""
    return x.reshape(shape) if BACKEND == "torch" else ops.reshape(x, shape)


def read(x, index, length, axis=1):
    """The part of a tensor that begins at `index` of an axis and has `length` there.

    Args:
        x: tensor.
        index: int or int32 scalar tensor.
        length: int.
        axis: int.

    Returns:
        tensor of the shape of `x` but for `axis`.
    """
    if BACKEND == "torch":
        return x.narrow(axis, index, length)
    starts = [ops.cast(index if i == axis else 0, "int32") for i in range(len(x.shape))]
    sizes = [length if i == axis else size for i, size in enumerate(ops.shape(x))]
    return ops.slice(x, starts, sizes)  # starts of int32, since jax may have x64


def write(buffer, values, index, axis=1):
    """Writes `values`, cast, into `buffer` at `index` of an axis, in place where the backend can.

    The index is an int or int32 scalar. `buffer` must not be used again, but what is returned.
    """
    values = ops.cast(values, buffer.dtype)
    if BACKEND == "torch":
        return _torch_write(buffer, values, index, axis)
    # Likewise without axes of length 1, see `loop`.
    axes = [i for i, length in enumerate(buffer.shape) if length != 1 or i == axis]

    def squeezed(x):
        return ops.reshape(x, [-1 if x.shape[i] is None else x.shape[i] for i in axes])

    start = [ops.cast(index if i == axis else 0, "int32") for i in axes]  # jax may have x64
    written = ops.slice_update(squeezed(buffer), start, squeezed(values))
    return ops.reshape(written, ops.shape(buffer))


def _torch_write(buffer, values, index, axis):
    buffer = buffer.contiguous()  # a repeated row has no memory of its own
    length = values.shape[axis]
    if isinstance(index, int):
        buffer.narrow(axis, index, length).copy_(values)
        return buffer
    # Without a look at the index, which would wait for the device.
    places = (
        index + torch.arange(length, device=buffer.device) if length > 1 else index.long()[None]
    )
    return buffer.index_copy_(axis, places, values)


def write_cache(buffer, values, index):
    """`write` along axis 2 of a decoder's cache, which nothing else may refer to."""
    is_in_parts = BACKEND == "tensorflow" and getattr(_state, "parts", None) is not None
    if not is_in_parts or values.shape[2] != 1:
        return write(buffer, values, index, axis=2)
    rows = tf.range(math.prod(buffer.shape[:2])) * buffer.shape[2] + index
    old, new = (tf.reshape(x, (-1, buffer.shape[3])) for x in (buffer, values))
    # The one operation that does not copy a buffer in a loop.
    new = tf.raw_ops.InplaceUpdate(x=old, i=rows, v=tf.cast(new, old.dtype))
    return tf.reshape(new, buffer.shape)


def masked_fill(x, mask, value):
    """`x` with a number in place of what `mask`, bool of its shape, marks.

    `ops.where` would copy the number to torch's device, and wait for that.
    """
    return x.masked_fill(mask, value) if BACKEND == "torch" else ops.where(mask, value, x)


def take_rows(x, places):
    """Row `places[b, t]` of each example.

    Args:
        x: tensor (B, S, D).
        places: int32 (B, T).

    Returns:
        tensor (B, T, D).
    """
    if BACKEND == "tensorflow":  # Keras repeats the places along D
        return tf.gather(x, places, batch_dims=1)
    return ops.take_along_axis(x, places[:, :, None], axis=1)


def einsum(equation, x, y):
    """`ops.einsum` of float tensors of one dtype; on a CPU torch may use a faster one inside."""
    if BACKEND == "torch" and _is_slow(x):
        return einsum_float32(equation, x, y).to(x.dtype)
    return ops.einsum(equation, x, y)


def einsum_float32(equation, x, y):
    """`ops.einsum` of float tensors of one dtype, in float32; jax does not round before."""
    if BACKEND == "jax":
        return jnp.einsum(equation, x, y, preferred_element_type="float32")
    adds_up_in_float16 = BACKEND == "tensorflow" and ops.dtype(x) == "float16"  # on a CPU
    if adds_up_in_float16 or (BACKEND == "torch" and _is_slow(x)):
        return ops.einsum(equation, ops.cast(x, "float32"), ops.cast(y, "float32"))
    return ops.cast(ops.einsum(equation, x, y), "float32")


def matmul_transposed_float32(x, matrix, all_exact=False):
    """float32 `x @ matrix.T` of float (..., D) and (V, D), not rounded to the dtype of these.

    The vocabulary has 257,152 logits, and bfloat16 tells only 22 values above 20 apart. Unless
    `all_exact`, torch on a CPU rounds those of a few rows but for the largest, see `refined`.
    """
    is_float32 = ops.dtype(x) == ops.dtype(matrix) == "float32"
    if is_float32 and in_program() and has_few_rows(x) and math.prod(x.shape[:-1]) > 1:
        return by_platform({"cpu": _logits_of_few}, _logits, x, matrix)
    return _logits(x, matrix, all_exact)


def _logits_of_few(x, matrix):
    """Two to eight rows, as XLA compiles them for a CPU without laying the matrix out anew."""
    rows = ops.reshape(x, (-1, x.shape[-1]))
    if BACKEND == "jax":
        logits = ops.sum(matrix[:, None] * rows[None], axis=-1)
    else:  # an earlier XLA, which is fast with 16 columns
        columns = ops.transpose(ops.pad(rows, ((0, 16 - rows.shape[0]), (0, 0))))
        logits = ops.matmul(matrix, columns)[:, : rows.shape[0]]
    return ops.reshape(ops.transpose(logits), (*x.shape[:-1], matrix.shape[0]))


def _logits(x, matrix, all_exact=False):
    if BACKEND == "jax":
        return jnp.einsum("...d,vd->...v", x, matrix, preferred_element_type="float32")
    is_float32 = ops.dtype(x) == ops.dtype(matrix) == "float32"
    if is_float32 or BACKEND == "tensorflow" or torch.is_grad_enabled():
        return matmul(x, ops.transpose(ops.cast(matrix, "float32")))
    return _torch_logits(x, matrix, all_exact)


def _torch_logits(x, matrix, all_exact):
    rows, columns = x.reshape(-1, x.shape[-1]), matrix.t()
    if x.device.type == "cuda":
        logits = torch.mm(rows, columns, out_dtype=torch.float32)
    elif _is_in_float32(rows):
        logits = _times_in_float32(rows, columns)
    elif len(rows) <= _MAX_FEW_ROWS and not all_exact:
        return refined(_few_times(x, columns), x, lambda places: matrix[places].float())
    else:
        # A CPU rounds results. What was rounded off is a second product less the first; it takes
        # less time than float32 copies of the matrix.
        rounded = torch.mm(rows, columns)
        logits = rounded.float() + torch.addmm(rounded, rows, columns, beta=-1).float()
    return logits.reshape(*x.shape[:-1], -1)


def matmul(x, kernel):
    """`ops.matmul` of float (..., in) and a kernel (in, out), in the dtype of the kernel.

    On torch and a CPU it is faster for few rows, and in a slow dtype.
    """
    if BACKEND == "torch":
        return _torch_matmul(x, kernel)
    return ops.matmul(ops.cast(x, kernel.dtype), kernel)


def _torch_matmul(x, kernel):
    matrix = kernel.value if isinstance(kernel, keras.Variable) else kernel
    x = x.to(matrix.dtype)
    rows = x.reshape(-1, x.shape[-1])  # for some of the positions torch would copy the matrix
    has_gradient = torch.is_grad_enabled()
    is_slow = _is_slow(x) and not torch.compiler.is_compiling()
    if has_gradient and (is_slow or _is_by_onednn(rows, matrix)):
        return _TorchProduct.apply(x, matrix)
    is_plain = has_gradient or x.device.type != "cpu" or x.dtype == torch.float32
    product = _product(rows, matrix) if is_plain else _product_on_cpu(rows, kernel, matrix)
    return product.view(*x.shape[:-1], -1)


def _product_on_cpu(rows, kernel, matrix):
    """`rows @ matrix`, the kernel's, on a CPU in any dtype but float32, without a gradient."""
    is_few = len(rows) <= (_MAX_FEW_ROWS if _has_tiles(rows) or _is_slow(rows) else 1)
    if isinstance(kernel, keras.Variable) and not torch.compiler.is_compiling():
        if is_few:
            _lay_out(kernel)
        with _layout_lock:  # what it refers to stays, should another thread lay the kernel out
            matrix = matrix.detach()
    if _is_in_float32(rows):
        return _times_in_float32(rows, matrix).to(rows.dtype)
    return _few_times(rows, matrix) if is_few else torch.matmul(rows, matrix)


def _product(rows, columns):
    """`rows @ columns` of two matrices of one dtype, without a gradient."""
    if _is_by_onednn(rows, columns):
        return torch.ops.mkldnn._linear_pointwise(rows, columns.t(), None, "none", [], "")
    return torch.matmul(rows, columns)


def _is_by_onednn(rows, columns):
    """Whether oneDNN multiplies float32 `rows @ columns` faster, see `_PREFERS_ONEDNN`."""
    is_float32 = rows.device.type == "cpu" and rows.dtype == torch.float32
    if not (_PREFERS_ONEDNN and is_float32 and torch.backends.mkldnn.enabled):
        return False
    is_whole = columns.is_contiguous() or columns.t().is_contiguous()  # slices are 1000 × slower
    is_faster = is_whole and (_CPU.get("avx512_f") or len(rows) <= 32 or columns.stride(0) == 1)
    return is_faster and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def _has_tiles(x):
    """Whether `x` is on a CPU that multiplies tiles of its dtype."""
    return _HAS_AMX and x.device.type == "cpu" and x.dtype == torch.bfloat16


def _is_slow(x):
    """Whether `x` is on a CPU that multiplies its dtype many times slower than float32."""
    return x.device.type == "cpu" and x.dtype not in _CPU_DTYPES


def _is_in_float32(rows):
    # For fewer rows the casts would take longer than they save.
    return _is_slow(rows) and len(rows) > 3 and not torch.compiler.is_compiling()


def _times_in_float32(rows, columns):
    """float32 `rows @ columns`, of weights cast part by part, so that they stay in a cache."""
    inputs = rows.float()
    outputs = inputs.new_zeros(len(rows), columns.shape[1])
    is_laid_out = columns.stride(0) == 1
    matrix = columns.t() if is_laid_out else columns
    weights = inputs.new_empty(max(1, 2**20 // matrix.shape[1]), matrix.shape[1])
    for start in range(0, len(matrix), len(weights)):
        part = slice(start, start + len(weights))
        cast = weights[: len(matrix[part])].copy_(matrix[part])
        if is_laid_out:  # on the left they are twice as fast for few rows
            outputs[:, part] = _product(cast, inputs.t()).t()
        else:
            outputs.addmm_(inputs[:, part], cast)
    return outputs


if BACKEND == "torch":

    class _TorchProduct(torch.autograd.Function):
        """`x @ matrix` by float32 products; what is kept for the gradient is of the dtype of `x`.

        It is as little as torch's own product keeps; `ops.custom_gradient` would keep all inputs.
        """

        @staticmethod
        def forward(ctx, x, matrix):
            ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, matrix)
            return _rows_times(x, matrix)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, upstream):
            x, matrix = ctx.saved_tensors
            of_x = _rows_times(upstream, matrix.t()) if ctx.needs_input_grad[0] else None
            if x is None:
                return of_x, None
            columns, upstream = (y.reshape(-1, y.shape[-1]).float() for y in (x, upstream))
            return of_x, _product(columns.t(), upstream).to(matrix.dtype)


def _rows_times(x, matrix):
    multiply = _product if x.dtype == torch.float32 else _times_in_float32
    product = multiply(x.reshape(-1, x.shape[-1]), matrix)
    return product.to(x.dtype).view(*x.shape[:-1], -1)


def _few_times(x, columns):
    """`x @ columns` of few rows on a CPU, each column's weights beside each other."""
    rows = x.reshape(-1, x.shape[-1])
    if not _has_tiles(x):
        with _without_onednn_for_one_row(len(rows)):
            return torch.matmul(x, columns)
    # oneDNN would lay out the right operand anew for the tiles. A vector it multiplies without.
    several = torch.cat([rows, rows]) if len(rows) == 1 else rows
    product = torch.matmul(columns.t(), several.t())[:, : len(rows)].t()
    return product.reshape(*x.shape[:-1], -1).contiguous()


def _lay_out(kernel):
    """Lays each output's weights beside each other, as torch's own products want them."""
    matrix = kernel.value
    is_low = matrix.device.type == "cpu" and matrix.dtype in (torch.bfloat16, torch.float16)
    if is_low and matrix.stride(0) != 1:
        with torch.inference_mode(False), torch.no_grad():  # so that it can still be trained
            laid_out = matrix.data.t().contiguous().t()
            with _layout_lock:
                matrix.data = laid_out


@contextlib.contextmanager
def _without_onednn_for_one_row(num_rows):
    """Turns oneDNN off for one row: without AMX it reads at half the rate of torch's own code.

    Other threads see it, too; what they compute meanwhile is rounded otherwise, and slower.
    """
    if num_rows > 1 or torch.compiler.is_compiling():
        yield
        return
    _count_users_without_onednn(1)
    try:
        yield
    finally:
        _count_users_without_onednn(-1)


def _count_users_without_onednn(change):
    # All threads share torch's flag: the first to enter clears it, the last to leave sets it again.
    with _onednn.lock:
        if not _onednn.num_without:
            _onednn.was_enabled = torch.backends.mkldnn.enabled
        _onednn.num_without += change
        torch.backends.mkldnn.enabled = _onednn.was_enabled and not _onednn.num_without


def refined(rounded, x, take):
    """Rounded products of a matrix (R, C) with vectors, the largest computed again in float32.

    Args:
        rounded: float (..., R).
        x: float (..., C), the vectors.
        take: callable, from places int (n,) to rows of the matrix, float32 (n, C).

    Returns:
        float32 (..., R), of which the 512 largest of each row are exact.
    """
    shape, size = rounded.shape, rounded.shape[-1]
    products, rows = rounded.float().view(-1, size), x.float().reshape(-1, x.shape[-1])
    for product, row, places in zip(products, rows, _largest(products)):
        product[places] = take(places) @ row
    return products.view(shape)


def _largest(products):
    """Places int64 (n, k) of the largest of each row of float (n, R)."""
    size, count = products.shape[-1], min(_NUM_REFINED, products.shape[-1])
    if size % 128 or size < 128 * count:
        return torch.topk(products, count, sorted=False).indices
    # They lie in those blocks that have the largest maxima; so most of a row is sorted no more.
    by_blocks = products.view(len(products), -1, 128)
    blocks = torch.topk(by_blocks.amax(dim=-1), count, sorted=False).indices
    candidates = by_blocks.gather(1, blocks[..., None].expand(-1, -1, 128)).flatten(1)
    places = torch.topk(candidates, count, sorted=False).indices
    return 128 * blocks.gather(1, places // 128) + places % 128


def fastest_dtype():
    """The dtype policy in which a model runs fastest on the default device."""
    if BACKEND == "torch":
        # Turing and Volta GPUs have no bfloat16.
        is_cuda = torch.device(get_device()).type == "cuda"
        has_bfloat16 = not is_cuda or torch.cuda.is_bf16_supported(False)
        return "bfloat16" if has_bfloat16 else "float16"
    if BACKEND == "jax":
        device = jnp.zeros(()).device
        if device.platform == "gpu":
            is_old = getattr(device, "compute_capability", "8.0") in ("6.0", "6.1", "7.0", "7.5")
            return "float16" if is_old else "bfloat16"
        return "float32" if device.platform == "cpu" else "bfloat16"
    gpus = tf.config.get_visible_devices("GPU")
    if gpus:
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability")
        return "bfloat16" if capability is None or capability[0] >= 8 else "float16"
    return "bfloat16" if tf.config.get_visible_devices("TPU") else "float32"


def to_tensors(arrays):
    """Tensors of a nested structure of arrays, of their dtypes whatever `floatx` is."""
    return keras.tree.map_structure(lambda x: ops.convert_to_tensor(x, ops.dtype(x)), arrays)


def to_numpy(tensors):
    """NumPy arrays of a nested structure of tensors or variables."""
    return keras.tree.map_structure(_to_numpy, tensors)


def _to_numpy(x):
    x = x.value if isinstance(x, keras.Variable) else x
    if not (getattr(x, "is_fully_addressable", True) or x.is_fully_replicated):
        x = _gathered(x)
    return ops.convert_to_numpy(x)


def of_all_processes(array):
    """NumPy arrays of one shape from each process of jax, (processes, …); all must call this."""
    if BACKEND != "jax" or jax.process_count() == 1:
        return array[None]
    from jax.experimental import multihost_utils  # slow to import

    return multihost_utils.process_allgather(array)


def _check_same_inputs(variables, inputs):
    """Raises a ValueError if processes that share the variables have different inputs.

    Each would take its own as what all have, and the answers would be of none of them.
    """
    if all(variable.value.is_fully_addressable for variable in variables):
        return
    digest = hashlib.sha256()
    for x in keras.tree.flatten(inputs):
        if getattr(x, "is_fully_addressable", True):
            x = ops.convert_to_numpy(x)
            digest.update(f"{x.dtype}{x.shape}".encode() + x.tobytes())
    digest = np.frombuffer(digest.digest(), "uint32")
    if (of_all_processes(digest) != digest).any():
        raise ValueError(
            "All processes must ask the same, since the weights are spread over them: the same "
            "images, prompts and options. `fit` and `evaluate` alone take a part from each."
        )


def _gathered(array):
    """A NumPy array of what jax spreads over several processes, all of which must call this."""
    from jax.experimental import multihost_utils  # slow to import

    return multihost_utils.process_allgather(array, tiled=True)


def remove_attribute(layer, name):
    """Sets an attribute of a layer to None, so that nothing holds what it was.

    Args:
        layer: keras.layers.Layer.
        name: str, of an attribute that is a variable or a `SeedGenerator`.
    """
    value = getattr(layer, name)
    if isinstance(value, keras.Variable):
        layer._untrack_variable(value)
    else:
        layer._tracker.untrack(value)
    setattr(layer, name, None)
    if BACKEND == "tensorflow":  # which keeps what an attribute was
        layer._delete_tracking(name)


def track_variables(model):
    """Makes torch see the variables that were added to or taken from layers after `build`.

    Its modules keep a dict of their own, by which Keras clears the gradients.
    """
    if BACKEND == "torch" and not in_stateless_scope():  # where they may have no values
        for layer in model._flatten_layers():
            layer._track_variables()


# Quantized products, see quantization.py ----------------------------------------------------


def int8_product(x, codes, scales):
    """`x @ (codes · scales).T` by torch's own code for a few rows, or None where it has none.

    Args:
        x: float (..., C).
        codes: int8 (R, C).
        scales: bfloat16 (R,).

    Returns:
        bfloat16 (..., R), or None.
    """
    # Where C is no multiple of 16, torch 2.13 reads past the end.
    if BACKEND != "torch" or codes.shape[1] % 16 or not _has_torch_product(x, "int8"):
        return None
    rows = x.reshape(-1, x.shape[-1])
    return torch._weight_int8pack_mm(rows, codes, scales).view(*x.shape[:-1], -1)


def int4_product(x, codes, scales, tile):
    """The product with a matrix of int4, likewise.

    Args:
        x: float (..., C).
        codes: uint8 (C / 2 / G, R, G) as `tile_int4` returns them.
        scales: bfloat16 (groups, R, 2), scales and offsets.
        tile: see `int4_tile`.

    Returns:
        bfloat16 (..., R), or None.
    """
    if tile is None or not _has_torch_product(x, "int4"):
        return None
    if x.device != (tile.device if torch.is_tensor(tile) else torch.device("cpu")):
        return None  # the model was moved
    rows, (_, num_rows, group_size) = x.reshape(-1, x.shape[-1]).contiguous(), codes.shape
    if torch.is_tensor(tile):
        products = torch._weight_int4pack_mm(rows, _as_int4pack(codes), group_size, scales)
    else:
        codes = codes.view(num_rows, -1)
        products = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, group_size, scales)
    return products.view(*x.shape[:-1], -1)


def _has_torch_product(x, mode):
    """Whether torch has a product of `x` with a quantized matrix that is faster than ours."""
    is_small = has_few_rows(x, MAX_QUANTIZED_ROWS[mode]) and x.dtype == torch.bfloat16
    has_device = x.device.type == "cpu" or mode == "int4"  # that of int8 is slow on a GPU
    return is_small and has_device and not torch.is_grad_enabled()


def has_torch_gpu():
    """Whether torch has a GPU."""
    return BACKEND == "torch" and torch.cuda.is_available()


def has_jax_gpu():
    """Whether jax computes on a GPU, unless told otherwise."""
    return BACKEND == "jax" and jax.default_backend() == "gpu"


def is_compiled_for_cuda(x):
    """Whether torch compiles, for a GPU, the operation on `x` that comes next."""
    return BACKEND == "torch" and x.is_cuda and torch.compiler.is_compiling()


def has_few_rows(x, limit=_MAX_FEW_ROWS):
    """Whether the rows of `x`, float (..., C), are known to be no more than `limit`."""
    return all(isinstance(n, int) for n in x.shape) and math.prod(x.shape[:-1]) <= limit


def by_platform(functions, default, *args):
    """Calls the function of the platform for which XLA compiles.

    Args:
        functions: dict of "cpu" or, for jax alone, "cuda" and "tpu" to callables.
        default: callable, for all other platforms, and with torch.
        *args: tensors, what it is called with; the last is a weight.
    """
    if BACKEND == "jax":
        if _is_eager(args) and all(x.platform == "cpu" for x in args[-1].devices()):
            return functions.get("cpu", default)(*args)  # XLA would compile its choice each time
        return jax.lax.platform_dependent(*args, **functions, default=default)
    is_on_cpu = BACKEND == "tensorflow" and _is_tf_on_cpu()
    return (functions.get("cpu", default) if is_on_cpu else default)(*args)


def int4_tile(codes, dtype):
    """How torch's product of int4 wants the codes in memory.

    Args:
        codes: uint8 tensor (C / 2 / G, R, G), on the device where the product will run.
        dtype: str, of the product.

    Returns:
        On a CPU int, how many rows lie beside each other. On a GPU int64 (8, 128), the place of
        each number of 8 rows and 128 columns among the half bytes that hold them. None for the
        plain layout.
    """
    if BACKEND == "torch" and codes.device.type == "cpu":
        return _torch_int4_tile()
    if BACKEND != "torch" or codes.device.type != "cuda" or dtype != "bfloat16":
        return None
    is_whole = 2 * codes.shape[0] * codes.shape[2] % _INT4_COLUMNS == 0
    return _cuda_int4_tile(codes.device) if is_whole else None


@functools.cache
def _torch_int4_tile():
    codes = torch.randint(256, (1, 128, 32), generator=torch.Generator().manual_seed(0))
    codes = codes.to(torch.uint8)
    try:
        values = unpack_int4(codes).int()
        expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    except (AttributeError, RuntimeError):
        return None
    for tile in (64, 32):  # with AVX-512, and with AVX2
        if torch.equal(tile_int4(codes, tile), expected.view_as(codes)):
            return tile
    return None


@functools.cache
def _cuda_int4_tile(device):
    # Packed three times, each with 4 bits of all places, so that no layout is assumed.
    numbers = torch.arange(8 * _INT4_COLUMNS, device=device).view(8, _INT4_COLUMNS)
    random = torch.randint(256, (1, 64, 64), generator=torch.Generator().manual_seed(0))
    try:
        found = [_half_bytes(_int4pack((numbers >> bits) & 15)) for bits in (0, 4, 8)]
        found = found[0].int() | found[1].int() << 4 | found[2].int() << 8
        tile = torch.argsort(found.flatten()).view(8, _INT4_COLUMNS)
        codes = tile_int4(random.to(device, torch.uint8), tile)
        x = torch.eye(8, 2 * codes.shape[2], dtype=torch.bfloat16, device=device)
        scales = x.new_tensor([0.5, 1.0]).expand(2, 64, 2).contiguous()
        with torch.inference_mode():
            products = int4_product(x, codes, scales, tile)
        expected = (unpack_int4(codes, tile)[:, :8].t().float() - 8) / 2 + 1
        return tile if torch.equal(products.float(), expected) else None
    except (AttributeError, RuntimeError):  # an older GPU, say
        return None


def _int4pack(values):
    """Codes 0 … 15 (R, C) as torch's product on a GPU wants them: uint8 (R, C / 2)."""
    values = values.to(torch.uint8)
    packed = torch._convert_weight_to_int4pack(values[:, ::2] << 4 | values[:, 1::2], _INNER_TILES)
    return packed.view(torch.uint8).view(len(values), -1)


def _as_int4pack(codes):
    """The same bytes, uint8 of any shape (C / 2 / G, R, G), in the shape that the product takes."""
    shape = (codes.shape[1] // 8, -1, 32, _INNER_TILES // 2)
    return codes.view(-1).view(torch.int32).view(shape)


def _half_bytes(codes):
    """uint8 (..., 2 · n), 0 … 15, the lower half of each byte first, of uint8 (..., n)."""
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)


def tile_int4(codes, tile):
    """Bytes as torch's product of int4 wants them.

    Args:
        codes: uint8 (C / 2 / G, R, G), see `quantization.QuantizedMatrix`.
        tile: see `int4_tile`.

    Returns:
        uint8 of the same shape. On a CPU, of each tile of rows, first the first column, then
        the second and so on; a byte holds one row of the first half of a tile, and above it one
        of the second. On a GPU as `torch._convert_weight_to_int4pack` lays them out.
    """
    if tile is None:
        return codes
    num_rows = codes.shape[1]
    tiled = torch.empty_like(codes)
    targets = tiled.view(num_rows, -1)
    if torch.is_tensor(tile):
        for start in range(0, num_rows, 8192):  # of what needs little memory
            part = slice(start, start + 8192)
            targets[part] = _int4pack(unpack_int4(codes[:, part]).to(tile.device))
        return tiled
    for start in range(0, num_rows, 16 * tile):  # of what fits in a cache
        values = unpack_int4(codes[:, start : start + 16 * tile])
        values = values.view(-1, 2, tile // 2, values.shape[-1])
        halves = values[:, 0] | values[:, 1] << 4
        target = targets[start : start + 16 * tile]
        target.view(-1, halves.shape[-1], tile // 2).copy_(halves.transpose(1, 2))
    return tiled


def unpack_int4(codes, tile=None):
    """Codes 0 … 15, uint8 (R, C), of bytes (C / 2 / G, R, G) before or after `tile_int4`."""
    num_groups, num_rows, group_size = codes.shape
    num_columns = 2 * num_groups * group_size
    if tile is None:
        values = ops.transpose(ops.stack(halves_of_int4(codes)), (2, 0, 1, 3))
        return ops.reshape(values, (-1, num_columns))
    if torch.is_tensor(tile):
        tiles = _half_bytes(codes.reshape(num_rows // 8, -1, 4 * _INT4_COLUMNS))
        return tiles[..., tile].transpose(1, 2).reshape(num_rows, num_columns)
    tiles = codes.reshape(-1, num_columns, tile // 2).transpose(1, 2)
    return torch.stack([tiles & 15, tiles >> 4], dim=1).view(-1, num_columns)


def decode_int4(codes, scales, tile, dtype):
    """Rows of a matrix as torch's product of int4 on a CPU keeps them, for many rows of inputs.

    Args:
        codes: uint8 (C / 2 / G, R, G) as `tile_int4` returns them.
        scales: bfloat16 (groups, R, 2), scales and offsets.
        tile: int, see `int4_tile`.
        dtype: dtype of the result.

    Returns:
        float (R, C). In memory its columns lie together, as the bytes of a tile do.
    """
    num_groups, num_rows, group_size = codes.shape
    dtype = to_torch_dtype(dtype)
    tiles = codes.view(num_rows // tile, -1, tile // 2).transpose(0, 1)
    columns = torch.empty(*tiles.shape[:2], 2, tile // 2, dtype=dtype)
    columns[:, :, 0], columns[:, :, 1] = tiles & 15, tiles >> 4
    columns = columns.view(2 * num_groups, group_size, num_rows).sub_(8)
    scale, offset = scales.to(dtype).permute(2, 0, 1).contiguous()[:, :, None]
    return torch.addcmul(offset, columns, scale).view(-1, num_rows).t()


def halves_of_int4(codes):
    """Lower and upper halves of bytes: two tensors 0 … 15, uint8 of the shape of `codes`."""
    if BACKEND == "torch":  # Keras would copy each number to the device first
        return codes & 15, codes >> 4
    mask, bits = ops.cast(15, "uint8"), ops.cast(4, "uint8")
    return ops.bitwise_and(codes, mask), ops.right_shift(codes, bits)


def take_in_groups(array, rows):
    """Rows int (n,) of each group in (groups, R, C): (groups, n, C)."""
    if BACKEND != "jax":
        return ops.take(array, rows, axis=1)
    # Else a TPU's compiler lays the whole array out anew.
    places = jnp.broadcast_to(rows[:, None], (array.shape[0], *rows.shape, 1))
    return jnp.take_along_axis(array, places, axis=1)


def take_int4(codes, rows, tile):
    """Rows of a matrix by their numbers.

    Args:
        codes: uint8 (C / 2 / G, R, G) as `tile_int4` returns them.
        rows: int (...).
        tile: see `int4_tile`.

    Returns:
        uint8 (..., C), 0 … 15.
    """
    num_columns = 2 * codes.shape[0] * codes.shape[2]
    shape = (*ops.shape(rows), num_columns)
    if tile is None:
        return ops.reshape(unpack_int4(take_in_groups(codes, ops.reshape(rows, -1))), shape)
    if torch.is_tensor(tile):
        tiles = codes.view(codes.shape[1] // 8, -1, 4 * _INT4_COLUMNS)
        columns = torch.arange(tiles.shape[1], device=tiles.device)[:, None]
        places = tile[rows % 8][..., None, :]
        found = tiles[(rows // 8)[..., None, None], columns, places // 2]
        return (found >> (4 * (places % 2)).to(torch.uint8) & 15).reshape(shape)
    tiles = codes.view(-1, num_columns, tile // 2)
    row = rows % tile
    found = tiles[rows // tile, :, row % (tile // 2)]
    return found >> (4 * (row >= tile // 2)).to(torch.uint8)[..., None] & 15


# Variables without values -------------------------------------------------------------------


@contextlib.contextmanager
def variables_without_values():
    """Variables made inside have a shape and a dtype, but neither values nor memory."""
    pending = list(global_state.get_global_attribute("uninitialized_variables", []))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        # Otherwise Keras draws random values at the end of its next stateless scope.
        global_state.set_global_attribute("uninitialized_variables", pending)


def from_numpy(array, dtype):
    """A tensor of an array, perhaps in its memory. Threads may call it side by side.

    Args:
        array: NumPy array, perhaps a transposed view. Must not be used again.
        dtype: str, dtype of the tensor.

    Returns:
        tensor of the array's shape.
    """
    if BACKEND == "torch":
        # torch reads no ml_dtypes; the bits are the same. A transposed kernel stays transposed:
        # products are no slower.
        is_bfloat16 = array.dtype.name == "bfloat16"
        tensor = torch.from_numpy(array.view("int16") if is_bfloat16 else array)
        tensor = tensor.view(torch.bfloat16) if is_bfloat16 else tensor
        return ops.convert_to_tensor(tensor, dtype=dtype)
    if BACKEND == "jax":
        return jax.device_put(array).astype(dtype)
    if array.ndim == 2 and array.flags.f_contiguous:
        return tf.cast(tf.transpose(_tf_tensor(array.T)), dtype)  # 4 × NumPy's speed
    return tf.cast(_tf_tensor(array), dtype)


def set_value(variable, tensor):
    """Gives a variable its value, a tensor, whether it has one already or not."""
    if variable._value is None:
        variable._initialize(tensor)
    else:
        variable.assign(tensor)


def _tf_tensor(array):
    """A tensor of TensorFlow in the memory of the array, if that is aligned as it wants."""
    if not array.flags.c_contiguous or not array.flags.writeable or array.ctypes.data % 64:
        return tf.constant(array)
    bits = array.view(f"uint{8 * array.itemsize}")  # DLPack knows no ml_dtypes
    return tf.bitcast(tf.experimental.dlpack.from_dlpack(bits.__dlpack__()), array.dtype.name)
