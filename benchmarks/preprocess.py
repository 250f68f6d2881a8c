"""JPEG files to model inputs: images a second on one core, beside transformers and keras_hub.

    python benchmarks/preprocess.py [--sizes 640x480 1600x1200 4000x3000] [--image-size 224]

One photograph of scikit-learn, enlarged to each size and written as JPEG (quality 90). transformers
and keras_hub read files with Pillow. The contestants take turns in one process bound to one core.
"""

import argparse
import os
import pathlib
import statistics
import tempfile
import time

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import keras
import keras_hub
import numpy as np
import sklearn.datasets
import transformers
from PIL import Image

import keras_pg2
from keras_pg2.checkpoints.presets import TINY


def write_images(folder, size, count):
    photograph = Image.fromarray(sklearn.datasets.load_sample_image("china.jpg"))
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        photograph.rotate(2 * i).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return paths


def contestants(image_size):
    tokenizer = keras_pg2.PaliGemma2.from_preset(TINY).preprocessor.tokenizer
    ours = keras_pg2.Preprocessor(tokenizer, image_size)
    ours_bicubic = keras_pg2.Preprocessor(tokenizer, image_size, interpolation="bicubic")
    size = {"height": image_size, "width": image_size}
    processor = transformers.SiglipImageProcessor(size=size)
    converter = keras_hub.layers.PaliGemmaImageConverter(
        image_size=(image_size, image_size), scale=1 / 127.5, offset=-1
    )

    def transformers_images(paths):
        images = [Image.open(path).convert("RGB") for path in paths]
        return np.asarray(processor(images, return_tensors="np")["pixel_values"])

    def keras_hub_images(paths):
        return np.stack(
            [keras.ops.convert_to_numpy(converter(np.asarray(Image.open(p)))) for p in paths]
        )

    return {
        "keras_pg2": lambda paths: ours.load_images([[path] for path in paths]),
        "keras_pg2 bicubic": lambda paths: ours_bicubic.load_images([[path] for path in paths]),
        "transformers": transformers_images,
        "keras_hub": keras_hub_images,
        "Pillow alone": lambda paths: [Image.open(path).load() for path in paths],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=["640x480", "1600x1200", "4000x3000"])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--count", type=int, default=8, help="images")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    os.sched_setaffinity(0, {0})
    functions = contestants(options.image_size)
    print("| images/s, one core | " + " | ".join(functions) + " |")
    print("|---" * (len(functions) + 1) + "|")
    for name in options.sizes:
        seconds = {function: [] for function in functions}
        with tempfile.TemporaryDirectory() as folder:
            size = tuple(int(side) for side in name.split("x"))
            paths = write_images(pathlib.Path(folder), size, options.count)
            for _ in range(options.repeat + 1):  # the first is not counted
                for function, load in functions.items():
                    start = time.perf_counter()
                    load(paths)
                    seconds[function].append(time.perf_counter() - start)
        medians = [statistics.median(times[1:]) for times in seconds.values()]
        rates = [f"{options.count / median:.1f} ({medians[0] / median:.2f})" for median in medians]
        print(f"| {name} | " + " | ".join(rates) + " |")
    print("\nIn brackets: the rate over that of keras_pg2.")


if __name__ == "__main__":
    main()
