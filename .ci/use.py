"""Use what is installed: the library is there, and a module runs on it, forward and backward."""

import platform

import torch

import fastadapters
from fastadapters import backends

if backends.library_error is not None:
    raise SystemExit(backends.library_error)
adapter = fastadapters.BottleneckAdapter(768, 64)
x = torch.randn(2, 197, 768, requires_grad=True)
(decision,) = fastadapters.explain(adapter, x)
if decision.backend != "cpu":
    raise SystemExit(f"{decision}")
y = adapter(x)
y.sum().backward()
if not torch.equal(y, x) or x.grad is None or not torch.equal(x.grad, torch.ones_like(x)):
    raise SystemExit("the adapter is not the identity")
print(f"Python {platform.python_version()}, torch {torch.__version__}: {decision}")
