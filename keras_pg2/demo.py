"""A web page to try a model on: `keras-pg2 demo`."""

import functools
import threading

import gradio
from PIL import Image
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from keras_pg2 import tasks
from keras_pg2.drawing import draw
from keras_pg2.preprocessing import image_pixels
from keras_pg2.tiny import SAMPLES

_MAX_FILE_SIZE = "10mb"
_MAX_PIXELS = 16 * 10**6
_MAX_TEXT = 400  # characters of a question

# What the field of text is for, by task; "" if the task needs none.
_TEXT_LABELS = {
    "caption": "",
    "answer": "Question",
    "ocr": "",
    "detect": "What to find, such as: star ; heart",
    "segment": "What to find, such as: star ; heart",
    "free prompt": "Prompt, in the words of the training",
}
_FIRST_TEXTS = {
    "answer": "how many objects are there?",
    "detect": "digit",
    "segment": "heart",
    "free prompt": "caption en",
}
# The page shows it; the terminal of the server has no use for what visitors get wrong.
_Refusal = functools.partial(gradio.Error, print_exception=False)


def build(model, title="PaliGemma 2"):
    """The page.

    Args:
        model: PaliGemma2.
        title: str.

    Returns:
        gradio.Blocks. `launch` serves it.
    """
    # Gradio lets one run at a time, but the thread of one that was stopped goes on to its next
    # piece, or to the end.
    lock = threading.Lock()

    def run(image, task, text, lang):
        """Pieces of text, and the image with what was found: tuples as Gradio wants them."""
        if image is None:
            raise _Refusal("Upload an image, or choose a sample.")
        text = text or ""  # nothing was typed yet
        if len(text) + len(lang or "") > _MAX_TEXT:
            raise _Refusal(f"At most {_MAX_TEXT} characters, please.")
        if image.width * image.height > _MAX_PIXELS:
            raise _Refusal(f"At most {_MAX_PIXELS // 10**6} million pixels, please.")
        try:
            image = Image.fromarray(image_pixels(image))
            if task in ("detect", "segment"):
                with lock:
                    found = getattr(model, task)(image, text)
                rows = [
                    [item.label, f"{item.score:.0%}", " ".join(f"{x:.0f}" for x in item.box)]
                    for item in found
                ]
                yield found.text or "nothing found", draw(image, found), rows
                return
            answer, prompt = "", _prompt(task, text, lang)
            pieces = model.stream(image, prompt, **tasks.longest_answer(prompt))
            while True:
                with lock:  # not while it yields: a run that was stopped would keep it
                    piece = next(pieces, None)
                if piece is None:
                    break
                answer += piece
                yield answer, None, []
            if not answer:
                yield "(the answer is empty)", None, []
        except (ValueError, OSError) as error:
            raise _Refusal(str(error)) from error

    def show_fields(task):
        label = _TEXT_LABELS[task]
        return (
            gradio.update(visible=bool(label), label=label, value=_FIRST_TEXTS.get(task, "")),
            gradio.update(visible=task in ("caption", "answer")),
        )

    def load_sample(name):
        # The page sends a name, never a path.
        return Image.open(SAMPLES[name]).convert("RGB") if name in SAMPLES else None

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {title}")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(
                    label="Image",
                    type="pil",
                    format="png",  # Gradio's own choice, WebP, loses detail
                    image_mode=None,  # Gradio makes 16 bits white
                    sources=["upload", "clipboard"],
                )
                sample = gradio.Radio(list(SAMPLES), label="Samples")
                task = gradio.Radio(list(_TEXT_LABELS), value="caption", label="Task")
                text = gradio.Textbox(visible=False, max_length=_MAX_TEXT)
                lang = gradio.Dropdown(
                    ["en", "de", "fr", "vi"],
                    value="en",
                    label="Language, or the code of another",
                    allow_custom_value=True,
                )
                button = gradio.Button("Run", variant="primary")
                stop = gradio.Button("Stop")
            with gradio.Column():
                answer = gradio.Textbox(label="Answer", lines=3)
                drawn = gradio.Image(label="Found", format="png", interactive=False)
                table = gradio.Dataframe(
                    headers=["label", "score", "x1 y1 x2 y2"], label="Objects", interactive=False
                )
        image.async_move_resource_to_block_cache = _refuse_addresses(
            image.async_move_resource_to_block_cache
        )
        sample.change(load_sample, sample, image)
        task.change(show_fields, task, [text, lang])
        inputs, outputs = [image, task, text, lang], [answer, drawn, table]
        runs = [
            button.click(run, inputs, outputs, concurrency_limit=1),
            text.submit(run, inputs, outputs, concurrency_limit=1),
        ]
        stop.click(None, cancels=runs)
    return page


def launch(model, title="PaliGemma 2", host="127.0.0.1", port=7860, share=False):
    """Serves the page, in the background.

    Args:
        model: PaliGemma2.
        title: str.
        host: str, address to listen on. The default is this machine alone.
        port: int, 0 for any that is free.
        share: bool, whether Gradio also gives a public address, by way of its own servers, as a
            hosted notebook needs. Whoever has the address may use the page.

    Returns:
        gradio.Blocks, with `local_url`, `share_url`, `block_thread` and `close`.

    Raises:
        OSError: if the port is taken, or the host is no address of this machine.
        ValueError: if there is no such port.

    Example:
        >>> from keras_pg2 import demo
        >>> page = demo.launch(model, share=True)  # in a Colab or Kaggle notebook
        >>> print(page.share_url)
    """
    if not 0 <= port <= 65_535:
        raise ValueError(f"`port` must be in [0, 65535]. Received: port={port}")
    page = build(model, title)
    try:
        page.queue(max_size=16).launch(
            server_name=host,
            server_port=port or None,
            share=share,
            inbrowser=False,
            quiet=True,
            max_file_size=_MAX_FILE_SIZE,
            app_kwargs={"middleware": [Middleware(_RefuseAddresses)]},
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise OSError(
            f"The page cannot be served on port {port} of {host}: the port may be taken (0 takes "
            f"any that is free), or {host} is no address of this machine."
        ) from error
    return page


def _prompt(task, text, lang):
    if task == "caption":
        return tasks.caption_prompt(lang)
    if task == "answer":
        return tasks.answer_prompt(text, lang)
    return "ocr" if task == "ocr" else text


def _refuse_addresses(move_to_cache):
    """What Gradio calls with a client's image, without fetching an address in its place."""

    async def move_upload_to_cache(path):
        if str(path).lower().startswith(("http:", "https:")):
            raise _Refusal("Upload an image: addresses are not fetched.")
        return await move_to_cache(path)

    return move_upload_to_cache


class _RefuseAddresses:
    """Answers `file=http://…`, which Gradio would fetch, with 403."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        app = self.app
        if "/file=http" in scope.get("path", "").lower():
            app = PlainTextResponse("Addresses are not fetched.", status_code=403)
        await app(scope, receive, send)
