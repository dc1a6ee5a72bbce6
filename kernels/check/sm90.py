"""Compiles every kernel for Hopper without a GPU, and compares what comes out with golden.json.

    make kernels-check                                # with triton 3.7.1 and 3.6.0
    python kernels/check/sm90.py --write              # after a change that is meant

For each kernel, shape of tiles and dtype: it must use the tensor cores (wgmma, but in tiles of
fewer than 64 rows; with tensor descriptors, the copy engine), spill nothing, fit into registers and
shared memory, and ptxas must not warn of serialised wgmma. Registers, shared memory and instruction
counts are compared with golden.json, so that a change is seen. What this cannot see: races, bank
conflicts, real time.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cases
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HERE = Path(__file__).parent
GOLDEN = HERE / "golden.json"
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_LIMIT = 232_448  # bytes a program may have on an H100 or H200
REGISTER_LIMIT = 255
WGMMA_ROWS = 64  # smaller tiles, for a few rows at the speed of memory, use mma
COUNTED = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "SHFL", "FMNMX", "MUFU")


def main() -> None:
    """Exit status 1 if a kernel breaks a rule or differs from the golden file."""
    arguments = argparse.ArgumentParser(description="Compile the kernels for sm_90a.")
    arguments.add_argument("--write", action="store_true", help="make what is seen the golden file")
    asked = arguments.parse_args()
    seen, complaints = {}, []
    for case in cases.all_cases():
        figures = compiled(case)
        seen[case.name] = figures
        complaints += [f"{case.name}: {what}" for what in broken_rules(case, figures)]
        sys.stdout.write(f"{case.name}: {json.dumps(figures)}\n")
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if asked.write:
        golden[triton.__version__] = seen
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    else:
        complaints += differences(golden.get(triton.__version__, {}), seen)
    for complaint in complaints:
        sys.stdout.write(f"WRONG {complaint}\n")
    sys.stdout.write(f"triton {triton.__version__}: {len(seen)} kernels, {len(complaints)} wrong\n")
    raise SystemExit(1 if complaints else 0)


def compiled(case: cases.Case) -> dict[str, Any]:
    """Registers, spilled and shared bytes, warnings and instruction counts of one kernel."""
    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.types[n] for n in names}
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in case.constants.items()},
        # As at a launch with aligned tensors; else loads are neither vectorised nor pipelined.
        attrs={
            (names.index(n),): [["tt.divisibility", 16]]
            for n, kind in signature.items()
            if kind.startswith("*")
        },
    )
    options = {"num_warps": case.warps, "num_stages": case.stages}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(built.asm["ptx"])
        cubin.write_bytes(built.asm["cubin"])
        told = _run("ptxas", "--gpu-name", "sm_90a", "-v", ptx, "-o", Path(folder) / "again.cubin")
        code = _run("nvdisasm", "-c", cubin)
    return {
        "registers": int(_first(r"Used (\d+) registers", told)),
        "spilled": int(_first(r"(\d+) bytes spill stores", told)),
        "shared": built.metadata.shared,
        "warnings": sorted(set(re.findall(r"\((C7\d+)\)", told))),
        **{op: len(re.findall(rf"\b{op}[.\s]", code)) for op in COUNTED},
    }


def broken_rules(case: cases.Case, figures: dict[str, Any]) -> list[str]:
    """What no kernel may do."""
    wrong = []
    if figures["spilled"]:
        wrong.append(f"spills {figures['spilled']} bytes")
    if figures["registers"] > REGISTER_LIMIT:
        wrong.append(f"{figures['registers']} registers")
    if figures["shared"] > SHARED_LIMIT:
        wrong.append(f"{figures['shared']} bytes of shared memory")
    if figures["warnings"]:
        wrong.append(f"ptxas warns: {', '.join(figures['warnings'])}")
    if case.tensor_cores and not figures["HGMMA"]:
        wgmma = case.constants["BM"] >= WGMMA_ROWS
        if wgmma or not figures["HMMA"]:
            wrong.append("no wgmma" if wgmma else "no tensor cores")
    if case.constants.get("TMA") and not figures["UTMALDG"]:
        wrong.append("tensor descriptors, but no TMA loads")
    return wrong


def differences(golden: dict[str, Any], seen: dict[str, Any]) -> list[str]:
    """Where kernels and figures are not those of the golden file."""
    wrong = [f"{name}: not in golden.json" for name in seen if name not in golden]
    wrong += [f"{name}: in golden.json only" for name in golden if name not in seen]
    for name in set(golden) & set(seen):
        for figure, value in seen[name].items():
            if golden[name].get(figure) != value:
                wrong.append(f"{name}: {figure} {value}, was {golden[name].get(figure)}")
    return wrong


def _run(tool: str, *arguments: object) -> str:
    done = subprocess.run(
        [str(TOOLS / tool), *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in what ptxas said: {text[:400]}"
    return found[1]


if __name__ == "__main__":
    main()
