"""Eight clients of two architectures, and the algorithms that several tests train them with."""

import jax
import jax.numpy as jnp

from qupeD_jax.federation.algorithm1 import Rates
from qupeD_jax.federation.clients import LocalWork
from qupeD_jax.quantization import ops, quantizers
from tests import toy
from tests.flat import local, quped

MODELS = (toy.linear(), toy.mlp(8))
SERVER = MODELS[1]
QUANTIZER = quantizers.learned_codebook(max_bits=2)
RATES = Rates(0.1, 0.01, 0.01)
STEPS = {"work": LocalWork(steps=3, batch_size=4)}
KEY = jax.random.key(7)
DATA = jax.tree.map(jnp.asarray, toy.dataset(96))
BITS = {0: 1, 1: 2, 2: 32, 3: 2, 4: 1, 5: 2, 6: 32, 7: 1}
KMEANS = quantizers.learned_codebook(max_bits=2, init=ops.kmeans_centers)
# The order of clients changes the order in which the server adds, and XLA may tile a product over
# fewer clients in another way: sums of a few float32 terms of size 1, three rounds long.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def cohorts(first=(0, 1, 2, 3), second=(4, 5, 6, 7), padding=2):
  groups = (first, second)
  return tuple(toy.cohort(g, [BITS[i] for i in g], padding=padding) for g in groups)


def make_quped(**options):
  return quped(SERVER, MODELS, QUANTIZER, rates=RATES, **STEPS, **options)


def make_local(quantizer=QUANTIZER):
  return local(MODELS, quantizer, rates=RATES, **STEPS)


# Trained by several tests, which share what jax has traced and compiled of them.
QUPED, LOCAL = make_quped(), make_local()
