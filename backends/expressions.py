"""Expressions of `Backend.elementwise` as programs for the C kernel (`cpu/elementwise.c`)."""

from __future__ import annotations

import ast
import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

Program = tuple[tuple[str, ...], bytes]
"""Names of the operands, in the order of their slots, and the code: `elementwise.c` reads it."""

_ARITHMETIC = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}
_COMPARISONS = {ast.Lt: "lt", ast.LtE: "le", ast.Eq: "eq", ast.NotEq: "ne"}
_MIRRORED = {ast.Gt: "lt", ast.GtE: "le"}
_ONE_ARGUMENT = {"abs", "sign", "sqrt", "exp", "expm1", "log", "log1p", "tanh", "erf"}
_ARRAY, _NUMBER, _OUT = 0, 1, 255  # of elementwise.h


class _Unknown(Exception):
    """Something that the kernel can't do, or would do in another precision than NumPy."""


class _Value(NamedTuple):
    """An operand, a constant, or the result of an operation.

    Attributes:
        kind: `"array"`, `"number"`, `"condition"`, or `"choice"`: what `where` has made of numbers,
            float64 in NumPy, which is the same as long as nothing is computed with it.
        what: The operand's name, the constant, or the operation's name.
        parts: What the operation works on.
    """

    kind: str
    what: str | float
    parts: tuple[_Value, ...] = ()


def _value(tree: ast.AST, kinds: dict[str, str]) -> _Value:
    match tree:
        case ast.Name(name) if name in kinds:
            return _Value(kinds[name], name)
        case ast.Constant(int() | float() as number) if not isinstance(number, bool):
            return _Value("number", float(number))
        case ast.UnaryOp(ast.USub(), part):
            name, trees = "neg", [part]
        case ast.BinOp(left, operator, right) if type(operator) in _ARITHMETIC:
            name, trees = _ARITHMETIC[type(operator)], [left, right]
        case ast.Compare(left, [operator], [right]) if type(operator) in _COMPARISONS:
            name, trees = _COMPARISONS[type(operator)], [left, right]
        case ast.Compare(left, [operator], [right]) if type(operator) in _MIRRORED:
            name, trees = _MIRRORED[type(operator)], [right, left]
        case ast.Call(ast.Name("where"), [_, _, _] as trees, []):
            name = "where"
        case ast.Call(ast.Name("maximum" | "minimum" as name), [_, _] as trees, []):
            pass
        case ast.Call(ast.Name(name), [_] as trees, []) if name in _ONE_ARGUMENT:
            pass
        case _:
            raise _Unknown
    parts = tuple([_value(part, kinds) for part in trees])
    return _Value(_kind(name, [part.kind for part in parts]), name, parts)


def _kind(name: str, of_parts: list[str]) -> str:
    """What an operation makes of its parts."""
    if name == "where":
        condition, *sides = of_parts
        if condition == "condition" and "condition" not in sides:
            return "array" if "array" in sides and "choice" not in sides else "choice"
    elif set(of_parts) == {"number"}:
        if name == "neg" or name in _ARITHMETIC.values():
            return "number"
    elif set(of_parts) <= {"number", "array"}:
        return "condition" if name in _COMPARISONS.values() else "array"
    raise _Unknown


@functools.cache
def compiled(
    expression: str, operands: tuple[str, ...], arrays: frozenset[str], operations: tuple[str, ...]
) -> Program | None:
    """The program of an expression, or None if the kernel can't do it as NumPy does.

    The slots are the operands, constants, results of operations on numbers, and blank ones for what
    is computed of arrays. Equal parts are computed once, and a blank slot is used again when nobody
    needs what is in it.

    Args:
        expression: See `XpBackend.elementwise`.
        operands: Names of all operands.
        arrays: Those that are arrays; the others are numbers.
        operations: The kernel's, in the order of their codes.
    """
    try:
        tree = ast.parse(expression, mode="eval").body
        root = _value(tree, {name: "array" if name in arrays else "number" for name in operands})
    except (SyntaxError, OverflowError, _Unknown):
        return None
    if root.kind == "number":
        return None
    values = list(dict.fromkeys(_in_order(root)))  # by value: equal ones are the same one
    constants = [value for value in values if not value.parts and isinstance(value.what, float)]
    results = [value for value in values if value.parts and value.kind == "number"]
    steps = [value for value in values if value.parts and value.kind != "number"]
    if not root.parts:
        steps = [_Value("array", "copy", (root,))]
    leaves = [_Value("array" if name in arrays else "number", name) for name in operands]
    slots = {value: i for i, value in enumerate([*leaves, *constants, *results])}

    def instruction(value: _Value, to: int) -> bytes:
        parts = [slots[part] for part in value.parts]
        parts += [parts[0]] * (3 - len(parts))
        return bytes([operations.index(str(value.what)), to, *parts])

    code = b"".join(instruction(value, 0) for value in results)
    last = {part: i for i, value in enumerate(steps) for part in value.parts}
    fixed, free, n_blank = len(slots), list[int](), 0
    for i, value in enumerate(steps):
        done = dict.fromkeys(part for part in value.parts if last[part] == i)
        free += [slots[part] for part in done if slots[part] >= fixed]
        to = _OUT
        if i < len(steps) - 1:
            if not free:
                free.append(fixed + n_blank)
                n_blank += 1
            to = free.pop()
        code += instruction(value, to)
        slots[value] = to
    head = (len(operands), len(constants), len(results), n_blank, len(steps))
    if max(head) > 250 or len(slots) > 250:
        return None
    kinds = [_ARRAY if name in arrays else _NUMBER for name in operands]
    numbers = struct.pack(f"={len(constants)}d", *[value.what for value in constants])
    return operands, bytes([*head, *kinds]) + numbers + code


def _in_order(value: _Value) -> Sequence[_Value]:
    """It and all that it is computed of, in the order of computation."""
    return [part for each in value.parts for part in _in_order(each)] + [value]
