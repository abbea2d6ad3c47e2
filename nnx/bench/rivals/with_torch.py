"""PyTorch, as its documentation has it: eager and `torch.compile`, with fused optimizers."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

Call = Callable[[], object]
OPTIMIZERS: dict[str, Any] = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}


def versions() -> dict[str, str]:
    """Of PyTorch."""
    return {"torch": torch.__version__}


def limit(threads: int) -> None:
    """Of one operation."""
    torch.set_num_threads(threads)


def wait(result: Any) -> None:
    """Nothing: a call returns when it is done."""


def _network(sizes: list[int]) -> nn.Sequential:
    layers: list[Any] = []
    for n, m in itertools.pairwise(sizes):
        layers += [nn.Linear(n, m), nn.Tanh() if sizes[-1] == 1 else nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def step(
    sizes: list[int], x: Any, t: Any, optimizer: str, lr: float, *, compiled: bool = False
) -> Call:
    """A step on one batch."""
    x, t = torch.from_numpy(x), torch.from_numpy(t)
    model = _network(sizes)
    model.train()
    update = OPTIMIZERS[optimizer](model.parameters(), lr=lr, fused=True)
    loss_of = nn.MSELoss() if sizes[-1] == 1 else nn.CrossEntropyLoss()

    def forward(x: Any, t: Any) -> Any:
        return loss_of(model(x), t)

    if compiled:
        torch._dynamo.reset()  # what it knows of other shapes
        forward = torch.compile(forward)

    def call() -> Any:
        update.zero_grad()
        loss = forward(x, t)
        loss.backward()
        update.step()
        return loss

    return call


def compiled_step(sizes: list[int], x: Any, t: Any, optimizer: str, lr: float) -> Call:
    """The same, forward and backward compiled."""
    return step(sizes, x, t, optimizer, lr, compiled=True)


def predict(sizes: list[int], x: Any, *, compiled: bool = False) -> Call:
    """Scores of samples."""
    model = _network(sizes)
    model.eval()
    if compiled:
        torch._dynamo.reset()
        model = torch.compile(model)

    def call() -> Any:
        with torch.inference_mode():
            return model(torch.from_numpy(x)).numpy()

    return call


def compiled_predict(sizes: list[int], x: Any) -> Call:
    """The same, compiled."""
    return predict(sizes, x, compiled=True)


def products(sizes: list[int], x: Any, backward: bool = True) -> Call:
    """The products of a step, weights stored as `Linear` does: one row for each output."""
    triples = []
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        h, dz, weight = torch.randn(len(x), n), torch.randn(len(x), m), torch.randn(m, n)
        triples.append((h, weight.T, torch.empty(len(x), m)))
        if backward:
            triples.append((dz.T, h, torch.empty(m, n)))
        if backward and i:  # nobody asks for the gradient of the input
            triples.append((dz, weight, torch.empty(len(x), n)))

    def call() -> None:
        for a, b, out in triples:
            torch.mm(a, b, out=out)

    return call


def softmax_nll(logits: Any, labels: Any, *, compiled: bool = False) -> Call:
    """The loss and its gradient."""
    logits, labels = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(labels)
    loss_of = cross_entropy
    if compiled:
        torch._dynamo.reset()
        loss_of = torch.compile(cross_entropy)

    def call() -> Any:
        logits.grad = None
        loss = loss_of(logits, labels)
        loss.backward()
        return loss

    return call


def compiled_softmax_nll(logits: Any, labels: Any) -> Call:
    """The same, compiled."""
    return softmax_nll(logits, labels, compiled=True)


def adam(values: Any, gradient: Any, lr: float) -> Call:
    """An update of a single parameter."""
    parameter = nn.Parameter(torch.from_numpy(values))
    parameter.grad = torch.from_numpy(gradient)
    return torch.optim.Adam([parameter], lr=lr, fused=True).step  # type: ignore[no-any-return]


def epoch(
    sizes: list[int], batch: int, lr: float, x: Any, t: Any, *, compiled: bool = False
) -> tuple[Call, Callable[[Any], Any]]:
    """An epoch with a learning rate that falls to 0 in it, and the class of samples."""
    x, t = torch.from_numpy(x), torch.from_numpy(t)
    model = _network(sizes)
    update = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    falling = torch.optim.lr_scheduler.LinearLR(update, 1.0, 0.0, -(-len(x) // batch))
    loss_of = nn.CrossEntropyLoss()

    def forward(x: Any, t: Any) -> Any:
        return loss_of(model(x), t)

    if compiled:
        torch._dynamo.reset()
        forward = torch.compile(forward)

    def call() -> None:
        model.train()
        for index in torch.randperm(len(x)).split(batch):
            update.zero_grad()
            forward(x[index], t[index]).backward()
            update.step()
            falling.step()

    def classify(samples: Any) -> Any:
        model.eval()
        with torch.inference_mode():
            return model(torch.from_numpy(samples)).argmax(dim=1).numpy()

    return call, classify


def compiled_epoch(
    sizes: list[int], batch: int, lr: float, x: Any, t: Any
) -> tuple[Call, Callable[[Any], Any]]:
    """The same, forward and backward compiled."""
    return epoch(sizes, batch, lr, x, t, compiled=True)
