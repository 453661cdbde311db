"""Core ML weights in tables of few values: the best tables, what the file holds of them, and what damage is found."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")
pytest.importorskip("torchao")

import torch
from torch import nn

from lighten.errors import RefusedFormat
from lighten.formats import coreml
from lighten.kit import palettes
from lighten.kit.coreml_check import BLOB, read
from lighten.kit.coreml_check import palettes as palettes_of
from lighten.plugins import get, names
from lighten.types import Device, Precision
from nets import SHAPE, images, net

HOW = {name: Precision(name, "float32") for name in palettes.BITS}
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, here: Device) -> Make:
    """Name of a precision -> the manifest of the "small" net's package."""

    @cache
    def make(name: str) -> Path:
        path = tmp_path_factory.mktemp(name) / "model.mlpackage" / "Manifest.json"
        coreml.export(net("small"), SHAPE, path, HOW[name], here)
        return path

    return make


# --- the best table ---------------------------------------------------------------------------------------


def squares(parts: Any) -> float:
    return float(sum(((np.array(p) - np.mean(p)) ** 2).sum() for p in parts))


def test_a_table_is_the_best_of_all_there_are() -> None:
    """Against every way to cut the sorted values in four."""
    for seed in range(20):
        values = np.random.default_rng(seed).standard_t(3, 12).astype(np.float16)
        table, at = palettes.best_table(values, 2)
        rising = np.sort(values.astype(float))
        cuts = itertools.combinations(range(1, 12), 3)
        least = min(squares(np.split(rising, cut)) for cut in cuts)
        got = float(((values.astype(float) - table[at].astype(float)) ** 2).sum())
        assert got == pytest.approx(least, rel=1e-2, abs=1e-5)


def test_few_values_are_held_exactly_and_the_last_is_repeated() -> None:
    values = np.array([[0.5, -1, 0.5], [2, 2, -1]], np.float16)
    table, at = palettes.best_table(values, 4)
    np.testing.assert_array_equal(table[at], values.reshape(-1))
    assert table.shape == (16,)
    assert set(table[3:]) == {2}
    assert at.dtype == np.uint8


def test_every_block_has_its_own_table() -> None:
    indices = np.array([[0, 1], [1, 0], [0, 0], [1, 1]])
    tables = np.array([[[1, 2]], [[3, 4]]], float)
    np.testing.assert_array_equal(palettes.dense(indices, tables), [[1, 2], [2, 1], [3, 3], [4, 4]])
    for wrong in (np.ones((3, 1, 2)), np.ones((2, 2)), np.ones((2, 1, 1)), np.ones((0, 1, 2))):
        with pytest.raises(ValueError, match="table"):
            palettes.dense(indices, wrong)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("shape, axis", [((512, 512, 3, 3), 0), ((64, 64, 1, 1), 0), ((960, 160, 1, 1), 0), ((1000, 1280), 0), ((64, 96, 2, 2), 1)])  # fmt: skip
def test_tables_take_an_eighth_of_the_indices_at_most(shape: tuple[int, ...], axis: int, bits: int) -> None:
    together = palettes.channels_together(shape, axis, bits)
    assert together
    assert shape[axis] % together == 0
    assert together >= {4: 8, 6: 16, 8: shape[axis]}[bits]
    count = shape[axis] // together
    assert count == 1 or count * 2**bits * 2 <= np.prod(shape) * bits / 8 / 8


def test_few_weights_have_no_table() -> None:
    assert palettes.channels_together((32, 64), 0, 4) is None
    assert palettes.channels_together((3, 683), 0, 8) == 3
    assert palettes.channels_together((960, 1, 7, 7), 0, 4) is None  # depthwise


# --- the file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(HOW))
def test_the_file_holds_the_network_in_tables(made: Make, name: str) -> None:
    path, bits = made(name), palettes.BITS[name]
    assert coreml.check(path, net("small"), SHAPE) == ()
    rows = {row.name: row for row in coreml.weights(path)}
    large = [row for row in rows.values() if row.name.endswith(".indices")]
    assert {row.shape for row in large} == {(80, 64, 3, 3), (16, 16, 3, 3)}
    for row in large:
        assert row.dtype == f"uint{bits}"
        assert row.bytes == np.prod(row.shape) * bits / 8
        table = rows[row.name.replace(".indices", ".lut")]
        assert (table.dtype, table.shape[-2]) == ("float16", 2**bits)
    assert sum(row.bytes for row in rows.values()) <= (path.parent / BLOB).stat().st_size
    assert {row.dtype for row in rows.values()} == {"float16", f"uint{bits}"}


def test_zeros_are_counted_in_the_weights_not_in_the_indices(made: Make) -> None:
    """20 of 80 channels are zero: two tables of eight channels hold nothing else, and an index is zero of all of them."""
    (row,) = [r for r in coreml.weights(made("palette4")) if r.shape == (80, 64, 3, 3)]
    (one,) = [p for p in palettes_of(read(made("palette4"))).values() if p.indices.shape == row.shape]
    assert row.zeros == pytest.approx(np.mean(one.dense == 0))
    assert 16 / 80 <= row.zeros <= 21 / 80
    assert (one.dense[:16] == 0).all()


@pytest.mark.parametrize("name", list(HOW))
def test_tables_are_read_as_coremltools_reads_them(made: Make, name: str) -> None:
    """Its own decoder, on its own reading of the specification."""
    import coremltools as ct
    from coremltools.optimize.coreml import decompress_weights, get_weights_metadata

    package = read(made(name))
    model = ct.models.MLModel(package.spec, weights_dir=str((made(name).parent / BLOB).parent), skip_model_load=True)
    wide = get_weights_metadata(decompress_weights(model), weight_threshold=palettes.FEWEST)
    found = palettes_of(package)
    assert len(found) == 2
    for one in found.values():
        (want,) = [w.val for w in wide.values() if w.val.shape == one.indices.shape]
        np.testing.assert_array_equal(one.dense, want.astype(np.float32))


def test_more_bits_answer_more_like_the_network(made: Make) -> None:
    x, model = images(64, seed=7)[0], net("small")
    with torch.no_grad():
        want = model(x)
        off = [float((coreml.simulate(made(n), model, SHAPE)(x) - want).square().mean().sqrt()) for n in HOW]
    assert off[0] > 2 * off[1] > 4 * off[2] > 0
    assert off[2] < 0.01 * float(want.abs().max())


def test_simulation_computes_with_the_weights_of_the_file(made: Make) -> None:
    model = net("small")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    got = {
        tuple(v.shape): v for v in coreml.simulate(made("palette4"), model, SHAPE).state_dict().values() if v.ndim == 4
    }
    for one in palettes_of(read(made("palette4"))).values():
        np.testing.assert_array_equal(got[one.indices.shape].numpy(), one.dense)
        assert all(len(np.unique(part)) <= 16 for part in np.split(one.dense, len(one.tables)))
    assert all(before[k].equal(v) for k, v in model.state_dict().items())


def test_what_has_no_table_is_said(made: Make) -> None:
    assert coreml.fallbacks(made("palette6")) == (
        "4 x conv with weights in float16: too few for a table",
        "1 x linear with weights in float16: too few for a table",
    )


def test_the_same_network_is_the_same_package(made: Make, tmp_path: Path, here: Device) -> None:
    again = tmp_path / "model.mlpackage" / "Manifest.json"
    for f in (again, *coreml.export(net("small"), SHAPE, again, HOW["palette4"], here)):
        assert f.read_bytes() == (made("palette4").parent / f.relative_to(again.parent)).read_bytes(), f.name


def test_a_transposed_convolution_shares_tables_along_its_outputs(tmp_path: Path, here: Device) -> None:
    torch.manual_seed(0)
    layers = nn.ConvTranspose2d(3, 128, 5, 2), nn.ReLU(), nn.Conv2d(128, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*layers).eval()
    path = tmp_path / "model.mlpackage" / "Manifest.json"
    coreml.export(model, SHAPE, path, HOW["palette4"], here)
    (one,) = palettes_of(read(path)).values()
    assert one.tables.shape == (1, 16, 1, 1, 16)
    assert coreml.check(path, model, SHAPE) == ()


# --- what is found, what is refused ---------------------------------------------------------------------


def test_every_change_of_a_table_is_found() -> None:
    dice = np.random.default_rng(0)
    weight = dice.standard_t(4, (16, 40)).astype(np.float32)
    parts = [palettes.best_table(part, 4) for part in np.split(weight.astype(np.float16), 2)]
    tables = np.stack([t for t, _ in parts])[:, None].astype(np.float32)
    indices = np.concatenate([at.reshape(8, 40) for _, at in parts]).astype(np.intp)
    slack = 1e-3 * float(np.abs(weight).max())
    assert palettes.problem(weight, indices, tables, slack) is None
    other, moved, swapped, coarse = indices.copy(), tables.copy(), weight.copy(), np.linspace(-6, 6, 16)[None, None]
    other[3, 5] = (other[3, 5] + 3) % 16
    moved[1, 0, 4] += 1.5 * slack
    swapped[0, 0] += 3
    assert "nearest" in str(palettes.problem(weight, other, tables, slack))
    assert "mean" in str(palettes.problem(weight, indices, moved, slack))
    assert palettes.problem(swapped, indices, tables, slack)
    assert palettes.problem(weight, indices, np.repeat(coarse, 2, 0), slack)
    assert "rising" in str(palettes.problem(weight, 15 - indices, tables[..., ::-1], slack))
    two = np.repeat(tables[..., [0, -1]], 8, -1)  # stationary for no one: all weights at the ends
    assert palettes.problem(weight, np.where(weight > 0, 15, 0), two, slack)


def test_a_changed_byte_of_the_indices_is_found(made: Make, tmp_path: Path) -> None:
    """Two 4-bit indices to a byte, the first in the low half: found in the file by packing them here."""
    import shutil

    shutil.copytree(made("palette4").parent, tmp_path / "model.mlpackage")
    path = tmp_path / "model.mlpackage" / "Manifest.json"
    at = next(p.indices for p in palettes_of(read(path)).values() if p.indices.shape == (16, 16, 3, 3)).reshape(-1)
    packed = (at[::2] | at[1::2] << 4).astype(np.uint8).tobytes()
    raw = (path.parent / BLOB).read_bytes()
    assert raw.count(packed) == 1
    (path.parent / BLOB).write_bytes(raw.replace(packed, bytes([packed[0] ^ 0x0F]) + packed[1:]))
    assert any("nearest" in line for line in coreml.check(path, net("small"), SHAPE))


def test_a_network_with_other_weights_is_told_apart(made: Make) -> None:
    other: Any = net("small")
    with torch.no_grad():
        other.right[0].weight[-1, -1, -1, -1] += 3
    assert coreml.check(made("palette8"), other, SHAPE)


def test_a_network_too_small_for_tables_is_refused(tmp_path: Path, here: Device) -> None:
    with pytest.raises(RefusedFormat, match="2048 weights"):
        coreml.export(net("mobile"), SHAPE, tmp_path / "m.mlpackage" / "Manifest.json", HOW["palette4"], here)


def test_palettes_are_taken_here_and_refused_elsewhere(here: Device) -> None:
    for how in HOW.values():
        assert coreml.refuses(how, here) is None
        for name in names("formats"):
            if name != "coreml":
                assert how.weights in str(get("formats", name).refuses(how, here))
    layer = (("fc", "int8", "float32"),)
    assert "single layers" in str(coreml.refuses(Precision("palette4", "float32", layer), here))
    assert "palette4" in str(coreml.refuses(Precision("palette4", "int8"), here))
    assert "palette4" in str(coreml.refuses(Precision("int8", "int8", (("fc", "palette4", "float32"),)), here))
    assert coreml.refuses(Precision("palette5", "float32"), here)
