"""What the noise of `aggregators.clipped_mean` is worth: client-level differential privacy.

McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR
2018, accounted for by Google's dp-accounting in Renyi divergences.

What is covered are the server's models of all rounds, against whoever sees them but knows neither
the key of the noise nor who takes part: a published seed hides nothing, `rng.secret` makes others,
and no key may serve twice. The generator is JAX's, of 64-bit keys and float32 numbers: good for
studies, not for people's data. The server sees every upload and is trusted. What clients report
beside their updates (losses, accuracies, how many updates were dropped) is not private, nor is a
personal model that leaves its client.
"""

import dp_accounting
from dp_accounting import rdp

from qupeD_jax import checks


def epsilon(
  noise_multiplier: float, *, clients: int, participants: int, rounds: int, delta: float
) -> float:
  """Bounds the privacy that clients lose over a training.

  Neighbours are federations that differ in what one client holds; how many clients there are is
  public. Such a change moves the sum of clipped updates by up to twice the bound, so that the noise
  is `noise_multiplier / 2` of what it may hide. Which clients take part is drawn in each round
  anew, without replacement and in secret (Wang, Balle, Kasiviswanathan, "Subsampled Renyi
  Differential Privacy and Analytical Moments Accountant", AISTATS 2019); if all do, each round
  costs the full price.

  Args:
    noise_multiplier: z, the standard deviation of the noise on the sum by the bound of an update.
    clients: from which a round's are drawn.
    participants: how many are.
    rounds: in which clients send updates.
    delta: in (0, 1).

  Returns:
    epsilon; infinity without noise.

  Raises:
    BadInput: an argument is out of range.

  >>> epsilon(8.0, clients=100, participants=100, rounds=1, delta=1e-5) > 0.5
  True
  """
  checks.non_negative("noise_multiplier", noise_multiplier)
  checks.at_least("participants", participants, 1)
  checks.at_least("clients", clients, participants)
  checks.at_least("rounds", rounds, 0)
  checks.require(0 < delta < 1, "delta", delta, "in (0, 1)")
  if noise_multiplier == 0:
    return float("inf") if rounds else 0.0
  accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
  noise = dp_accounting.GaussianDpEvent(noise_multiplier / 2)
  drawn = dp_accounting.SampledWithoutReplacementDpEvent(clients, participants, noise)
  accountant.compose(drawn, rounds)
  return float(accountant.get_epsilon(delta))
