"""Options for every field of a settings struct, named, typed and explained by it."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import click
import msgspec

from agentrun import settings
from agentrun.cli.common import App, duration, option


def settings_options(kind: type[msgspec.Struct], *, plain: Collection[str] = ()) -> Callable[..., Any]:
    """Give a command an option for each field of ``kind``; its function gets them together as ``settings``.

    Args:
        kind: A struct of `agentrun.settings`.
        plain: Its numbers with a fraction that are no times.
    """
    fields = msgspec.structs.fields(kind)

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def collect(app: App, **parameters: Any) -> Any:
            return fn(app, settings=kind(**{f.name: parameters.pop(f.name) for f in fields}), **parameters)

        texts = field_texts(kind)
        decorated: Callable[..., Any] = collect
        for field in reversed(fields):
            name = "--" + field.name.replace("_", "-")
            how = _how(field, is_time=field.name not in plain)
            if isinstance(field.default, bool):
                name = f"{name}/--no-{name[2:]}"
            elif field.default == ():
                name = name.removesuffix("s")
                decorated = option(name, field.name, help=texts.get(field.name), **how)(decorated)
                continue
            decorated = option(name, help=texts.get(field.name), **how)(decorated)
        return decorated

    return decorate


def _how(field: msgspec.structs.FieldInfo, *, is_time: bool) -> dict[str, Any]:
    default = field.default
    match default:
        case bool():
            return {"default": default, "show_default": True}
        case int():
            return {"type": click.IntRange(min=1), "default": default, "show_default": True}
        case float() if is_time:
            return {"type": duration, "default": f"{default:g}s", "show_default": True}
        case float():
            return {"type": float, "default": default, "show_default": True}
        case ():
            return {"multiple": True}
        case _:
            assert default is None or isinstance(default, str)
            choices = get_args(field.type)
            words = [word for word in choices if isinstance(word, str)]
            return {"default": default, "show_default": default is not None} | (
                {"type": click.Choice(words)} if words else {}
            )


def field_texts(kind: type[msgspec.Struct]) -> dict[str, str]:
    """What `settings` says of each field, below it."""
    try:
        tree = ast.parse(Path(settings.__file__).read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return {}  # installed without sources
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == kind.__name__)
    texts: dict[str, str] = {}
    for node, below in pairwise(body):
        match node, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = text
            case _:
                pass
    return texts
