"""Every Triton kernel compiles, at the official shapes, for accelerators that are not here.

Compiling needs no device. It shows that types, layouts and shared memory fit a target, not that
results are right; that is what ``triton_cases`` is for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of shared memory one block may use: compute capability 9.0, CDNA 3.
TARGETS = {"cuda 90 32": 227 << 10, "hip gfx942 64": 64 << 10}

PROGRAM = r"""
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rorqual.kernels.triton import attention, compressor, hyper_connection, indexer, linear

backend, arch, warp = sys.argv[1:]
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
N, F, I = "*bf16", "*fp32", "*i64"
streams = [
    (hyper_connection._project_streams, [N, F, F, *["i32"] * 3, "fp32"], [16, 64, 32]),
    (hyper_connection._coefficients, [F] * 6 + ["i32"] * 3 + ["fp32"], [16, 4]),
    (hyper_connection._read_streams, [N, F, N, "i32", "i32"], [4, 256]),
    (hyper_connection._write_streams, [N, N, F, F, N, "i32", "i32"], [4, 256]),
]
products = [
    (linear._grouped_linear, [N, I, I, I, I, I, N, *["i32"] * 3], [fp8, 64, 64, 64, 512, False])
    for fp8 in (True, False)
]
kernels = [
    (attention._sparse_attention, [N, N, F, I, N, *["i32"] * 3, "fp32"], [32, 32, 512, False]),
    (indexer._indexer_scores, [N, N, N, F, *["i32"] * 3], [64, 64, 128, False]),
    (compressor._pool_group, [F, F, F, "i32", "i32"], [128, 64]),
    *streams,
    *products,
]
for kernel, types, constants in kernels:
    names = kernel.arg_names
    assert len(names) == len(types) + len(constants), kernel.__name__
    signature = dict(zip(names, types + ["constexpr"] * len(constants)))
    values = {(len(types) + i,): value for i, value in enumerate(constants)}
    compiled = triton.compile(ASTSource(kernel, signature, values), target=target)
    print(kernel.__name__, compiled.metadata.shared)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_and_fits(target: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the extra 'triton' is not installed")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-", *target.split()],
        input=PROGRAM,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    shared = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(shared) == 9
    assert max(shared) <= TARGETS[target]
