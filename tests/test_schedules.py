"""Schedules: numbers worked by hand, PyTorch's sequences, and training by them."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nnx import SGD, Callback, MeanSquaredError, ReduceOnPlateau, Trainer, mlp
from nnx.backends import Backend
from nnx.schedules import (
    Constant,
    Cosine,
    Exponential,
    InverseTime,
    LinearWarmup,
    MultiStep,
    OneCycle,
    Polynomial,
    Schedule,
    StepDecay,
    from_config,
)

# ---- by hand ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(0.5), [0.5, 0.5, 0.5]),
        (StepDecay(8.0, 2, 0.5), [8, 8, 4, 4, 2, 2, 1]),
        (MultiStep(8.0, [1, 3, 3], 0.5), [8, 4, 4, 1, 1]),
        (MultiStep(8.0, [3, 1], 0.5), [8, 4, 4, 2]),
        (Exponential(8.0, 0.5), [8, 4, 2, 1]),
        (Polynomial(8.0, 4), [8, 6, 4, 2, 0, 0]),
        (Polynomial(9.0, 2, 2.0, 1.0), [9, 3, 1, 1]),
        (InverseTime(6.0, 0.5), [6, 4, 3, 2.4, 2]),
        (Cosine(4.0, 2), [4, 2, 0, 0, 0]),
        (Cosine(5.0, 4, 1.0), [5, 3 + math.sqrt(2), 3, 3 - math.sqrt(2), 1, 1]),
        (Cosine(4.0, 2, restarts=True), [4, 2, 4, 2, 4]),
        # descents of 1, 2 and 4 steps
        (Cosine(4.0, 1, restarts=True, growth=2), [4, 4, 2, 4, 2 + math.sqrt(2), 2]),
        (LinearWarmup(Exponential(8.0, 0.5), 4, 0.0), [0, 2, 4, 6, 8, 4, 2]),
        (LinearWarmup(6.0, 2), [2, 4, 6, 6]),
        # up from 2 to 8 by step 0.5 * 6 - 1 = 2, down to 2 / 4 by step 5
        (
            OneCycle(8.0, 6, 0.5, divisor=4, final_divisor=4, cosine=False),
            [2, 5, 8, 5.5, 3, 0.5, 0.5],
        ),
        (
            OneCycle(8.0, 9, 1 / 3, divisor=4, final_divisor=4, cosine=False, three_phases=True),
            [2, 5, 8, 5, 2, 1.625, 1.25, 0.875, 0.5, 0.5],
        ),
    ],
    ids=repr,
)
def test_schedules_by_hand(schedule: Schedule, expected: list[float]) -> None:
    found = [schedule(step) for step in range(len(expected))]
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-15)
    assert {type(rate) for rate in found} == {float}


def test_every_rate_is_finite_and_at_least_0() -> None:
    for schedule in SCHEDULES.values():
        rates = np.array([schedule[0](step) for step in [*range(200), 10**6]])
        assert (np.isfinite(rates) & (rates >= 0)).all()


# ---- against PyTorch ---------------------------------------------------------------------------


def _warmup(scheduler: Any, optimizer: Any) -> Any:
    return scheduler.SequentialLR(
        optimizer,
        [
            scheduler.LinearLR(optimizer, start_factor=1 / 3, total_iters=7),
            scheduler.ExponentialLR(optimizer, 0.9),
        ],
        milestones=[7],
    )


SCHEDULES: dict[str, tuple[Schedule, Callable[[Any, Any], Any], int]] = {
    "constant": (
        Constant(0.3),
        lambda s, o: s.ConstantLR(o, factor=1.0),
        40,
    ),
    "step": (StepDecay(0.3, 7), lambda s, o: s.StepLR(o, 7), 40),
    "step settings": (StepDecay(0.3, 5, 0.7), lambda s, o: s.StepLR(o, 5, gamma=0.7), 40),
    "multistep": (
        MultiStep(0.3, [3, 11, 30], 0.5),
        lambda s, o: s.MultiStepLR(o, [3, 11, 30], gamma=0.5),
        40,
    ),
    "exponential": (Exponential(0.3, 0.9), lambda s, o: s.ExponentialLR(o, 0.9), 40),
    "polynomial": (
        Polynomial(0.3, 33, 1.7),
        lambda s, o: s.PolynomialLR(o, total_iters=33, power=1.7),
        40,
    ),
    "line": (Polynomial(0.3, 33), lambda s, o: s.PolynomialLR(o, total_iters=33), 40),
    "inverse": (
        InverseTime(0.3, 0.2),
        lambda s, o: s.LambdaLR(o, lambda step: 1 / (1 + 0.2 * step)),
        40,
    ),
    "cosine": (Cosine(0.3, 33, 0.01), lambda s, o: s.CosineAnnealingLR(o, 33, 0.01), 34),
    "restarts": (
        Cosine(0.3, 7, 0.01, restarts=True),
        lambda s, o: s.CosineAnnealingWarmRestarts(o, 7, 1, 0.01),
        40,
    ),
    "growing restarts": (
        Cosine(0.3, 3, restarts=True, growth=2),
        lambda s, o: s.CosineAnnealingWarmRestarts(o, 3, 2),
        60,
    ),
    "warmup": (LinearWarmup(Exponential(0.3, 0.9), 7), _warmup, 40),
    "one cycle": (OneCycle(0.3, 40), lambda s, o: s.OneCycleLR(o, 0.3, total_steps=40), 40),
    "one cycle settings": (
        OneCycle(0.3, 37, 0.4, divisor=10, final_divisor=50, cosine=False),
        lambda s, o: s.OneCycleLR(
            o, 0.3, 37, None, None, 0.4, "linear", div_factor=10, final_div_factor=50
        ),
        37,
    ),
    "one cycle, three phases": (
        OneCycle(0.3, 41, 0.35, three_phases=True),
        lambda s, o: s.OneCycleLR(o, 0.3, total_steps=41, pct_start=0.35, three_phase=True),
        41,
    ),
}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:The epoch parameter")
@pytest.mark.parametrize("name", SCHEDULES)
def test_sequences_are_those_of_torch(name: str) -> None:
    torch = pytest.importorskip("torch")
    schedule, make, n = SCHEDULES[name]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    assert n > 30
    expected = []
    for _ in range(n):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < n:
            scheduler.step()
    # PyTorch multiplies from step to step, and its error grows where a cosine comes down to 0
    found = [schedule(step) for step in range(n)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


PLATEAUS: list[dict[str, Any]] = [
    {},
    {"patience": 2, "factor": 0.5},
    {"patience": 0, "cooldown": 3, "threshold": 0.05},
    {"patience": 1, "threshold": 0.05, "threshold_mode": "abs", "min_lr": 0.003},
    {"patience": 1, "mode": "max", "factor": 0.3, "cooldown": 1},
    {"patience": 1, "mode": "max", "threshold_mode": "abs", "eps": 0.01},
]


@pytest.mark.torch
@pytest.mark.parametrize("settings", PLATEAUS, ids=repr)
def test_plateaus_are_those_of_torch(settings: dict[str, Any], rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **settings)
    callback, lr, seen = ReduceOnPlateau(**settings), 0.3, set()
    values = 1 + np.exp(-np.arange(60) / 6) + 0.01 * rng.standard_normal(60)
    values[20] = np.nan
    for value in (-values if settings.get("mode") == "max" else values).tolist():
        scheduler.step(value)
        lr = callback.next_rate(value, lr)
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-14)
        seen.add(lr)
    assert len(seen) > 1


# ---- as JSON -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_through_json(name: str) -> None:
    schedule = SCHEDULES[name][0]
    again = from_config(json.loads(json.dumps(schedule.config())))
    assert again == schedule
    assert repr(again) == repr(schedule)
    assert [again(i) for i in range(50)] == [schedule(i) for i in range(50)]


def test_from_config_knows_its_own_schedules_only() -> None:
    with pytest.raises(ValueError, match=r"among Constant, Cosine, .*, got 'print'"):
        from_config({"schedule": "print", "lr": 1})
    with pytest.raises(ValueError, match="got None"):
        from_config({})


def test_schedules_tell_themselves_apart() -> None:
    assert Constant(0.1) != Constant(0.2)
    assert Exponential(0.1, 0.5) != InverseTime(0.1, 0.5)
    assert repr(LinearWarmup(0.5, 3, 0.1)) == (
        "LinearWarmup(after=Constant(lr=0.5), steps=3, start=0.1)"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(-1), r"Constant: expected lr in \[0, inf\), got -1"),
        (lambda: StepDecay(0.1, 0), "StepDecay: expected every .* got 0"),
        (lambda: StepDecay(0.1, 2, -0.5), "factor .* got -0.5"),
        (lambda: MultiStep(math.nan, [1]), "MultiStep: expected lr .* got nan"),
        (lambda: Exponential(0.1, math.inf), "Exponential: expected factor"),
        (lambda: Polynomial(0.1, 3, -1), "Polynomial: expected power"),
        (lambda: Polynomial(0.1, 2.5), "steps to be an integer .* got 2.5"),  # type: ignore[arg-type]
        (lambda: InverseTime(0.1, -1), "InverseTime: expected rate"),
        (lambda: Cosine(0.1, 0), "Cosine: expected steps"),
        (lambda: Cosine(0.1, 3, growth=0), "Cosine: expected growth"),
        (lambda: Cosine(0.1, 3, -0.1), "Cosine: expected end"),
        (lambda: LinearWarmup(0.1, 3, 1.5), r"start in \[0, 1\], got 1.5"),
        (lambda: LinearWarmup(0.1, 0), "LinearWarmup: expected steps"),
        (lambda: OneCycle(0.1, 10, 1.5), r"OneCycle: expected rise in \[0, 1\]"),
        (lambda: OneCycle(0.1, 10, 0.6, three_phases=True), r"rise in \[0, 0.5\]"),
        (lambda: OneCycle(0.1, 10, divisor=0), "divisor"),
        (lambda: ReduceOnPlateau(mode="best"), "mode of min or max, got 'best'"),
        (lambda: ReduceOnPlateau(threshold_mode="x"), "threshold_mode of rel or abs"),
        (lambda: ReduceOnPlateau(factor=1), r"factor in \[0, 1\), got 1"),
        (lambda: ReduceOnPlateau(patience=-1), "patience .* got -1"),
        (lambda: ReduceOnPlateau(min_lr=-1), "min_lr .* got -1"),
    ],
)
def test_settings_out_of_range_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- in training -------------------------------------------------------------------------------


def _trainer(backend: Backend, lr: Any) -> tuple[Trainer, Any, Any]:
    rng = np.random.default_rng(0)
    model = mlp([3, 4, 2], dtype=np.float64)
    trainer = Trainer(model, MeanSquaredError(), SGD(lr), backend=backend)
    return trainer, rng.standard_normal((10, 3)), rng.standard_normal((10, 2))


class Record(Callback):
    """The learning rates of each epoch, from the optimizer, and on a device from there too."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_epoch_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        steps = trainer.optimizer.steps
        assert steps.position == len(steps.rates)
        self.rates += steps.rates.tolist()
        device = getattr(steps, "device_rates", None)
        if device is not None:
            np.testing.assert_array_equal(trainer.backend.to_numpy(device), steps.rates)


def test_a_schedule_goes_on_from_epoch_to_epoch(backend: Backend) -> None:
    schedule = LinearWarmup(Cosine(0.2, 8), 3)
    trainer, x, t = _trainer(backend, schedule)
    record = Record()
    trainer.fit(x, t, epochs=2, batch_size=4, callbacks=[record])  # 3 steps each
    trainer.fit(x, t, epochs=2, batch_size=4, callbacks=[record])
    assert record.rates == [schedule(step) for step in range(12)]
    by_hand, x, t = _trainer(backend, [schedule(step) for step in range(12)].__getitem__)
    by_hand.fit(x, t, epochs=4, batch_size=4)
    assert by_hand.history["loss"] == trainer.history["loss"]


def test_a_plateau_lowers_the_rate_of_the_next_epoch(backend: Backend) -> None:
    trainer, x, t = _trainer(backend, 0.5)
    # nothing ever improves by 1000 times: patience 1 lets every second epoch pass
    plateau = ReduceOnPlateau("loss", patience=1, factor=0.5, threshold=0.999)
    record = Record()
    trainer.fit(x, t, epochs=7, batch_size=10, callbacks=[record, plateau])
    assert record.rates == [0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]


def test_a_plateau_goes_on_from_its_state() -> None:
    values, lr = [3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0], 1.0
    whole, first, second = (ReduceOnPlateau(patience=1, cooldown=1) for _ in range(3))
    assert json.loads(json.dumps(whole.state())) == {"best": None, "bad": 0, "waiting": 0}
    second.load_state(first.state())
    assert second.best == math.inf
    expected = [lr := whole.next_rate(value, lr) for value in values]
    lr = 1.0
    found = [lr := first.next_rate(value, lr) for value in values[:4]]
    second.load_state(json.loads(json.dumps(first.state())))
    found += [lr := second.next_rate(value, lr) for value in values[4:]]
    assert found == expected
    assert len(set(found)) == 3


def test_a_plateau_says_what_it_cannot_do() -> None:
    from nnx import get_backend

    trainer, x, t = _trainer(get_backend("numpy"), Constant(0.1))
    with pytest.raises(TypeError, match=r"lr is a number, got Constant\(lr=0.1\)"):
        trainer.fit(x, t, callbacks=[ReduceOnPlateau("loss")])
    trainer, x, t = _trainer(get_backend("numpy"), 0.1)
    with pytest.raises(ValueError, match="monitor among loss, got 'validation_loss'"):
        trainer.fit(x, t, callbacks=[ReduceOnPlateau()])
