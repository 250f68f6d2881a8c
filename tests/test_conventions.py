"""Rules that the whole package keeps."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

import keras_pg2
from keras_pg2 import _backend, generation

PACKAGE = pathlib.Path(keras_pg2.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def _python(code):
    environment = {**os.environ, "KERAS_BACKEND": _backend.BACKEND}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return result.stdout.strip()


def test_imports_are_light():
    """The package brings neither keras_hub nor transformers, nor a second backend."""
    code = (
        "import sys, keras; before = set(sys.modules); import keras_pg2; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new & {'keras_hub', 'tensorflow', 'transformers', 'torch', 'jax'}))"
    )
    assert _python(code) == "[]"


@pytest.mark.slow_if_compiled
def test_unknown_backend_is_an_error():
    code = (
        "import keras; keras.config.backend = lambda: 'numpy'\n"
        "try:\n    import keras_pg2\nexcept ImportError as error:\n    print(error)"
    )
    assert "KERAS_BACKEND='numpy'. Set the environment variable" in _python(code)


@pytest.mark.parametrize(
    "before",
    [
        "os.environ['KERAS_BACKEND'] = 'mxnet'",
        "sys.modules[os.environ['KERAS_BACKEND']] = None",  # not installed
    ],
)
def test_a_backend_that_is_not_there(before):
    code = (
        f"import os, sys; {before}\n"
        "try:\n    import keras_pg2\nexcept ImportError as error:\n    print(error)"
    )
    installed = r"Keras cannot import its backend: .*KERAS_BACKEND .* installed, here: (.*)\."
    (names,) = re.search(installed, _python(code)).groups()
    assert ("mxnet" in before) == (_backend.BACKEND in names.split(", "))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_backends_are_imported_in_one_file(path):
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    backends = roots & {"jax", "tensorflow", "torch"}
    assert backends == ({"jax", "tensorflow", "torch"} if path.stem == "_backend" else set())


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_library_does_not_print(path):
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert not calls or path.stem == "cli"


def test_public_names_have_docstrings():
    for name in keras_pg2.__all__:
        assert getattr(keras_pg2, name).__doc__, name


@pytest.mark.slow_if_compiled
def test_the_way_from_pixels_to_the_first_token_is_short(model, image):
    """At most 8 files and 1,400 lines: what runs, with docstrings, and what builds it."""
    ran = set()

    def trace(frame, event, argument):
        path = pathlib.Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            ran.add((path.name, frame.f_code.co_qualname.split(".<locals>")[0]))

    keras_pg2.PaliGemma2(model.config)  # warms up Keras
    programs, model.programs = model.programs, _backend.Programs()
    sys.settrace(trace)
    try:
        inputs = model.preprocessor.for_generation([[image]], ["ocr"])
        inputs["images"] = inputs["images"].copy()
        next(generation.token_steps(model, inputs, generation.Greedy(), 1, None, lambda: 1))
    finally:
        sys.settrace(None)
        model.programs = programs
    assert ("preprocessing.py", "Preprocessor.for_generation") in ran
    assert ("gemma.py", "GemmaAttention.call") in ran
    files = {name for name, _ in ran} - {"config.py", "tokenizer.py"}  # tables, and text alone
    lines = 0
    for path in MODULES:
        if path.name not in files:
            continue
        for node in ast.parse(path.read_text()).body:
            functions = [node]
            if isinstance(node, ast.ClassDef) and any(
                name.startswith(f"{node.name}.") for file, name in ran if file == path.name
            ):
                functions = [f for f in node.body if isinstance(f, ast.FunctionDef)]
                lines += functions[0].lineno - node.lineno  # its docstring
            for function in functions:
                name = getattr(function, "name", None)
                if function is not node:
                    name = f"{node.name}.{name}"
                is_construction = str(name).endswith((".__init__", ".build"))
                if (path.name, name) in ran or (is_construction and function is not node):
                    lines += function.end_lineno - function.lineno + 1
    assert len(files) <= 8
    assert lines <= 1400
    assert lines > 500  # the count itself works
