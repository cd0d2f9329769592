"""OpenAPI as a page of tables, drawn here: FastAPI's own page loads its scripts from another host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { font-family: ui-monospace, monospace }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0 }
"""


def page(schema: Mapping[str, Any]) -> str:
    """schema: an OpenAPI document -> HTML: every path, the fields of its body with their limits, its answers."""
    info = schema["info"]
    found = [f"<h1>{escape(info['title'])}</h1><p>{escape(info['description'])}"]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            found.append(f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(operation.get('description', ''))}")
            found += _body(operation, schema)
            answers = ((status, each["description"]) for status, each in operation["responses"].items())
            found.append(_table(("answer", ""), answers))
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}</title>'
    return f'{head}<meta name="viewport" content="width=device-width"><style>{STYLE}</style>{"".join(found)}</html>'


def _body(operation: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterable[str]:
    if "requestBody" not in operation:
        return
    name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    body = schema["components"]["schemas"][name]
    rows = (
        (field, _kind(it), "required" if field in body["required"] else it.get("default", ""), it["description"])
        for field, it in body["properties"].items()
    )
    yield _table(("field", "values", "default", ""), rows)


def _kind(field: Mapping[str, Any]) -> str:
    """Type and limits, in words; null, which every optional field may be, is left out."""
    kind = next(each for each in field.get("anyOf", [field]) if each.get("type") != "null")
    if "const" in kind or "enum" in kind:
        return ", ".join(kind.get("enum", [kind.get("const")]))
    if "minimum" in kind:
        least, most = (int(n) if n == int(n) else n for n in (kind["minimum"], kind["maximum"]))
        return f"{kind['type']}, {least} to {most}"
    return f"{kind['type']}, at most {kind['maxLength']} characters"


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    titles = "".join(f"<th>{escape(title)}" for title in head)
    lines = ("".join(f"<td>{escape(str(cell))}" for cell in row) for row in rows)
    return f"<table><tr>{titles}{''.join(f'<tr>{line}' for line in lines)}</table>"
