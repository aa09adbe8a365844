"""FedAvg in PyTorch, an optional dependency: a loop over clients, and torch.func.vmap.

Networks, first weights and batches are those of the JAX contenders. All rounds train on the batches
of the first one, which are drawn beforehand: to draw them costs PyTorch nothing here.
"""

import copy
import importlib.util
import time
from collections.abc import Callable

import flax.traverse_util
import jax
import numpy as np

from benchmarks.workload import RATE, Form, Task, first_rows
from qupeD_jax.engine import parallel
from qupeD_jax.io.import_torch import TO_OURS, TO_TORCH
from qupeD_jax.types import PyTree

if importlib.util.find_spec("torch"):
  import torch
  from torch import nn
  from torch.nn import functional
else:
  torch = None


_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def is_installed() -> bool:
  """Tells whether PyTorch can be imported."""
  return torch is not None


def version() -> str | None:
  """Returns PyTorch's version, None where it is not installed."""
  return str(torch.__version__) if is_installed() else None


def can_see_device() -> bool:
  """Tells whether PyTorch runs where JAX does: on the CPU, or on the same GPU."""
  return jax.default_backend() == "cpu" or torch.cuda.is_available()


def looped(task: Task) -> Form:
  """Trains one client after the other, each with a module and an optimiser of its own."""
  device, x, y, rows = _inputs(task)
  server = _load(_network(task), task.state.server).to(device).train()
  clients = range(task.case.clients)

  def start():
    modules = [copy.deepcopy(server) for _ in clients]
    optimizers = [torch.optim.SGD(module.parameters(), RATE) for module in modules]
    return copy.deepcopy(server), modules, optimizers

  def train(module, optimizer, batches):
    for batch in batches:
      optimizer.zero_grad()
      with _computing_in(task, device):
        loss = functional.cross_entropy(module(x[batch]), y[batch])
      loss.backward()
      optimizer.step()

  def one_round(state):
    server, modules, optimizers = state
    for i in clients:
      with torch.no_grad():
        for tensor, given in zip(_tensors(modules[i]), _tensors(server), strict=True):
          tensor.copy_(given)
      train(modules[i], optimizers[i], rows[i])
    with torch.no_grad():
      for mean, *same in zip(_tensors(server), *map(_tensors, modules), strict=True):
        mean.copy_(torch.stack(same).to(torch.float32).mean(0))
    return state

  return _form(start, one_round, device, lambda state: state[0].state_dict())


def vmapped(task: Task) -> Form:
  """Trains all clients side by side by torch.func.vmap over stacked weights."""
  device, x, y, rows = _inputs(task)
  network = _load(_network(task), task.state.server).to(device).train()
  trained = {name for name, _ in network.named_parameters()}
  spread = lambda leaf: leaf.expand(task.case.clients, *leaf.shape).clone()

  def loss_fn(params, buffers, x, y):
    with _computing_in(task, device):
      logits = torch.func.functional_call(network, (params, buffers), (x,))
      return functional.cross_entropy(logits, y)

  gradients = torch.func.vmap(torch.func.grad(loss_fn))

  def one_round(server):
    copies = {name: spread(leaf) for name, leaf in server.items()}
    params = {name: leaf for name, leaf in copies.items() if name in trained}
    buffers = {name: leaf for name, leaf in copies.items() if name not in trained}
    for step in range(task.case.local_steps):
      batch = rows[:, step]
      grads = gradients(params, buffers, x[batch], y[batch])
      params = {name: leaf - RATE * grads[name] for name, leaf in params.items()}
    return {name: leaf.to(torch.float32).mean(0) for name, leaf in (params | buffers).items()}

  start = lambda: {name: leaf.detach() for name, leaf in network.state_dict().items()}
  return _form(start, one_round, device, lambda state: state)


def _form(start: Callable, one_round: Callable, device: str, tensors: Callable) -> Form:
  threads = _fastest_threads(start, one_round) if device == "cpu" else torch.get_num_threads()

  def run(state, rounds: int):
    torch.set_num_threads(threads)
    for _ in range(rounds):
      state = one_round(state)
    return state

  def wait(state):
    del state
    if device == "cuda":
      torch.cuda.synchronize()

  return Form(start, run, wait, lambda state: (_to_ours(tensors(state)), ()))


def _fastest_threads(start: Callable, one_round: Callable) -> int:
  """Chooses between one thread and one per core: small tensors, or busy cores, ask for one."""
  seconds = {}
  for threads in (1, parallel.cores()):
    torch.set_num_threads(threads)
    state = one_round(start())
    begin = time.perf_counter()
    one_round(state)
    seconds[threads] = time.perf_counter() - begin
  return min(seconds, key=seconds.get)


def _tensors(module: "nn.Module") -> list:
  return [*module.parameters(), *module.buffers()]


def _inputs(task: Task):
  """Returns the device and, on it, images NCHW, labels, and the rows of the batches."""
  device = "cpu" if jax.default_backend() == "cpu" else "cuda"
  # JAX multiplies float32 in TF32 on GPUs that have it, and so shall PyTorch.
  torch.set_float32_matmul_precision("high")
  arrays = np.moveaxis(np.asarray(task.data.x), -1, 1), task.data.y, first_rows(task)
  x, y, rows = (torch.from_numpy(np.array(array, order="C")).to(device) for array in arrays)
  return device, x, y.long(), rows.long()


def _computing_in(task: Task, device: str):
  """Returns the context in which a forward pass computes in the case's dtype."""
  return torch.autocast(device, torch.bfloat16, enabled=task.case.dtype == "bfloat16")


# --- networks, whose modules and their order of features are ours


def _network(task: Task) -> "nn.Module":
  """Makes the modules that a model's variables ask for."""
  shapes = flax.traverse_util.flatten_dict(task.state.server["params"], sep="/")
  kernels = {p.rpartition("/")[0]: k.shape for p, k in shapes.items() if p.endswith("/kernel")}
  if task.case.model.startswith("resnet"):
    return _ResNet({path.replace("/", "."): shape for path, shape in kernels.items()})
  return _Plain(kernels)


if is_installed():

  class _Plain(nn.Module):
    """Convolutions with ReLU and pooling, then dense layers with ReLU between them."""

    def __init__(self, kernels):
      super().__init__()
      self.order = [name for name in kernels if name != "head"]
      self.order.sort(key=lambda name: (name != "stem", not name.startswith("conv"), name))
      for name, shape in kernels.items():
        self.add_module(name, _convolution(shape) if len(shape) == 4 else nn.Linear(*shape))

    def forward(self, x):
      x = x.float() / 255
      for name in self.order:
        layer = getattr(self, name)
        if isinstance(layer, nn.Conv2d):
          x = functional.max_pool2d(functional.relu(layer(x)), 2)
        else:
          x = functional.relu(layer(_flat(x)))
      return self.head(x)

  class _Block(nn.Module):
    """Two convolutions around which the input goes by."""

    def __init__(self, channels, features):
      super().__init__()
      self.stride = 1 if channels == features else 2
      self.conv_1 = _convolution((3, 3, channels, features), self.stride, bias=False)
      self.norm_1 = nn.BatchNorm2d(features)
      self.conv_2 = _convolution((3, 3, features, features), bias=False)
      self.norm_2 = nn.BatchNorm2d(features)

    def forward(self, x):
      y = functional.relu(self.norm_1(self.conv_1(x)))
      y = self.norm_2(self.conv_2(y))
      lacking = y.shape[1] - x.shape[1]
      edges = 0, 0, 0, 0, lacking // 2, lacking - lacking // 2
      return functional.relu(y + functional.pad(x[:, :, :: self.stride, :: self.stride], edges))

  class _ResNet(nn.Module):
    """A residual network for small images."""

    def __init__(self, kernels):
      super().__init__()
      self.stem = _convolution(kernels["stem"], bias=False)
      self.stem_norm = nn.BatchNorm2d(kernels["stem"][-1])
      firsts = sorted(name for name in kernels if name.endswith("conv_1"))
      self.order = [name.removesuffix(".conv_1") for name in firsts]
      for name, first in zip(self.order, firsts, strict=True):
        self.add_module(name, _Block(*kernels[first][2:]))
      self.head = nn.Linear(*kernels["head"])

    def forward(self, x):
      x = functional.relu(self.stem_norm(self.stem(x.float() / 255)))
      for name in self.order:
        x = getattr(self, name)(x)
      return self.head(x.mean((2, 3)))


def _convolution(shape, stride: int = 1, *, bias: bool = True) -> "nn.Module":
  size, _, channels, features = shape
  return nn.Conv2d(channels, features, size, stride, padding=size // 2, bias=bias)


def _flat(x):
  """Lays pixels out as rows in our order of features, channels last."""
  return x.permute(0, 2, 3, 1).flatten(1) if x.dim() == 4 else x


def _load(network: "nn.Module", variables: PyTree) -> "nn.Module":
  """Gives a network our variables."""
  flat = flax.traverse_util.flatten_dict(variables["params"], sep="/")
  for stats in variables["stats"].values():
    flat |= flax.traverse_util.flatten_dict(stats, sep="/")
  theirs = {_torch_name(path): _tensor(leaf) for path, leaf in flat.items()}
  counts = {name: leaf for name, leaf in network.state_dict().items() if name.endswith("tracked")}
  network.load_state_dict(theirs | counts)
  return network


def _tensor(leaf) -> "torch.Tensor":
  return torch.from_numpy(np.array(np.asarray(leaf).transpose(TO_TORCH[leaf.ndim]), order="C"))


def _torch_name(path: str) -> str:
  """Says what PyTorch calls one of our tensors.

  >>> _torch_name("stage_1_block_0/conv_1/kernel")
  'stage_1_block_0.conv_1.weight'
  """
  *modules, name = path.split("/")
  return ".".join([*modules, _NAMES.get(name, name)])


def _to_ours(tensors) -> PyTree:
  """Returns parameters by our names and in our layout; running statistics are left out."""
  ours = {}
  for name, tensor in tensors.items():
    *modules, kind = name.split(".")
    if kind in ("weight", "bias"):
      array = tensor.detach().cpu().numpy()
      kind = {("weight", 1): "scale", ("bias", 1): "bias"}.get((kind, array.ndim), "kernel")
      ours["/".join([*modules, kind])] = array.transpose(TO_OURS[array.ndim])
  return flax.traverse_util.unflatten_dict(ours, sep="/")
