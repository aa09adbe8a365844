"""Names of files, and that nothing is written or removed elsewhere."""

import urllib.parse

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qupeD_jax.checks import BadInput
from qupeD_jax.io import files
from qupeD_jax.results import metrics, plots
from qupeD_jax.study import folders

TEXTS = st.text(st.characters(codec=None), max_size=20) | st.text(alphabet="._/ %~a", max_size=4)


@given(text=TEXTS)
@example("..")
@example("QuPeD w/ KD")
@example("\ud800")
def test_a_name_is_one_part_of_a_path_and_can_be_read_back(text):
  name = files.name_of(text)
  assert name not in ("", ".", "..")
  assert name.isascii()
  assert not {"/", "\\", "\0"} & set(name)
  back = urllib.parse.unquote(name.replace("_", " "), errors="surrogatepass")
  assert back == (text or "%")


@given(one=TEXTS, other=TEXTS, more=st.sampled_from([0, 200, 5000]))
def test_two_texts_never_share_a_name(one, other, more):
  one, other = "x" * more + one, "x" * more + other
  assert (files.name_of(one) == files.name_of(other)) == (one == other)
  assert len(files.name_of(one)) < 200


# --- nothing outside the results folder is touched

LINKED = ["metrics.jsonl", "models", "snapshots", "checkpoints", "clients.png", ".lock",
          "models/QuPeD", "snapshots/QuPeD", "models/QuPeD/client_0000.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_the_results_folder_is_refused_and_not_followed(tmp_path, name):
  folder, outside = tmp_path / "results", tmp_path / "outside"
  (outside / "QuPeD").mkdir(parents=True)
  for kept in ("QuPeD/client_0000.safetensors", "QuPeD/1.npz", "file"):
    (outside / kept).write_text("mine")
  (folder / name).parent.mkdir(parents=True, exist_ok=True)
  (folder / name).symlink_to(outside / "file" if "." in name else outside)
  with (
    pytest.raises(BadInput, match=f"{folder / name}: is a link; "),
    folders.held(folder),
  ):
    folders.begin(folder, {}, ["QuPeD"], lambda folder: (), fresh=True, say=print)
  assert [path.read_text() for path in outside.rglob("*") if path.is_file()] == 3 * ["mine"]


def test_a_results_folder_may_be_a_link_itself_and_hold_links_of_its_owner(tmp_path):
  (tmp_path / "scratch").mkdir()
  (tmp_path / "results").symlink_to(tmp_path / "scratch")
  (tmp_path / "scratch" / "notes").symlink_to(tmp_path)
  with folders.held(tmp_path / "results"):
    assert (tmp_path / "scratch" / ".lock").exists()


def test_a_file_that_is_replaced_is_replaced_and_not_written_through(tmp_path):
  (tmp_path / "outside").write_text("mine")
  for name in ("summary.json", "summary.json.partial", "weights.png"):
    (tmp_path / name).symlink_to(tmp_path / "outside")
  metrics.write_summary(tmp_path, {})
  plots.pareto([("FedAvg", "32 bit", 1000, 0.5, 0.1)], tmp_path / "weights.png")
  assert (tmp_path / "outside").read_text() == "mine"
