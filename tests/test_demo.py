"""The web page, in a real browser."""

import json
import shutil
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

import keras_pg2
from keras_pg2 import tasks
from keras_pg2.checkpoints.presets import TINY
from keras_pg2.tiny import SAMPLES

# Gradio 6 holds Pillow below 13, whose bicubic the goldens of preprocessing need: not in "test".
demo = pytest.importorskip("keras_pg2.demo", reason="gradio is not installed")
safehttpx = pytest.importorskip("safehttpx", reason="what Gradio fetches addresses with")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.slow

# A page on this machine needs none of what a browser asks of the network.
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
_IMAGES = "img[src*='/file=']"  # and not the icons of the page


@pytest.fixture(scope="module")
def model():
    return keras_pg2.PaliGemma2.from_preset(TINY, dtype="float32")


@pytest.fixture(scope="module")
def server(model):
    page = demo.launch(model, TINY, port=0)
    yield page
    page.close()


@pytest.fixture
def page(server):
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=_FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.goto(server.local_url)
        page.get_by_role("button", name="Run").wait_for()
        yield page
        browser.close()


def run(page, expected):
    """Presses the button and waits for the answer."""
    page.get_by_role("button", name="Run").click()
    box = page.get_by_label("Answer", exact=True)
    for _ in range(600):
        if box.input_value() == expected:
            break
        time.sleep(0.1)
    assert box.input_value() == expected
    return box


def wait_for_image(page):
    page.locator(_IMAGES).first.wait_for()


def test_tasks(page, model, tmp_path):
    page.get_by_label("shapes", exact=True).check()
    wait_for_image(page)
    run(page, model.caption(SAMPLES["shapes"]))
    page.get_by_label("answer", exact=True).check()
    page.get_by_label("Question").fill("how many objects are there?")
    run(page, model.answer(SAMPLES["shapes"], "how many objects are there?"))
    page.get_by_label("segment", exact=True).check()
    page.get_by_label("What to find").fill("heart")
    found = model.segment(SAMPLES["shapes"], "heart")
    run(page, found.text)
    page.get_by_text(f"{found[0].score:.0%}").first.wait_for(state="attached")  # in the table
    assert page.locator(_IMAGES).count() == 2  # the image, and what was found
    page.screenshot(path=tmp_path / "page.png")


def test_upload(page, model, tmp_path):
    path = tmp_path / "mine.png"
    Image.open(SAMPLES["star"]).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    page.locator("input[accept='image/*']").set_input_files(path)
    wait_for_image(page)
    page.get_by_label("detect", exact=True).check()
    page.get_by_label("What to find").fill("star")
    run(page, model.detect(str(path), "star").text)
    assert page.locator(_IMAGES).count() == 2


def test_sixteen_bits(page, model, tmp_path):
    levels = np.asarray(Image.open(SAMPLES["mixed"]).convert("L")).astype("uint16") * 257
    Image.fromarray(levels).save(tmp_path / "deep.png")
    page.locator("input[accept='image/*']").set_input_files(tmp_path / "deep.png")
    wait_for_image(page)
    run(page, model.caption(tmp_path / "deep.png"))
    assert page.locator(_IMAGES).count() == 1  # it is not sent back with each piece


def test_another_language(page, model):
    page.get_by_label("star", exact=True).check()
    wait_for_image(page)
    page.get_by_label("Language").fill("vi")
    page.get_by_label("Language").press("Enter")
    expected = model.caption(SAMPLES["star"], lang="vi")
    assert expected != model.caption(SAMPLES["star"])
    run(page, expected)


def test_stop(page, model, monkeypatch):
    def never_ending(*args, **kwargs):
        yield "once"
        while True:
            time.sleep(0.05)
            yield ""

    monkeypatch.setattr(model, "stream", never_ending)
    page.get_by_label("star", exact=True).check()
    wait_for_image(page)
    run(page, "once")
    page.get_by_role("button", name="Stop").click()
    monkeypatch.undo()
    box = run(page, model.caption(SAMPLES["star"]))
    time.sleep(0.5)
    assert box.input_value() == model.caption(SAMPLES["star"])  # what was stopped says no more


def test_what_was_stopped_delays_the_next(page, model, monkeypatch):
    """The thread of a run that was stopped goes on: two must not fill the memory."""
    running, most = [], []

    def slow(image, text):
        running.append(text)
        most.append(len(running))
        time.sleep(2)
        running.pop()
        return tasks.Detections((), image.width, image.height)

    monkeypatch.setattr(model, "detect", slow)
    page.get_by_label("star", exact=True).check()
    wait_for_image(page)
    page.get_by_label("detect", exact=True).check()
    page.get_by_role("button", name="Run").click()
    while not most:
        time.sleep(0.05)
    page.get_by_role("button", name="Stop").click()
    run(page, "nothing found")
    assert most == [1, 1]


def test_ports(server, model):
    with pytest.raises(ValueError, match="port=70000"):
        demo.launch(model, port=70_000)
    with pytest.raises(OSError, match=f"port {server.server_port} of 127.0.0.1: the port may be"):
        demo.launch(model, port=server.server_port)


def test_errors_are_shown(page):
    page.get_by_role("button", name="Run").click()
    page.get_by_text("choose a sample").wait_for()
    page.get_by_label("shapes", exact=True).check()
    wait_for_image(page)
    page.get_by_label("detect", exact=True).check()
    page.get_by_label("What to find").fill(" ")
    page.get_by_role("button", name="Run").click()
    page.get_by_text("`things`").wait_for()
    assert page.get_by_label("Answer", exact=True).input_value() == ""


def send_image(server, path):
    """The server's answer to a client that says where its image lies."""
    return send(server, {"path": path, "meta": {"_type": "gradio.FileData"}})


def send(server, image):
    call = f"{server.local_url}gradio_api/call/run"
    body = json.dumps({"data": [image, "caption", "", "en"]}).encode()
    request = urllib.request.Request(call, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        event = json.load(response)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}") as response:
        return response.read().decode()


def status_of(url):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(url)
    return caught.value.code


def test_errors_of_visitors_do_not_fill_the_terminal(server, capsys):
    assert "choose a sample" in send(server, None)
    assert "Traceback" not in capsys.readouterr().err


def test_paths_of_a_client_are_not_opened(server, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    assert "event: error" in send_image(server, str(secret))
    assert status_of(f"{server.local_url}gradio_api/file={secret}") in (403, 404)


def test_addresses_of_a_client_are_not_fetched(server, monkeypatch):
    fetched = []
    monkeypatch.setattr(safehttpx, "get", lambda url, **_: fetched.append(url))
    address = "https://example.com/cat.png"
    assert "addresses are not fetched" in send_image(server, address)
    assert status_of(f"{server.local_url}gradio_api/file={address}") == 403
    assert not fetched


def test_only_this_machine_is_served(server):
    assert server.local_url.startswith("http://127.0.0.1:")
    assert server.share_url is None
    assert server.max_file_size == 10 * 2**20
