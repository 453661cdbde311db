"""The reading room: a Result and its folder in, report.html and report.md out. Nothing is measured here."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lighten.data.cache import write_whole
from lighten.errors import BadBundle
from lighten.plugins import require
from lighten.report.boxes import shown_names
from lighten.report.exported import read_record
from lighten.report.texts import LANGUAGES
from lighten.report.view import view
from lighten.types import SCHEMA_VERSION, Result, from_json

_HERE = Path(__file__).parent
_KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}
_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*[]<>|"} | {"\n": " ", "\r": " "})


def write(result: Result, folder: Path, *, lang: str = "en") -> tuple[Path, Path]:
    """Writes `report.html` (one page, nothing fetched) and `report.md` into `folder`, in one language: en or zh.

    Thumbnails of `result.flips` and the record of exported files are read from `folder`, else from the run folder; a
    missing one is not shown.
    Raises UnknownName (language), MissingBackend (jinja2), BadBundle (the original or winner was not measured).
    """
    shown = view(result, lang, thumbnails(result, folder, lang), read_record(*_homes(result, folder)))
    pages = folder / "report.html", folder / "report.md"
    for page, text in zip(pages, (_html(shown), _markdown(shown))):
        write_whole(page, text)
    return pages


def read_result(folder: Path) -> Result:
    """The Result of a run folder. Raises BadBundle where `result.json` is missing, damaged or of a newer lighten."""
    file = folder / "result.json"
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        version = int(plain["schema_version"])
        result = from_json(Result, plain) if version == SCHEMA_VERSION else None
    except FileNotFoundError as e:
        raise BadBundle(f"There is no {file}.", "Give a run folder whose `lighten compress` has finished.") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadBundle(f"{file} cannot be read: {str(e)[:200]}", "Run `lighten compress` again: it resumes.") from e
    if result is None:
        raise BadBundle(f"{file} has schema version {version}, not {SCHEMA_VERSION}.", "Use the lighten that wrote it.")
    return dataclasses.replace(result, path=str(folder))


def thumbnails(result: Result, folder: Path, lang: str = "en") -> dict[str, str]:
    """The pictures of `result.flips` as data URIs, by the name used there; only PNG and JPEG files inside the folder."""
    homes = [home.resolve() for home in _homes(result, folder)]
    found = {}
    for name in shown_names(result.flips, lang):
        if uri := next((uri for home in homes if (uri := _data_uri(home, name))), None):
            found[name] = uri
    return found


def _homes(result: Result, folder: Path) -> tuple[Path, ...]:
    """Where the files of a run may lie."""
    return (folder, *([Path(result.path)] if result.path else []))


def language(folder: Path) -> str:
    """The language of the report in `folder`, as its page says; English where there is none."""
    try:
        with (folder / "report.html").open(encoding="utf-8") as page:
            head = page.read(200)
    except (OSError, ValueError):
        return "en"
    return next((name for name, t in LANGUAGES.items() if f'<html lang="{t["html_lang"]}">' in head), "en")


def _data_uri(home: Path, name: str) -> str | None:
    try:
        file = (home / name).resolve()
        data = file.read_bytes() if file.is_relative_to(home) else b""
    except (OSError, ValueError):
        return None
    kind = next((kind for magic, kind in _KINDS.items() if data.startswith(magic)), None)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}" if kind else None


def _html(shown: Mapping[str, Any]) -> str:
    return _template("report.html.j2", autoescape=True).render(shown)


def _markdown(shown: Mapping[str, Any]) -> str:
    return _template("report.md.j2", finalize=markdown_text).render(shown, fence=_fence(shown["r"].command))


def _template(name: str, **options: Any) -> Any:
    jinja2 = require("jinja2", "compress", "write the report")
    options |= {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    loader = jinja2.FileSystemLoader(_HERE)
    house = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **options)
    return house.get_template(name)


class Raw(str):
    """Text that is Markdown already."""


def markdown_text(value: Any) -> Any:
    """Any value as text that Markdown shows as it stands, on one line, also inside a table."""
    return value if isinstance(value, Raw) else str(value).translate(_MARKDOWN)


def _fence(command: str) -> Raw:
    """The command as a code block that it cannot end itself."""
    ticks = "```"
    while ticks in command:
        ticks += "`"
    return Raw(f"{ticks}sh\n{command}\n{ticks}")
