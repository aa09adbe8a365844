"""Post-training quantisation: models are trained at full precision and quantised when shipped.

With k-means centers this is the weight sharing of Han, Mao, Dally, "Deep Compression", ICLR 2016,
without their retraining.
"""

import jax

from qupeD_jax import checks
from qupeD_jax.quantization import ops
from qupeD_jax.types import Algorithm, Quantizer, Scored


def with_post_training_quantisation(algorithm: Algorithm, quantizer: Quantizer) -> Algorithm:
  """Wraps an algorithm so that its personal models are quantised before they are scored.

  Args:
    algorithm: one whose personal models, one per client, are at full precision while they train.
    quantizer: its `init` makes the codebooks of each client's model, as its bits allow; such as
      `quantizers.learned_codebook(init=ops.kmeans_centers)`.

  Returns:
    The same Algorithm, scored as "personal" (quantised), "unquantised" and whatever else it shows.

  Raises:
    BadInput: when scored, if clients have no models of their own.
  """

  def quantise(variables, bits):
    params = variables["params"]
    codebooks = quantizer.init(params, bits)
    return {**variables, "params": ops.harden(params, codebooks)}, codebooks

  def personalize(key, state, data, cohorts):
    shown = algorithm.personalize(key, state, data, cohorts)
    trained = shown["personal"]
    own = all(scored.stacked for scored in trained)
    checks.require(own, "algorithm", "with one model for all", "one with a model per client")
    shipped = []
    for scored, cohort in zip(trained, cohorts, strict=True):
      variables, codebooks = jax.vmap(quantise)(scored.variables, cohort.bits)
      shipped.append(Scored(scored.model, variables, stacked=True, codebooks=codebooks))
    return {**shown, "personal": tuple(shipped), "unquantised": trained}

  return algorithm._replace(personalize=personalize)
