"""What precision costs in quality: the embedded preset's scores in each dtype and quantized.

    KERAS_BACKEND=torch python benchmarks/quality.py [--num-examples 500]

Greedy answers about the same held-out scenes, scored as in the model card. A row is a score, from 0
to 1; the last one is the size of the weights.
"""

import argparse
import math

import keras
import numpy as np
import tqdm

import keras_pg2
from keras_pg2.checkpoints.presets import TINY
from keras_pg2.tiny.evaluate import evaluate

WAYS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "int4 by 32": {
        "dtype": "bfloat16",
        "quantize": keras.quantizers.Int4QuantizationConfig(block_size=32),
    },
    "int4 by 128": {"dtype": "bfloat16", "quantize": "int4"},
}


def megabytes(model):
    """Of the weights."""
    return sum(math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in model.variables) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-examples", type=int, default=500, help="of each task")
    options = parser.parse_args()
    columns = {}
    for name, how in tqdm.tqdm(WAYS.items()):
        model = keras_pg2.PaliGemma2.from_preset(TINY, **how)
        scores = evaluate(model, options.num_examples)
        columns[name] = {k: v for k, v in scores.items() if k.count("/") == 1}
        columns[name]["MB"] = megabytes(model)
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in columns["float32"]:
        cells = [
            f"{scores[row]:.1f}" if row == "MB" else f"{scores[row]:.3f}"
            for scores in columns.values()
        ]
        print(f"| {row} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
