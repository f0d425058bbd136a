"""The native kernels against ``reference`` and the model's modules, and against themselves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rorqual.kernels import cpu, reference
from rorqual.model.config import TINY, ModelConfig
from rorqual.model.moe import MoE
from rorqual.model.native import _shape

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the extension was not built")

FORMATS = ("fp32", "bf16", "int8", "fp8", "fp4")
Array = NDArray[np.float32]


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def native(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module, on each instruction set this machine has."""
    module = cpu.native()
    best = module.isa()
    try:
        if not module.set_isa(request.param):
            pytest.skip(f"this machine has no {request.param}")
        yield module
    finally:
        module.set_isa(best)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def weights(native: Any, kind: str, outputs: int, inputs: int) -> tuple[Any, Array]:
    """A packed matrix and the float32 values it stands for."""
    rng = np.random.default_rng(outputs + inputs)
    w = rng.standard_normal((outputs, inputs), dtype=np.float32)
    if kind == "fp32":
        return native.Matrix.from_fp32(w), w
    if kind == "bf16":
        rounded = torch.from_numpy(w).bfloat16()
        return native.Matrix.to_bf16(w), rounded.float().numpy()
    if kind == "int8":
        scale = (np.abs(w).max(1, keepdims=True) / np.float32(127)).astype(np.float32)
        return native.Matrix.to_int8(w), np.rint(w / scale) * scale
    exponents = rng.integers(120, 131, (-(-outputs // 128), -(-inputs // 128))).astype(np.uint8)
    if kind == "fp8":
        codes = rng.integers(0, 256, (outputs, inputs)).astype(np.uint8)
        codes[codes & 127 == 127] = 0  # the NaN codes
        value = reference.dequantize_fp8(
            torch.from_numpy(codes).view(torch.float8_e4m3fn),
            torch.from_numpy(exponents).view(torch.float8_e8m0fnu),
        )
        return native.Matrix.from_fp8(codes, exponents), value.numpy()
    codes = rng.integers(0, 256, (outputs, inputs // 2)).astype(np.uint8)
    exponents = rng.integers(120, 131, (outputs, -(-inputs // 32))).astype(np.uint8)
    value = reference.dequantize_fp4(
        torch.from_numpy(codes), torch.from_numpy(exponents).view(torch.float8_e8m0fnu)
    )
    return native.Matrix.from_fp4(codes, exponents), value.numpy()


def product(native: Any, matrix: Any, x: Array, threads: int = 1) -> Array:
    y = np.full((len(x), matrix.outputs), np.nan, np.float32)
    native.matmul(matrix, x, y, threads)
    return y


# ---- matrices ----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 2), (16, 64), (24, 1024), (130, 96), (300, 514), (512, 320)]
)
def test_products_are_those_of_the_expanded_weights(
    native: Any, kind: str, outputs: int, inputs: int
) -> None:
    matrix, value = weights(native, kind, outputs, inputs)
    for rows in (1, 3, 7, 31):
        x = normal(rows, inputs, seed=rows)
        want = x.astype(np.float64) @ value.T.astype(np.float64)
        size = np.abs(x).astype(np.float64) @ np.abs(value).T.astype(np.float64)
        assert (np.abs(product(native, matrix, x) - want) <= 2e-6 * size + 1e-30).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_rows_product_depends_on_no_other_row_and_no_thread(native: Any, kind: str) -> None:
    matrix, _ = weights(native, kind, 300, 514)
    x = normal(500, 514)
    together = product(native, matrix, x)
    np.testing.assert_array_equal(product(native, matrix, x, threads=2), together)
    for first, count in ((0, 1), (17, 2), (100, 9), (250, 40)):
        alone = product(native, matrix, x[first : first + count])
        np.testing.assert_array_equal(alone, together[first : first + count])


@pytest.mark.parametrize("kind", FORMATS)
def test_products_have_the_same_bits_on_avx2_and_avx512(kind: str) -> None:
    module = cpu.native()
    if module.isa() != "avx512":
        pytest.skip("this machine has no AVX-512")
    matrix, _ = weights(module, kind, 100, 514)
    x = normal(20, 514)
    want = product(module, matrix, x)
    try:
        module.set_isa("avx2")
        np.testing.assert_array_equal(product(module, matrix, x), want)
    finally:
        module.set_isa("avx512")


def test_packed_weights_take_the_bytes_of_their_format() -> None:
    native = cpu.native()
    sizes = {kind: weights(native, kind, 256, 1024)[0].nbytes for kind in FORMATS}
    assert sizes["fp32"] == 2 * sizes["bf16"] == 4 * 256 * 1024
    assert sizes["int8"] == 256 * 1024 + 4 * 256
    assert sizes["fp8"] <= 1.01 * 256 * 1024
    assert sizes["fp4"] <= 0.63 * 256 * 1024  # half a byte and a float32 scale per 32


def test_scales_of_the_wrong_shape_are_refused() -> None:
    native = cpu.native()
    with pytest.raises(ValueError, match="128 x 128"):
        native.Matrix.from_fp8(np.zeros((130, 64), np.uint8), np.zeros((1, 1), np.uint8))
    with pytest.raises(ValueError, match="per 32"):
        native.Matrix.from_fp4(np.zeros((4, 32), np.uint8), np.zeros((4, 1), np.uint8))


# ---- row-wise operations -----------------------------------------------------------------------
@pytest.mark.parametrize("width", [5, 16, 100, 256])
def test_rms_norm(native: Any, width: int) -> None:
    x, weight = normal(7, width), normal(width, seed=1)
    y = np.empty_like(x)
    native.rms_norm(x, weight, 1e-6, False, y)
    want = reference.rms_norm(torch.from_numpy(x), torch.from_numpy(weight), 1e-6)
    np.testing.assert_allclose(y, want.numpy(), rtol=1e-5, atol=1e-6)
    native.rms_norm(x, weight, 1e-6, True, y)
    np.testing.assert_allclose(y, want.bfloat16().float().numpy(), rtol=2**-7)
    assert (y.view(np.uint32) & 0xFFFF == 0).all()


@pytest.mark.parametrize("inverse", [False, True])
def test_rotation(native: Any, inverse: bool) -> None:
    x, angle = normal(6, 3, 20), normal(6, 4, seed=1)
    cos, sin = np.cos(angle), np.sin(angle)
    want = reference.rotate(
        torch.from_numpy(x.copy()),
        torch.from_numpy(cos)[:, None],
        torch.from_numpy(sin)[:, None],
        inverse=inverse,
    )
    native.rotate(x, cos, sin, inverse)
    np.testing.assert_allclose(x, want.numpy(), rtol=1e-5, atol=1e-6)


def test_swiglu_to_the_ends_of_its_range(native: Any) -> None:
    gate, up = 8 * normal(9, 37), 8 * normal(9, 37, seed=1)
    gate[0, :4] = [-200, 200, -88, 0]
    want = 0.7 * reference.swiglu(torch.from_numpy(gate.copy()), torch.from_numpy(up), 10.0)
    native.swiglu(gate, up, 10.0, 0.7)
    np.testing.assert_allclose(gate, want.numpy(), rtol=1e-5, atol=1e-6)


def test_fp8_rounding_is_exact(native: Any) -> None:
    x = normal(20, 300) * np.exp(3 * normal(20, 300, seed=1))
    x[0] = 0
    y = np.empty_like(x)
    native.simulate_fp8(x, 128, y)
    np.testing.assert_array_equal(y, reference.simulate_fp8(torch.from_numpy(x), 128).numpy())


# ---- residual streams --------------------------------------------------------------------------
@pytest.mark.parametrize(("streams", "hidden", "rows"), [(4, 64, 1), (4, 40, 9), (2, 33, 5)])
def test_streams_are_read_and_written_as_the_reference_does(
    native: Any, streams: int, hidden: int, rows: int
) -> None:
    columns = 2 * streams + streams**2
    x = normal(rows, streams, hidden)
    fn, base = normal(columns, streams * hidden, seed=1), normal(columns, seed=2)
    scale, norm = normal(3, seed=3), normal(hidden, seed=4)
    fn *= 0.3
    matrix = native.Matrix.from_fp32(fn)
    read = np.empty((rows, hidden), np.float32)
    coefficients = np.empty((rows, streams + streams**2), np.float32)
    native.enter_streams(matrix, scale, base, norm, x, 20, 1e-6, 1e-6, read, coefficients, 1, 1)
    tensors = [torch.from_numpy(a) for a in (x, fn, scale, base)]
    want = reference.stream_mixing(*tensors, iterations=20, eps=1e-6, norm_eps=1e-6)
    u = reference.rms_norm(
        reference.read_streams(tensors[0], want.pre_NM), torch.from_numpy(norm), 1e-6
    )
    np.testing.assert_allclose(read, u.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(coefficients[:, :streams], want.post_NM.numpy(), atol=1e-5)
    comb = coefficients[:, streams:].reshape(rows, streams, streams)
    np.testing.assert_allclose(comb, want.comb_NMM.numpy(), atol=1e-5)
    output = normal(rows, hidden, seed=5)
    after = reference.write_streams(torch.from_numpy(output), tensors[0], want).numpy()
    native.leave_streams(output, coefficients, x)
    np.testing.assert_allclose(x, after, rtol=1e-4, atol=1e-5)


def test_mixing_of_a_token_has_the_same_bits_alone(native: Any) -> None:
    x, fn = normal(11, 4, 48), 0.3 * normal(24, 192, seed=1)
    rest = (normal(3, seed=3), normal(24, seed=2), normal(48, seed=4))
    matrix = native.Matrix.from_fp32(fn)

    def enter(part: Array) -> tuple[Array, Array]:
        read = np.empty((len(part), 48), np.float32)
        coefficients = np.empty((len(part), 20), np.float32)
        native.enter_streams(matrix, *rest, part, 20, 1e-6, 1e-6, read, coefficients, 1, 1)
        return read, coefficients

    together = enter(x)
    for i in range(11):
        for mine, all_rows in zip(enter(x[i : i + 1]), together, strict=True):
            np.testing.assert_array_equal(mine[0], all_rows[i])


def test_merging_of_streams(native: Any) -> None:
    x, fn = normal(5, 4, 48), 0.3 * normal(4, 192, seed=1)
    scale, base, norm = normal(1, seed=2), normal(4, seed=3), normal(48, seed=4)
    y = np.empty((5, 48), np.float32)
    native.merge_streams(native.Matrix.from_fp32(fn), scale, base, norm, x, 1e-6, 1e-6, y)
    tensors = [torch.from_numpy(a) for a in (x, fn, scale, base)]
    merged = reference.merge_streams(*tensors, eps=1e-6, norm_eps=1e-6)
    want = reference.rms_norm(merged, torch.from_numpy(norm), 1e-6)
    np.testing.assert_allclose(y, want.numpy(), rtol=1e-4, atol=1e-5)


# ---- experts -----------------------------------------------------------------------------------
def experts(native: Any, config: ModelConfig, *, hashed: bool, threads: int) -> tuple[MoE, Any]:
    generator = torch.Generator().manual_seed(0)
    moe = MoE(config, hashed=hashed)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        if hashed:
            table = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator)
            moe.gate.tid2eid = table.topk(config.num_experts_per_tok).indices
        else:
            moe.gate.bias = 0.3 * torch.randn(config.n_routed_experts, generator=generator)
    made = {
        f"ffn.{name.removesuffix('.weight')}": native.Matrix.from_fp32(p.detach().numpy())
        for name, p in moe.named_parameters()
    }
    arrays = {} if hashed else {"ffn.gate.bias": moe.gate.bias.numpy()}
    tables = {"ffn.gate.tid2eid": moe.gate.tid2eid.int().numpy().ravel()} if hashed else {}
    return moe, native.MoeBench(_shape(config), made, arrays, tables, threads)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize(("width", "topk", "shared"), [(128, 2, 1), (40, 3, 2)])
def test_experts_are_those_of_the_module(
    native: Any, hashed: bool, width: int, topk: int, shared: int
) -> None:
    config = TINY.replace(
        hidden_size=72, moe_intermediate_size=width, num_experts_per_tok=topk,
        n_shared_experts=shared, vocab_size=50,
    )  # fmt: skip
    module, bench = experts(native, config, hashed=hashed, threads=2)
    x = 3 * normal(70, 72)
    tokens = np.random.default_rng(0).integers(0, 50, 70).astype(np.int32)
    got = np.empty_like(x)
    bench.run(x, tokens, got)
    with torch.inference_mode():
        want = module(torch.from_numpy(x), torch.from_numpy(tokens).long()).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    alone = np.empty((1, 72), np.float32)
    for i in (0, 33, 69):
        bench.run(x[i : i + 1], tokens[i : i + 1], alone)
        np.testing.assert_array_equal(alone[0], got[i])


def test_a_table_that_names_no_expert_is_refused() -> None:
    native = cpu.native()
    config = TINY.replace(hidden_size=32, vocab_size=10)
    module, _ = experts(native, config, hashed=True, threads=1)
    made = {
        f"ffn.{name.removesuffix('.weight')}": native.Matrix.from_fp32(p.detach().numpy())
        for name, p in module.named_parameters()
    }
    table = np.full(20, 16, np.int32)
    with pytest.raises(ValueError, match="no such expert"):
        native.MoeBench(_shape(config), made, {}, {"ffn.gate.tid2eid": table}, 1)


_TOO_MANY_THREADS = """
import resource
import numpy as np
from rorqual.kernels import cpu

native = cpu.native()
weight = native.Matrix.from_fp32(np.zeros((16, 16), np.float32))
x = np.zeros((1, 16), np.float32)
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (256 << 20),) * 2)
try:
    native.matmul(weight, x, np.zeros((1, 16), np.float32), threads=1000)
except RuntimeError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_more_threads_than_the_system_has_are_an_error_not_a_crash() -> None:
    child = subprocess.run(
        [sys.executable, "-c", _TOO_MANY_THREADS], capture_output=True, text=True, timeout=60
    )
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.startswith("refused:")
