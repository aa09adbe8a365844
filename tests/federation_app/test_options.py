"""The app's options are an experiment's, and what is typed is refused in one line."""

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: make federation-tools")

from federation_app.loopback.__main__ import defaults
from federation_app.quped_app import options
from qupeD_jax.checks import BadInput
from qupeD_jax.study.options import Options, flat

NODE = {"client": 0, "bits": 2, "model": "mlp", "rows": "r.npz", "folder": "kept"}


def test_options_have_an_experiments_names_and_defaults():
  ours, theirs = defaults(), flat(Options())
  settings = options.read(ours)
  differ = {"rounds", "finetune_rounds", "out"}
  assert {name for name in ours if name in theirs and name not in differ | {"aggregate"}} == {
    name for name in ours if name in theirs and ours[name] == theirs[name]
  }
  assert flat(settings.options) | {name: theirs[name] for name in differ} == theirs
  assert set(ours) - set(theirs) == options._OWN.keys() | {"models"} & set(ours)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"method": "fedsgd"}, "method fedsgd: allowed is quped, fedavg, ditto, local"),
    ({"rounds": 2.5}, "rounds 2.5: allowed is a whole number"),
    ({"lambda_p": "much"}, "lambda_p much: allowed is a number"),
    ({"lambda_p": 1.5}, "lambda_p 1.5: allowed is in [0, 1)"),
    ({"lambda": 0.5}, "lambda: belongs to no option; nearest is lambda_p"),
    ({"aggregate": "sum"}, "aggregate sum: allowed is mean, weighted_mean, median, "),
    ({"min_clients": 3}, "min_clients 3: allowed is a whole number of at most 2"),
    ({"timeout": 0}, "timeout 0.0: allowed is a finite number above 0"),
    ({"image_shape": "8x8"}, "image_shape 8x8: allowed is a whole number, or several with spaces"),
  ],
)
def test_a_bad_option_is_one_line(changes, message):
  with pytest.raises(BadInput, match="^" + message.replace("[", r"\[").replace(")", r"\)")):
    options.read(defaults() | changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"bits": 9}, "bits 9: allowed is 1 to 8, or 32 for full precision"),
    ({"client": -1}, "client -1: allowed is a whole number of at least 0"),
    ({"model": "vgg"}, "model vgg: allowed is mlp, "),
    ({"row": "r.npz"}, "row: belongs to no option; nearest is rows"),
  ],
)
def test_a_bad_node_is_one_line(changes, message):
  with pytest.raises(BadInput, match="^" + message):
    options.read_node(NODE | changes)


def test_a_node_needs_all_of_it():
  with pytest.raises(BadInput, match=r"^folder: missing in the node's config; needed are client, "):
    options.read_node({name: NODE[name] for name in NODE if name != "folder"})
