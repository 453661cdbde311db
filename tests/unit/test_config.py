"""YAML is read strictly: every mistake is named with its file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lighten.config import LIMIT, check_keys, read_yaml
from lighten.errors import BadConfig

KNOWN = ("model", "max_drop", "nested", "data")


def read(text: str, folder: Path) -> dict[str, Any]:
    file = folder / "lighten.yaml"
    file.write_text(text, "utf-8")
    return read_yaml(file, KNOWN)


def complaint(text: str, folder: Path) -> BadConfig:
    with pytest.raises(BadConfig, match=r"lighten\.yaml") as caught:
        read(text, folder)
    return caught.value


def test_what_is_right_is_read(tmp_path: Path) -> None:
    text = "# 注释\nmodel: 模型.pth\nmax_drop: 1.5\nnested: {a: [1, 2], b: null}\n"
    assert read(text, tmp_path) == {"model": "模型.pth", "max_drop": 1.5, "nested": {"a": [1, 2], "b": None}}


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_file_has_no_settings(text: str, tmp_path: Path) -> None:
    assert read(text, tmp_path) == {}


def test_an_unknown_key_with_its_line_and_the_near_name(tmp_path: Path) -> None:
    e = complaint("model: a\n\nmax_dorp: 1\n", tmp_path)
    assert "line 3: unknown key 'max_dorp'" in e.what
    assert e.to_do == "Did you mean max_drop?"


def test_an_unknown_key_near_nothing_lists_the_known_ones(tmp_path: Path) -> None:
    assert complaint("zzz: 1\n", tmp_path).to_do == "Known keys: model, max_drop, nested, data"
    assert "unknown key None" in complaint("null: 1\n", tmp_path).what


def test_check_keys_alone_names_the_place() -> None:
    check_keys({"a": 1}, ["a"], "nested")
    with pytest.raises(BadConfig, match="nested: unknown key 'b'"):
        check_keys({"a": 1, "b": 1}, ["a"], "nested")


def test_a_key_given_twice_with_both_lines(tmp_path: Path) -> None:
    e = complaint("model: a\ndata: b\nmodel: c\n", tmp_path)
    assert "line 3: key 'model' stands twice (first in line 1)" in e.what


def test_a_nested_key_given_twice(tmp_path: Path) -> None:
    e = complaint("model: a\nnested:\n  x: 1\n  y: 2\n  x: 3\n", tmp_path)
    assert "line 5: key 'x' stands twice (first in line 3)" in e.what


def test_aliases_are_refused(tmp_path: Path) -> None:
    assert "line 2: aliases" in complaint("model: &m a\ndata: *m\n", tmp_path).what
    bomb = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['x'])}]" for i in range(30))
    assert "line 2: aliases" in complaint(bomb, tmp_path).what


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "42\n"])
def test_what_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    assert "not `key: value` lines" in complaint(text, tmp_path).what


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: a\nnested: [1, 2\ndata: b\n", 3),
        ("model: a\n\tdata: b\n", 2),
        ("model: a\n---\nmodel: b\n", 2),
        ("model: a\ndata: !!python/object/apply:os.system [ls]\n", 2),
        ("model: a\n? [1, 2]\n: b\n", 2),
        ("model: a\n? !!set {x: null}\n: b\n", 2),
        ("model: a\ndata: 2001-99-99\n", 2),
        ("model: a\ndata: !!timestamp soon\n", 2),
        ("model: a\nnested:\n  x: !!bool perhaps\n", 3),
    ],
)
def test_broken_yaml_names_the_line(text: str, line: int, tmp_path: Path) -> None:
    assert f"line {line}" in complaint(text, tmp_path).what


def test_python_tags_run_nothing(tmp_path: Path) -> None:
    complaint(f"model: !!python/object/apply:os.mkdir ['{tmp_path}/pwned']\n", tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    assert "larger than 1 MB" in complaint("#" * (LIMIT + 1), tmp_path).what
    complaint("[" * 20_000, tmp_path)
    for bad in (tmp_path / "gone.yaml", tmp_path):
        with pytest.raises(BadConfig, match="cannot be read"):
            read_yaml(bad, KNOWN)
    (tmp_path / "raw.yaml").write_bytes(b"model: \xff\xfe\n")
    with pytest.raises(BadConfig, match="cannot be read"):
        read_yaml(tmp_path / "raw.yaml", KNOWN)
