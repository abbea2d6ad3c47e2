"""Models in files: every bit comes back, nothing is run, and a bad file gets one clear error."""

import copy
import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from oracles import assert_same_bits

import nnx
from nnx import (
    Dropout,
    Flatten,
    Layer,
    Linear,
    Parameter,
    ReLU,
    Sequential,
    Sigmoid,
    Softmax,
    Tanh,
    load,
    mlp,
    save,
)
from nnx.backends import Backend, backend_of, get_backend


def random_biases(model: Layer, rng: np.random.Generator) -> Layer:
    for _, p in model.parameters():
        backend = backend_of(p.value)
        p.value[...] = backend.asarray(rng.standard_normal(p.value.shape).astype(p.value.dtype))
    return model


def everything(dtype: Any, models: int | None) -> Layer:
    def linear(n_in: int, n_out: int, **options: Any) -> Linear:
        rng = np.random.default_rng(0)
        return Linear(n_in, n_out, rng=rng, dtype=dtype, n_models=models, **options)

    return Sequential(
        Flatten(n_models=models),
        linear(6, 5),
        ReLU(),
        Dropout(0.25),
        Sequential(linear(5, 4, bias=False), Tanh(), Sequential(Sigmoid())),
        nnx.BatchNorm(4, dtype=dtype, n_models=models, eps=1e-3, momentum=0.5),
        nnx.LayerNorm(4, dtype=dtype, n_models=models, affine=False),
        nnx.RMSNorm(4, dtype=dtype, n_models=models),
        *(nnx.LeakyReLU(0.5), nnx.ELU(2.0), nnx.SELU(), nnx.GELU("tanh"), nnx.SiLU(), nnx.Mish()),
        *(nnx.Identity(), nnx.Softplus(2.0, 3.0), nnx.HardSwish(), nnx.HardTanh(-2.0, 3.0)),
        *(nnx.LogSoftmax(), nnx.HardSigmoid()),
        linear(4, 3),
        Softmax(),
    )


@pytest.mark.parametrize("models", [None, 3])
def test_round_trip_is_bit_exact(
    backend: Backend, dtype: Any, models: int | None, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = random_biases(everything(dtype, models).to(backend), rng)
    path = tmp_path / "model.safetensors"
    save(model, path)
    again = load(path, backend=backend)
    assert repr(again) == repr(model)
    assert again.n_models == models
    assert list(again.state()) == list(model.state())
    for name, array in model.state().items():
        assert backend_of(again.state()[name]) is backend
        assert_same_bits(backend.to_numpy(again.state()[name]), backend.to_numpy(array))
    shape = (7, 2, 3) if models is None else (models, 7, 2, 3)
    x = backend.asarray(rng.standard_normal(shape).astype(dtype))
    assert_same_bits(backend.to_numpy(again(x)), backend.to_numpy(model(x)))
    save(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_every_layer_can_be_saved() -> None:
    names = {type(layer).__name__ for layer in everything(np.float32, None).layers()}
    assert names == set(nnx.layers.__all__) - {"Layer", "Step"}


def test_a_trained_model_goes_on_training(tmp_path: Path, rng: np.random.Generator) -> None:
    x, t = rng.standard_normal((20, 4)), rng.integers(0, 3, 20)
    model = mlp([4, 5, 3])
    nnx.Trainer(model, nnx.SoftmaxNLL(), nnx.SGD(0.1)).fit(x, t)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m")
    for one in (model, again):
        nnx.Trainer(one, nnx.SoftmaxNLL(), nnx.SGD(0.1)).fit(x, t)
    for name, array in model.state().items():
        assert_same_bits(again.state()[name], array)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


each_copy = pytest.mark.parametrize("how", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])


def states_agree(one: Layer, other: Layer) -> None:
    """Every array is equal to the bit, on the same backend."""
    assert list(one.state()) == list(other.state())
    for name, array in one.state().items():
        twin, backend = other.state()[name], backend_of(array)
        assert backend_of(twin) is backend
        assert_same_bits(backend.to_numpy(twin), backend.to_numpy(array))


@each_copy
@pytest.mark.parametrize("models", [None, 3])
def test_a_trained_model_can_be_copied_and_both_go_on(
    backend: Backend, dtype: Any, models: int | None, how: Any, rng: np.random.Generator
) -> None:
    def trainer(model: Layer) -> nnx.Trainer:
        loss = nnx.MeanSquaredError(n_models=models)
        return nnx.Trainer(model, loss, nnx.SGD(0.5, momentum=0.5), backend=backend)

    shape, out = ((7, 2, 3), (7, 3)) if models is None else ((models, 7, 2, 3), (models, 7, 3))
    x, t = (backend.asarray(rng.standard_normal(s).astype(dtype)) for s in (shape, out))
    model = random_biases(everything(dtype, models).to(backend), rng)
    first = trainer(model)
    start = {name: backend.to_numpy(a).copy() for name, a in model.state().items()}
    first.train_step(x, t)
    twin = how(model)
    assert repr(twin) == repr(model)
    states_agree(model, twin)
    assert_same_bits(backend.to_numpy(twin(x)), backend.to_numpy(model(x)))
    kept = {name: backend.to_numpy(a).copy() for name, a in model.state().items()}
    assert not np.array_equal(kept["5.running_mean"], start["5.running_mean"])
    second = trainer(twin)
    assert second.vector is not first.vector
    for _, p in twin.parameters():
        assert p.vector is second.vector
    second.vector.value[...] += 1
    assert all((backend.to_numpy(p.value) != kept[n]).all() for n, p in twin.parameters())
    second.vector.value[...] -= 1
    twin.load_state(kept)
    second.train_step(x, t)
    moved = {name: backend.to_numpy(a).copy() for name, a in twin.state().items()}
    assert not np.array_equal(moved["5.running_mean"], kept["5.running_mean"])
    assert not np.array_equal(moved["1.weight"], kept["1.weight"])
    for name, array in model.state().items():  # the original hasn't moved
        assert_same_bits(backend.to_numpy(array), kept[name])
    first.train_step(x, t)
    assert not np.array_equal(backend.to_numpy(model.state()["1.weight"]), kept["1.weight"])
    for name, array in twin.state().items():  # nor has the copy
        assert_same_bits(backend.to_numpy(array), moved[name])


@each_copy
def test_what_is_shared_is_shared_in_the_copy(
    backend: Backend, how: Any, rng: np.random.Generator
) -> None:
    shared = Linear(3, 3, rng=rng)
    tied = Linear(3, 3, rng=rng)
    tied.weight = shared.weight
    model = Sequential(shared, ReLU(), Sequential(shared, ReLU()), tied)
    x, t = (rng.standard_normal((5, 3)).astype(np.float32) for _ in range(2))

    def train(model: Layer) -> None:
        nnx.Trainer(model, nnx.MeanSquaredError(), nnx.SGD(0.1), backend=backend).fit(x, t)

    train(model)
    twin = how(model)
    assert twin[0] is twin[2][0]
    assert twin[3].weight is twin[0].weight is not shared.weight
    assert [n for n, _ in twin.parameters()] == ["0.weight", "0.bias", "3.bias"]
    states_agree(model, twin)
    for one in (twin, model):  # the operations joined inside the copy use the copy's arrays
        train(one)
    states_agree(model, twin)


def test_widths_may_be_integers_of_numpy(tmp_path: Path) -> None:
    sizes = np.array([4, 3, 2])
    save(
        Linear(sizes[0], sizes[1], rng=np.random.default_rng(0), n_models=sizes[2]), tmp_path / "m"
    )
    assert load(tmp_path / "m").config()["n_in"] == 4
    copies = Linear(sizes[0], sizes[1], rng=np.random.default_rng(0)).replicate(sizes[2])
    save(copies, tmp_path / "m")
    assert load(tmp_path / "m").n_models == 2
    with pytest.raises(TypeError, match="float"):
        Linear(4.5, 3, rng=np.random.default_rng(0))  # type: ignore[arg-type]


def test_a_layer_used_twice_comes_back_as_one(tmp_path: Path, rng: np.random.Generator) -> None:
    shared = Linear(3, 3, rng=rng)
    inner = Sequential(shared, Tanh())
    save(Sequential(shared, ReLU(), inner, inner, shared), tmp_path / "m")
    again = load(tmp_path / "m")
    assert isinstance(again, Sequential)
    assert again[0] is again[4] is again[2][0]  # type: ignore[index]
    assert again[2] is again[3]
    assert len(again.state()) == 2


class Scale(Layer):
    """`y = factor * inner(x)`."""

    def __init__(self, inner: Layer, width: int) -> None:
        self.inner, self.width = inner, width
        self.factor = Parameter(np.ones(width, np.float32))

    def config(self) -> dict[str, Any]:
        return {"width": self.width}

    def forward(self, x: Any, *, step: Any = None) -> tuple[Any, Any]:
        y, saved = self.inner.forward(x, step=step)
        return y * self.factor.value, saved


def test_layers_of_ones_own_are_found_where_they_are_passed(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    model = random_biases(Sequential(Scale(mlp([4, 3]), 3)), rng)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m", layers=[Scale])
    x = rng.standard_normal((5, 4)).astype(np.float32)
    assert_same_bits(again(x), model(x))
    with pytest.raises(ValueError, match=r"unknown layer class 'Scale'; .*layers=\[\.\.\.\]"):
        load(tmp_path / "m")


def test_where_the_model_goes_is_for_the_reader_to_say(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(mlp([4, 3]).to(backend), tmp_path / "m")
    weight = next(iter(load(tmp_path / "m").state().values()))
    assert backend_of(weight) is get_backend("numpy")
    weight = next(iter(load(tmp_path / "m", backend=backend.name).state().values()))
    assert backend_of(weight) is backend
    for flag in (backend.name, "nonsense"):  # it is for what trains
        monkeypatch.setenv("NNX_BACKEND", flag)
        weight = next(iter(load(tmp_path / "m").state().values()))
        assert backend_of(weight) is get_backend("numpy")


# ---- writing ---------------------------------------------------------------------------------


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m"
    save(mlp([4, 3]), path)
    old = path.read_bytes()

    def partly(arrays: Any, file: Any, **options: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", partly)
        with pytest.raises(OSError, match="disk full"):
            save(mlp([4, 5]), path)
        assert path.read_bytes() == old
        assert files(tmp_path) == ["m"]

    def refuse(*arguments: Any) -> None:
        raise OSError("no")

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        save(mlp([4, 5]), path)
    assert path.read_bytes() == old
    assert files(tmp_path) == ["m"]


def test_saving_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for width in (3, 5):
        save(mlp([4, width]), path)
    assert load(path)(np.ones((1, 4), np.float32)).shape == (1, 5)
    assert files(tmp_path) == ["m"]
    assert stat.S_ISREG(path.stat().st_mode)


def test_a_config_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    class Odd(ReLU):
        def config(self) -> dict[str, Any]:
            return {"what": object()}

    with pytest.raises(TypeError):
        save(Sequential(Odd()), tmp_path / "m")
    assert files(tmp_path) == []


# ---- reading what is no model ----------------------------------------------------------------


def test_no_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(FileNotFoundError, match=path.name):
            load(path)


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def test_pickles_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m").write_bytes(pickle.dumps(Bomb()))
    np.save("m.npy", np.array([Bomb()], object), allow_pickle=True)
    for name in ("m", "m.npy"):
        with pytest.raises(ValueError, match="is not a model file of nnx"):
            load(name)
    assert not Path("exploded").exists()
    pickle.loads(Path("m").read_bytes())
    assert Path("exploded").exists()  # the bomb would have worked


def test_files_cut_short_anywhere_are_errors(tmp_path: Path) -> None:
    save(mlp([2, 3, 1]), tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    for n in (*range(0, len(whole) - 1, 17), len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:n])
        with pytest.raises(ValueError, match="cut is not a model file of nnx"):
            load(tmp_path / "cut")


def test_bytes_changed_anywhere_are_read_or_refused(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    save(mlp([2, 3, 1]), tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    refused = 0
    for position in rng.permutation(len(whole))[:400].tolist():
        bad = bytearray(whole)
        bad[position] ^= int(rng.integers(1, 256))
        (tmp_path / "bad").write_bytes(bad)
        try:
            load(tmp_path / "bad")
        except ValueError as error:
            assert "is not a model file of nnx" in str(error)  # noqa: PT017
            refused += 1
    assert refused > 200


LINEAR: dict[str, Any] = {
    "class": "Linear",
    "config": {"n_in": 2, "n_out": 1, "bias": False},
    "children": {},
}


def write(path: Path, model: Any, form: Any = 1, weight: Any = None) -> Path:
    arrays = {"weight": np.ones((2, 1), np.float32) if weight is None else weight}
    text = json.dumps({"format": form, "model": model})
    safetensors.numpy.save_file(arrays, path, metadata={"nnx": text})
    return path


def test_a_description_written_by_hand_is_read(tmp_path: Path) -> None:
    model = load(write(tmp_path / "m", LINEAR))
    assert repr(model) == "Linear(n_in=2, n_out=1, bias=False, dtype='float32')"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (LINEAR | {"class": "os.system"}, r"unknown layer class 'os\.system'"),
        (LINEAR | {"class": "Step"}, "unknown layer class 'Step'"),
        (LINEAR | {"class": "__name__"}, "unknown layer class"),
        (LINEAR | {"class": ["Linear"]}, "not a model file"),
        (LINEAR | {"config": {"n_in": 2}}, "n_out"),
        (LINEAR | {"config": {"n_in": -2, "n_out": 1, "bias": False}}, "got -2 and 1"),
        (LINEAR | {"config": {"n_in": "2", "n_out": 1, "bias": False}}, "not a model file"),
        (LINEAR | {"config": {"n_in": 2, "n_out": 1}}, r"missing \['bias'\]"),
        (
            LINEAR | {"config": {"n_in": 3, "n_out": 1, "bias": False}},
            r"shape \(3, 1\), got \(2, 1\)",
        ),
        (LINEAR | {"config": [2, 1]}, "not a model file"),
        (LINEAR | {"config": None}, "not a model file"),
        (LINEAR | {"children": [LINEAR]}, "not a model file"),
        (LINEAR | {"config": {"n_in": 10**30, "n_out": 1}}, "not a model file"),
        (LINEAR | {"config": {"n_in": 10**9, "n_out": 10**9}}, "not a model file"),
        ({"class": "Sequential", "config": {}, "children": {}}, "at least one layer"),
        ({"same_as": ".0"}, "not a model file"),
        ({"class": "Linear"}, "not a model file"),
        ([LINEAR], "not a model file"),
        ("Linear", "not a model file"),
        (7, "not a model file"),
        (None, "not a model file"),
    ],
)
def test_descriptions_that_make_no_sense_are_errors(
    model: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "m", model))


def test_a_description_too_deep_to_read_is_an_error(tmp_path: Path) -> None:
    text = '{"format": 1, "model": ' + '{"children": {"0": ' * 50_000 + "}}" * 50_000 + "}"
    arrays = {"weight": np.ones(1, np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / "m", metadata={"nnx": text})
    with pytest.raises(ValueError, match="not a model file"):
        load(tmp_path / "m")


def test_files_of_others_and_of_the_future_are_errors(tmp_path: Path) -> None:
    arrays = {"weight": np.ones((2, 1), np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / "others")
    with pytest.raises(ValueError, match="others is not a model file"):
        load(tmp_path / "others")
    with pytest.raises(ValueError, match="format 2, expected 1"):
        load(write(tmp_path / "future", LINEAR, form=2))
    wrong = np.ones((2, 1), np.float64)
    with pytest.raises(ValueError, match="weight of dtype float32, got float64"):
        load(write(tmp_path / "dtype", LINEAR, weight=wrong))
