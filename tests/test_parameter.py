"""Parameters and the flat vector: where every element lies, and that views stay views."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from oracles import assert_same_bits

from nnx import SGD, Adam, Linear, Optimizer, Parameter, ParameterVector, Sequential, get_backend
from nnx.backends import Backend, NumpyBackend, backend_of

SHAPES: list[tuple[int, ...]] = [(3, 5), (5,), (64,), (65,), (), (8, 16), (1,)]


def make(backend: Backend, dtype: Any = np.float64, models: int | None = None) -> list[Parameter]:
    """Parameters of SHAPES, every number in them different."""
    parameters, start = [], 1
    for shape in SHAPES:
        full = shape if models is None else (models, *shape)
        n = int(np.prod(full))
        parameters.append(
            Parameter(backend.asarray(np.arange(start, start + n, dtype=dtype).reshape(full)))
        )
        start += n
    return parameters


def address(a: Any) -> int:
    return int(a.ctypes.data if isinstance(a, np.ndarray) else a.data.ptr)


def test_parameter_starts_with_gradient_zero_and_fresh(backend: Backend, dtype: Any) -> None:
    p = Parameter(backend.asarray(np.ones((2, 3), dtype)))
    assert_same_bits(backend.to_numpy(p.grad), np.zeros((2, 3), dtype))
    assert [p.accumulate(), p.accumulate(), p.fresh] == [False, True, False]
    assert repr(p) == "Parameter(2, 3)"


def test_vector_keeps_the_values_and_fills_the_gaps_with_zeros(
    backend: Backend, dtype: Any
) -> None:
    parameters = make(backend, dtype)
    before = [backend.to_numpy(p.value).copy() for p in parameters]
    vector = ParameterVector(parameters)
    for p, value in zip(parameters, before, strict=True):
        assert_same_bits(backend.to_numpy(p.value), value)
    flat = backend.to_numpy(vector.value)
    assert flat.dtype == dtype
    assert flat.shape == (1, 64 + 64 + 64 + 128 + 64 + 128 + 64)
    assert vector.size == 15 + 5 + 64 + 65 + 1 + 128 + 1
    assert np.count_nonzero(flat) == vector.size
    assert not backend.to_numpy(vector.grad).any()


@pytest.mark.parametrize("models", [None, 1, 3])
def test_every_parameter_starts_at_a_multiple_of_64_elements(
    backend: Backend, models: int | None
) -> None:
    parameters = make(backend, models=models)
    vector = ParameterVector(parameters, models)
    for name in ("value", "grad"):
        flat = getattr(vector, name)
        starts = [(address(getattr(p, name)) - address(flat)) // 8 for p in parameters]
        assert starts == [0, 64, 128, 192, 320, 384, 512]
    assert vector.value.shape == (models or 1, 576)


def test_parameters_are_views_both_ways(backend: Backend) -> None:
    parameters = make(backend)
    vector = ParameterVector(parameters)
    parameters[1].value[...] = backend.asarray(np.arange(5.0) - 9)
    assert backend.to_numpy(vector.value)[0, 64:69].tolist() == [-9, -8, -7, -6, -5]
    vector.grad.fill(2)
    for p, shape in zip(parameters, SHAPES, strict=True):
        assert_same_bits(backend.to_numpy(p.grad), np.full(shape, 2.0))


def test_each_model_has_a_row(backend: Backend) -> None:
    parameters = make(backend, models=3)
    before = [backend.to_numpy(p.value).copy() for p in parameters]
    vector = ParameterVector(parameters, 3)
    assert vector.size == 279  # of one model
    flat = backend.to_numpy(vector.value)
    for start, p, value in zip([0, 64, 128, 192, 320, 384, 512], parameters, before, strict=True):
        assert_same_bits(backend.to_numpy(p.value), value)
        for k in range(3):
            n = value[k].size
            assert_same_bits(flat[k, start : start + n], value[k].ravel())
    parameters[0].value[1] = 0
    changed = backend.to_numpy(vector.value)
    assert not changed[1, :15].any()
    assert changed[[0, 2], :15].all()


def test_clear_unwritten_zeroes_only_what_nobody_wrote(backend: Backend) -> None:
    a, b = (Parameter(backend.asarray(np.ones(3))) for _ in range(2))
    vector = ParameterVector([a, b])
    vector.grad.fill(5)
    assert not a.accumulate()
    vector.clear_unwritten()
    assert backend.to_numpy(a.grad).tolist() == [5, 5, 5]
    assert backend.to_numpy(b.grad).tolist() == [0, 0, 0]
    vector.begin_step()
    assert a.fresh
    assert b.fresh


def test_groups_join_neighbours_of_equal_settings(backend: Backend) -> None:
    values = [backend.asarray(np.ones(n)) for n in (3, 65, 10, 64)]
    vector = ParameterVector(
        [
            Parameter(values[0]),
            Parameter(values[1]),
            Parameter(values[2], lr_scale=0.5),
            Parameter(values[3], decay_scale=0),
        ]
    )
    groups = vector.groups
    assert list(groups.runs) == [(0, 192, 1, 1), (192, 256, 0.5, 1), (256, 320, 1, 0)]
    assert backend.to_numpy(groups.ids).tolist() == [0, 0, 0, 1, 2]
    assert groups.ids.dtype == np.uint8
    assert backend.to_numpy(groups.table).tolist() == [[1, 1], [0.5, 1], [1, 0]]


def test_groups_of_equal_settings_share_an_id(backend: Backend) -> None:
    scales = [1.0, 0.5, 1.0]
    vector = ParameterVector([Parameter(backend.asarray(np.ones(64)), lr_scale=s) for s in scales])
    assert backend.to_numpy(vector.groups.ids).tolist() == [0, 1, 0]


def test_more_than_256_settings_are_an_error() -> None:
    parameters = [Parameter(np.ones(1), lr_scale=i) for i in range(257)]
    with pytest.raises(ValueError, match="256 different settings, got 257"):
        ParameterVector(parameters)


def test_moving_takes_values_and_gradients_along() -> None:
    parameters = make(get_backend("numpy"))
    vector = ParameterVector(parameters)
    vector.grad[...] = np.arange(576.0)
    value, old = vector.value.copy(), vector.value
    there = NumpyBackend()  # to this class another backend
    vector.to(there)
    assert vector.backend is there
    assert_same_bits(vector.value, value)
    assert_same_bits(vector.grad, np.arange(576.0)[None])
    for p in parameters:
        assert p.vector is vector
        assert np.shares_memory(p.value, vector.value)
        assert np.shares_memory(p.grad, vector.grad)
    assert list(vector.groups.runs) == [(0, 576, 1, 1)]
    vector.to(there)
    assert_same_bits(old, value)


@pytest.mark.gpu
@pytest.mark.parametrize("models", [None, 2])
def test_moving_to_the_device_and_back_keeps_every_bit(models: int | None) -> None:
    host, device = get_backend("numpy"), get_backend("cupy")
    parameters = make(host, models=models)
    vector = ParameterVector(parameters, models)
    values = [p.value.copy() for p in parameters]
    vector.to(device)
    for p, value in zip(parameters, values, strict=True):
        assert backend_of(p.value, p.grad) is device
        assert_same_bits(device.to_numpy(p.value), value)
    for array in (vector.value, vector.grad, vector.groups.ids):
        assert backend_of(array) is device
    assert (address(parameters[1].value) - address(vector.value)) // 8 == 64
    vector.to(host)
    for p, value in zip(parameters, values, strict=True):
        assert_same_bits(p.value, value)


def test_layer_moves_with_and_without_a_vector(backend: Backend) -> None:
    model = Sequential(Linear(3, 2, rng=np.random.default_rng(0)))
    weight = next(p for _, p in model.parameters())
    value = weight.value.copy()
    assert model.to(backend) is model
    assert backend_of(weight.value, weight.grad) is backend
    assert_same_bits(backend.to_numpy(weight.value), value)
    vector = ParameterVector([p for _, p in model.parameters()])
    model.to("numpy")
    assert vector.backend is get_backend("numpy")
    assert_same_bits(weight.value, value)


def test_no_parameters_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one parameter"):
        ParameterVector([])


def test_a_parameter_belongs_to_one_vector() -> None:
    p = Parameter(np.ones((2, 3)))
    ParameterVector([p])
    with pytest.raises(ValueError, match=r"Parameter\(2, 3\) already belongs"):
        ParameterVector([p])


@pytest.mark.parametrize("name", ["lr_scale", "decay_scale"])
def test_scales_are_fixed_once_a_vector_holds_the_parameter(backend: Backend, name: str) -> None:
    p = Parameter(backend.asarray(np.ones(3)))
    setattr(p, name, 0.5)
    vector = ParameterVector([p])
    with pytest.raises(ValueError, match=f"Parameter: {name} is fixed .*set it before"):
        setattr(p, name, 0.0)
    assert getattr(p, name) == 0.5
    expected = (0.5, 1) if name == "lr_scale" else (1, 0.5)
    assert vector.groups.runs == ((0, 64, *expected),)


@pytest.mark.parametrize("models", [None, 3])
@pytest.mark.parametrize(
    "how", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=range(3)
)
def test_a_copy_has_a_value_of_its_own_and_no_vector(
    backend: Backend, dtype: Any, how: Any, models: int | None
) -> None:
    parameters = make(backend, dtype, models)
    p = parameters[0]
    p.lr_scale, p.decay_scale = 0.5, 0.25
    vector = ParameterVector(parameters, models)
    vector.grad.fill(7)
    p.accumulate()
    twin = how(p)
    assert twin.vector is None
    assert (twin.lr_scale, twin.decay_scale, twin.fresh) == (0.5, 0.25, True)
    assert backend_of(twin.value, twin.grad) is backend
    assert_same_bits(backend.to_numpy(twin.value), backend.to_numpy(p.value))
    assert_same_bits(backend.to_numpy(twin.grad), np.zeros(p.value.shape, dtype))
    twin.value.fill(-1)
    assert (backend.to_numpy(p.value) > 0).all()
    assert ParameterVector([twin], models).size == 15


def test_elements_lie_in_row_major_order(backend: Backend) -> None:
    p = Parameter(backend.asarray(np.arange(6.0).reshape(3, 2)).T)
    vector = ParameterVector([p])
    assert backend.to_numpy(vector.value)[0, :6].tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("shape", [(2, 3), ()])
def test_leading_axis_must_be_the_number_of_models(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="leading axis of 4 models"):
        ParameterVector([Parameter(np.ones(shape))], n_models=4)


def test_dtypes_must_agree() -> None:
    parameters = [Parameter(np.ones(2)), Parameter(np.ones(2, np.float32))]
    with pytest.raises(TypeError, match="float64 and float32"):
        ParameterVector(parameters)


def test_an_error_binds_no_parameter() -> None:
    good = Parameter(np.ones(2))
    with pytest.raises(TypeError):
        ParameterVector([good, Parameter(np.ones(2, np.float32))])
    assert good.vector is None


@pytest.mark.gpu
def test_backends_must_agree() -> None:
    parameters = [Parameter(get_backend(name).asarray(np.ones(2))) for name in ("numpy", "cupy")]
    with pytest.raises(TypeError, match="one backend"):
        ParameterVector(parameters)


@pytest.mark.parametrize("optimizer", [SGD(0.1, momentum=0.9), Adam(0.1)], ids=repr)
def test_a_frozen_parameter_survives_a_gradient_that_is_not_a_number(
    backend: Backend, optimizer: Optimizer
) -> None:
    frozen = Parameter(backend.asarray([1.0, 2.0]), lr_scale=0)
    free = Parameter(backend.asarray([1.0, 2.0]))
    optimizer = type(optimizer)(**optimizer.config())
    optimizer.bind(ParameterVector([frozen, free]))
    for p in (frozen, free):
        p.grad[...] = backend.asarray([np.nan, 1.0])
        p.accumulate()
    optimizer.step()
    np.testing.assert_array_equal(backend.to_numpy(frozen.value), [1, 2])
    moved = backend.to_numpy(free.value)
    assert np.isnan(moved[0])
    assert moved[1] < 2
