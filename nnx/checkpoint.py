"""Models in files: JSON and safetensors, nothing unpickled and nothing imported.

A file holds the arrays by name and, in the header, a description: class names and constructor
arguments. Built-in classes are found by name in `nnx.layers.__all__`; the reader passes others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnx import layers as builtin
from nnx.backends import Backend, backend_of, resolve
from nnx.layers import Layer

_FORMAT = 1
_DAMAGE = (  # what a description that makes no sense, is nested too deep or far too large raises
    *(LookupError, AttributeError, TypeError, ValueError),
    *(RecursionError, OverflowError, MemoryError),
)


def save(model: Layer, path: str | Path) -> None:
    """Write a model to one safetensors file. The file appears whole or not at all.

    Raises:
        TypeError: A layer's `config` isn't JSON.
        OSError: The file can't be written.
    """
    import json

    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = Path(path)
    description = {"format": _FORMAT, "model": _describe(model, "", {})}
    arrays = {name: backend_of(a).to_numpy(a).copy() for name, a in model.state().items()}
    temporary = path.with_name(path.name + ".part")
    try:
        save_file(arrays, temporary, metadata={"nnx": json.dumps(description)})
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"save: can't write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(
    path: str | Path,
    *,
    layers: Sequence[type[Layer]] = (),
    backend: str | Backend | None = None,
) -> Layer:
    """Read a model that `save` wrote.

    Args:
        path: The file.
        layers: Classes of your own that the model uses.
        backend: Where to put it; by default NumPy, whatever `NNX_BACKEND` says. A `Trainer`
            that is to train it moves it anyway.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file isn't one of these, is damaged, or names an unknown class.
    """
    import json

    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load: no model file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            description = json.loads((file.metadata() or {})["nnx"])
            if description["format"] != _FORMAT:
                raise ValueError(f"format {description['format']}, expected {_FORMAT}")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        classes = {name: getattr(builtin, name) for name in builtin.__all__}
        classes |= {kind.__name__: kind for kind in layers}
        model = _build(description["model"], "", classes, {})
        model.load_state(arrays)
    except (SafetensorError, *_DAMAGE) as error:
        raise ValueError(f"load: {path} is not a model file of nnx: {error}") from error
    return model.to(resolve("numpy" if backend is None else backend))


def _describe(layer: Layer, path: str, seen: dict[Layer, str]) -> dict[str, Any]:
    """The layer as JSON; one that stands in two places is described at the first."""
    if layer in seen:
        return {"same_as": seen[layer]}
    seen[layer] = path
    children = {name: _describe(child, f"{path}.{name}", seen) for name, child in layer.children()}
    return {"class": type(layer).__name__, "config": layer.config(), "children": children}


def _build(
    node: dict[str, Any], path: str, classes: dict[str, Any], made: dict[str, Layer]
) -> Layer:
    if "same_as" in node:
        return made[node["same_as"]]
    kind = classes.get(node["class"])
    if not (isinstance(kind, type) and issubclass(kind, Layer)):
        raise ValueError(f"unknown layer class {node['class']!r}; pass your own as layers=[...]")
    children = {
        name: _build(child, f"{path}.{name}", classes, made)
        for name, child in node["children"].items()
    }
    made[path] = kind.from_config(node["config"], children)
    return made[path]
