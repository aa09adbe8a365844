"""Pictures of a run: learning curves, the gradient mapping, who holds what, weights gathering at
their centers, the centers themselves, what each client gains over another method, accuracy against
size, and accuracy against the share of the rounds that was FedAvg.

Each picture has two functions: `draw_*` returns the matplotlib Figure, the other one writes it.
Neither touches pyplot, so there is no display and no global state to think of.
"""

# The files are named other than the functions, so that report.curves is never a module.
from qupeD_jax.results.plots.center_paths import centers, draw_centers
from qupeD_jax.results.plots.client_gains import draw_gains, gains
from qupeD_jax.results.plots.held_classes import clients, draw_clients
from qupeD_jax.results.plots.learning_curves import curves, draw_curves
from qupeD_jax.results.plots.pareto_front import draw_pareto, pareto
from qupeD_jax.results.plots.shares_of_averaging import draw_shares, shares
from qupeD_jax.results.plots.stationarity_curves import (
  draw_stationarity,
  has_stationarity,
  stationarity,
)
from qupeD_jax.results.plots.style import DPI, svg
from qupeD_jax.results.plots.weight_histograms import draw_weights, weights

__all__ = [
  "DPI", "centers", "clients", "curves", "draw_centers", "draw_clients", "draw_curves",
  "draw_gains", "draw_pareto", "draw_shares", "draw_stationarity", "draw_weights", "gains",
  "has_stationarity", "pareto", "shares", "stationarity", "svg", "weights",
]  # fmt: skip
