"""The page that runs a model, in a real browser without a screen."""

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from qupeD_jax.checks import BadInput
from qupeD_jax.io import images, predict, web
from tests import shipped as toys

BROWSER = [shutil.which(name) for name in ("chromium", "chromedriver")]
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # of the WebDriver protocol


class Driver:
  """A browser, told what to do by the WebDriver protocol."""

  def __init__(self, port, folder):
    self._base = f"http://127.0.0.1:{port}"
    chrome = {"binary": BROWSER[0], "args": [*ARGUMENTS, f"--user-data-dir={folder}"]}
    capabilities = {"alwaysMatch": {"goog:chromeOptions": chrome}}
    self._base += "/session/" + self.post("/session", capabilities=capabilities)["sessionId"]

  def post(self, path, **body):
    request = urllib.request.Request(
      self._base + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
      return json.load(answer)["value"]

  def get(self, path):
    with urllib.request.urlopen(self._base + path, timeout=60) as answer:
      return json.load(answer)["value"]

  def run(self, script, *args):
    return self.post("/execute/sync", script=script, args=args)

  def wait(self, condition):
    """Waits until a JavaScript expression holds; a failure that the page shows ends it."""
    for _ in range(600):
      if self.run(f"return {condition}"):
        return
      failed = self.run("const s = document.querySelector('footer.bad'); return s?.textContent")
      assert not failed, failed
      time.sleep(0.1)
    pytest.fail(f"{condition} never held")

  def find(self, selector):
    element = self.post("/element", using="css selector", value=selector)
    return element[ELEMENT]

  def drag(self, selector, points):
    """Draws with the mouse: points from the middle of an element, in pixels."""
    origin = {ELEMENT: self.find(selector)}
    move = lambda x, y: {"type": "pointerMove", "duration": 0, "x": x, "y": y, "origin": origin}
    first, *rest = points
    acts = [move(*first), {"type": "pointerDown", "button": 0}]
    acts += [*(move(*point) for point in rest), {"type": "pointerUp", "button": 0}]
    self.post("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": acts}])

  def probabilities(self):
    self.wait("document.querySelector('#bars .best')")
    bars = "[...document.querySelectorAll('#bars li')]"
    return self.run(f"return {bars}.map((bar) => Number(bar.dataset.probability))")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  """The page of a model, served."""
  pytest.importorskip("onnx", reason="requirements/export.txt is not installed")
  folder = tmp_path_factory.mktemp("web") / "page"
  try:
    web.runtime()
  except BadInput as error:
    pytest.skip(f"the page's runtime is not there: {error}")
  web.save(folder, toys.shipped("mlp", 2))
  with web.server(folder, port=0) as running:
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{running.server_port}/"
    running.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  if not all(BROWSER):
    pytest.skip("chromium and chromedriver are not installed")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  process = subprocess.Popen(
    [BROWSER[1], f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  try:
    for _ in range(300):
      try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).close()
        break
      except urllib.error.URLError:
        time.sleep(0.1)
    driver = Driver(port, tmp_path_factory.mktemp("profile"))
    yield driver
    urllib.request.urlopen(urllib.request.Request(driver._base, method="DELETE")).close()
  finally:
    process.terminate()
    process.wait()


def test_the_folder_holds_all_that_the_page_needs(page):
  folder, _ = page
  names = {"index.html", "style.css", "app.js", "ort.js", "ort.wasm", "model.onnx", "model.json"}
  assert {path.name for path in folder.iterdir()} == names
  about = json.loads((folder / "model.json").read_text())
  assert about["bytes"] == (folder / "model.onnx").stat().st_size
  assert about["bytes_in_float32"] == 4 * (64 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10)


def test_the_browser_says_of_an_image_what_predict_says(page, browser, tmp_path):
  _, url = page
  pixels = toys.images(1)[0]
  images.write(tmp_path / "image.png", pixels, white=16)
  browser.post("/url", url=url)
  browser.wait("document.body.dataset.ready")
  browser.post(f"/element/{browser.find('#file')}/value", text=str(tmp_path / "image.png"))
  found = browser.probabilities()
  source = toys.save(tmp_path, toys.shipped("mlp", 2))
  named = images.read(tmp_path / "image.png", toys.shipped("mlp", 2).about)
  expected = next(predict.predict(predict.open_model(source), named)).probabilities
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_strokes_become_an_image_and_the_image_an_answer(page, browser):
  _, url = page
  browser.post("/url", url=url)
  browser.wait("document.body.dataset.ready")
  browser.drag("#pad", [(0, -100), (5, 0), (0, 100)])
  assert sum(browser.probabilities()) == pytest.approx(1)
  seen = browser.run(
    "const c = document.querySelector('#seen');"
    "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
    "return [...d].filter((_, i) => i % 4 == 0)"
  )
  seen = np.array(seen).reshape(8, 8)
  assert (seen[:, 3:5].min(axis=1) > 60).all()  # one stroke down the middle, from edge to edge
  assert not seen[:, [0, 1, 6, 7]].any()
  assert "2 bits a weight" in browser.run("return document.querySelector('#subtitle').textContent")
  assert "verified" in browser.run("return document.querySelector('#status').textContent")
  browser.post(f"/element/{browser.find('#clear')}/click")
  assert not browser.run("return document.querySelector('#bars .best')")


def test_a_damaged_model_is_not_run(page, browser):
  folder, url = page
  whole = (folder / "model.onnx").read_bytes()
  damaged = bytearray(whole)
  damaged[len(damaged) // 2] ^= 1
  (folder / "model.onnx").write_bytes(damaged)
  try:
    browser.post("/url", url=url)
    shown = "document.querySelector('footer.bad')"
    for _ in range(300):
      if browser.run(f"return {shown}"):
        break
      time.sleep(0.1)
    assert "model.onnx is damaged" in browser.run(f"return {shown}.textContent")
  finally:
    (folder / "model.onnx").write_bytes(whole)


def test_a_port_that_is_taken_is_named(tmp_path, capsys):
  (tmp_path / web.MODEL).touch()
  with web.server(tmp_path, port=0) as running:
    assert web.main([str(tmp_path), "--port", str(running.server_port)]) == 2
  assert f"error: --port {running.server_port}: " in capsys.readouterr().err


def test_without_npm_one_line_says_so(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(shutil, "which", lambda name: None)
  with pytest.raises(BadInput, match="npm is not installed"):
    web.runtime()


def test_a_runtime_that_was_tampered_with_is_refused(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  folder = tmp_path / "qupeD_jax" / f"onnxruntime-web-{web.VERSION}"
  folder.mkdir(parents=True)
  for name, _ in web.RUNTIME.values():
    (folder / name).write_text("other")
  with pytest.raises(BadInput, match="SHA-256"):
    web.runtime()


def test_pictures_are_read_as_they_were_written(tmp_path):
  pixels = toys.images(1)[0]
  images.write(tmp_path / "a.png", pixels, white=16)
  assert Image.open(tmp_path / "a.png").size == (8, 8)
  (named,) = images.read(tmp_path / "a.png", toys.shipped().about)
  np.testing.assert_array_equal(named.pixels, pixels)
