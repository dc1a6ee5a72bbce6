"""What the GPU's launches and the compile-only check decide, as far as a CPU can ask them."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rag2_kernels.gpu import launch

ROOT = Path(__file__).resolve().parents[1]


def entry(bits: int, rows: int, tma: bool) -> dict:
    tiles = {"BM": rows // 8, "BN": 64, "BH": 32, "SPAN": 1, "GROUP": 1, "warps": 4, "stages": 2}
    shape = [rows, 1000, 64]
    return {"bits": bits, "shape": shape, "pointer": {"BN": 32}, "tiles": {**tiles, "TMA": tma}}


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    known = {
        "any": [entry(32, 128, False)],
        "Device": [entry(16, 128, True), entry(16, 1024, True)],
    }
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "table", lambda kernel, device: known[device])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Device")


def on_gpu(dtype: torch.dtype) -> Any:
    size = torch.empty(0, dtype=dtype).element_size()
    return SimpleNamespace(is_cuda=True, device="cuda:0", element_size=lambda: size)


def test_the_nearest_shape_s_tiles_are_taken():
    half = on_gpu(torch.bfloat16)
    assert launch.tiles("kernel", half, 100, (1000, 64)).BM == 16
    assert launch.tiles("kernel", half, 5000, (1000, 64)).BM == 128


def test_rows_that_do_not_begin_at_16_bytes_are_read_by_pointers():
    half = on_gpu(torch.bfloat16)
    assert launch.tiles("kernel", half, 100, (1000, 64)).TMA
    odd = launch.tiles("kernel", half, 100, (1000, 63))
    assert (odd.TMA, odd.BN) == (False, 32)


def test_a_device_without_entries_of_a_precision_takes_those_for_any():
    assert launch.tiles("kernel", on_gpu(torch.float32), 100, (1000, 64)).BM == 16


def test_a_tensor_that_begins_between_16_bytes_is_copied_for_its_descriptor():
    flat = torch.zeros(64 * 32 + 1)
    shape = launch.Tiles(16, 16, 16, 1, 1, 4, 1, TMA=True)
    first, second = launch.descriptors(shape, flat[1:].view(64, 32), flat[:-1].view(64, 32))
    assert first.base.data_ptr() % 16 == 0
    assert second.base.data_ptr() == flat.data_ptr()


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "kernels/check")
    return importlib.import_module("sm90")


FINE = {"spilled": 0, "registers": 200, "shared": 1000, "warnings": [], "HGMMA": 4, "HMMA": 0}
FINE |= {"UTMALDG": 2}


@pytest.mark.parametrize(
    "figures, told",
    [
        ({}, []),
        ({"spilled": 4}, ["spills 4 bytes"]),
        ({"registers": 256}, ["256 registers"]),
        ({"shared": 232_449}, ["232449 bytes of shared memory"]),
        ({"warnings": ["C7515"]}, ["ptxas warns: C7515"]),
        ({"HGMMA": 0, "HMMA": 8}, ["no wgmma"]),
        ({"UTMALDG": 0}, ["tensor descriptors, but no TMA loads"]),
    ],
)
def test_the_compile_only_check_tells_what_no_kernel_may_do(check, figures, told):
    case = SimpleNamespace(tensor_cores=True, constants={"BM": 64, "TMA": True})
    assert check.broken_rules(case, FINE | figures) == told


def test_the_compile_only_check_tells_what_the_golden_file_does_not_say(check):
    golden = {"kernel": {"registers": 10}, "gone": {}}
    seen = {"kernel": {"registers": 11}, "new": {}}
    assert sorted(check.differences(golden, seen)) == [
        "gone: in golden.json only",
        "kernel: registers 11, was 10",
        "new: not in golden.json",
    ]
    assert not check.differences(seen, seen)
