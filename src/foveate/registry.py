"""Names and one-line specs: ``"todre:keep=0.1,exit=0.875"`` is the same thing as ``ToDRE(keep=0.1, exit=0.875)``.

Outsiders register through the entry-point group ``foveate.methods``; its values are `Method` subclasses.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import types
import typing
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from foveate.core import Chain, Method
from foveate.errors import BudgetError, UnknownMethod, did_you_mean

_METHODS: dict[str, type[Method]] = {}
_NAME = re.compile(r"[a-z][a-z0-9_]*")

M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Make a method known by its ``name``; a class decorator.

    Raises:
        ValueError: If the name is malformed or already taken by another class.
    """
    if not _NAME.fullmatch(cls.name):
        raise ValueError(f"a method's name is lower-case letters, digits and _, got {cls.name!r}")
    if _METHODS.get(cls.name, cls) is not cls:
        raise ValueError(f"the name {cls.name!r} is taken by {_METHODS[cls.name].__qualname__}")
    _METHODS[cls.name] = cls
    return cls


@cache
def _load() -> None:
    """Import the built-in methods, by name because they lie above this layer, then those of other packages."""
    importlib.import_module("foveate.methods")
    for point in entry_points(group="foveate.methods"):
        register(point.load())


def names() -> tuple[str, ...]:
    """Return the names of all registered methods, built-in ones first."""
    _load()
    return tuple(_METHODS)


def get(name: str) -> type[Method]:
    """Return the method class registered under ``name``.

    Raises:
        UnknownMethod: With the nearest names.
    """
    _load()
    if name not in _METHODS:
        raise UnknownMethod(f"unknown method: {name!r}", did_you_mean(name, _METHODS))
    return _METHODS[name]


def from_spec(spec: str | Method) -> Method:
    """Build a method from its one-line spec; a method passes through.

    The grammar is ``name:key=value,key=value``; stages are written ``stages=3@0.5/17@0.3/22@0``, other tuples ``3/17``
    (one value alone: ``3/``); ``a + b`` is a chain.

    Raises:
        UnknownMethod: If no method has this name.
        BudgetError: If an option is unknown, missing or malformed.

    Example:
        >>> import foveate
        >>> to_spec(from_spec("evocut:keep=64"))
        'evocut:keep=64'
    """
    if isinstance(spec, Method):
        return spec
    pieces = [piece.strip() for piece in spec.split("+")]
    methods = [_one(piece) for piece in pieces]
    return methods[0] if len(methods) == 1 else Chain(*methods)


def to_spec(method: Method) -> str:
    """Return the shortest spec that builds ``method`` again: ``from_spec(to_spec(m)) == m``."""
    if isinstance(method, Chain):
        return " + ".join(to_spec(part) for part in method.methods)
    options = [f"{name}={_write(value)}" for name, value in changed_fields(method).items()]
    return method.name + (":" + ",".join(options) if options else "")


def changed_fields(method: Method) -> dict[str, Any]:
    """Return the fields of a method that differ from their defaults, in order, ``keep`` first."""
    changed = {
        f.name: getattr(method, f.name)
        for f in dataclasses.fields(method)
        if f.init and (f.default is dataclasses.MISSING or getattr(method, f.name) != f.default)
    }
    return dict(sorted(changed.items(), key=lambda item: item[0] != "keep"))


def _one(piece: str) -> Method:
    name, _, rest = piece.partition(":")
    cls = get(name.strip())
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints, options = typing.get_type_hints(cls), dict[str, Any]()
    for item in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise BudgetError(f"an option is written key=value, got {item!r}", f"type `{name}:{_usage(known)}`")
        if key not in known:
            raise BudgetError(f"`{name}` has no option {key!r}", did_you_mean(key, known))
        if key in options:
            raise BudgetError(f"option {key!r} is given twice", "give it once")
        options[key] = _read(value, hints[key])
        if key != "keep" and not _fits(options[key], hints[key]):  # a wrong keep has a better error of its own
            raise BudgetError(
                f"{key} must be {_kind(hints[key])}, got {value!r}", f"type `help(foveate.{cls.__name__})`"
            )
    required = [key for key, f in known.items() if f.default is dataclasses.MISSING and key not in options]
    if required:
        raise BudgetError(f"`{name}` needs {', '.join(required)}", f"type `{name}:{_usage(known)}`")
    build: Callable[..., Method] = cls
    return build(**options)


def _usage(known: dict[str, dataclasses.Field[Any]]) -> str:
    return "keep=64" if "keep" in known else ",".join(f"{key}=..." for key in known)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an option's kind; an int may stand for a float, a bool for no number."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        each = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is Ellipsis else inner
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if hint is type(None):
        return value is None
    kinds = (int, float) if hint is float else hint
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))


def _kind(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(one) for one in inner))
    if origin is typing.Literal:
        return " or ".join(map(str, inner))
    if _is_tuple(hint):
        return "3@0.5/17@0.3" if any(map(_is_tuple, inner)) else "values like 3/17"
    words = {float: "a number", int: "a whole number", bool: "true or false", type(None): "none"}
    return words.get(origin or hint, str(hint))


def _is_tuple(hint: Any) -> bool:
    """Whether an option may be a tuple."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(map(_is_tuple, typing.get_args(hint)))
    return (typing.get_origin(hint) or hint) is tuple


def _read(text: str, hint: Any) -> Any:
    if _is_tuple(hint) and ("/" in text or "@" in text):
        return tuple(_value(piece) for piece in text.split("/") if piece)
    return _value(text, pair=False)


def _value(text: str, pair: bool = True) -> Any:
    site, at, keep = text.partition("@")
    if pair and at:
        return (_value(site), _value(keep))
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _write(value: Any) -> str:
    if isinstance(value, tuple):
        pairs = [isinstance(item, tuple) and len(item) == 2 for item in value]
        items = [f"{_write(i[0])}@{_write(i[1])}" if pair else _write(i) for i, pair in zip(value, pairs, strict=True)]
        return "/".join(items) + "/" * (len(value) < 2 and not any(pairs))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
