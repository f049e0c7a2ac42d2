"""Every Triton kernel compiles for Ampere, Hopper and Blackwell cards, without one. Needs Triton, not a GPU."""

import importlib.util
import re

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

_TYPES = {
    "n": "i32", "m": "i32", "d": "i32", "size": "i32", "levels": "i32", "rounds": "i32", "share": "i32", "parts": "i32",
    "step": "fp32", "inverse": "fp32", "growth": "fp32", "scale": "fp32",
    "lows": "*fp64", "excesses": "*fp64", "prices": "*fp64", "outsides": "*fp64", "big_ms": "*fp64", "least": "*fp64",
    "rows_of": "*i32", "cols_of": "*i32", "parents": "*i32", "want": "*i32", "cost": "*fp32", "masses": "*fp32",
    "x": "*fp32", "y": "*fp32", "bias": "*fp32", "offset": "*fp32", "out": "*fp32", "mass": "*fp32",
}  # fmt: skip
_SIZES = ("n", "size", "d")  # that a launch finds to be multiples of 16, or not
_TILE = {"DUMMIES": True, "ROWS": 16, "BLOCK": 256}
_PAIRS = {"DIRECT": False, "D": 32, "M": 64, "N": 64, "PRECISION": "ieee"}
_WIDE = {"DIRECT": True, "D": 3, "M": 8, "N": 512}
CASES = [
    ("triton_matching", "_start_kernel", _TILE, 8, {"prices": "*fp32"}),
    ("triton_matching", "_pass_kernel", {"DUMMIES": False, "ROWS": 1, "BLOCK": 16384}, 16, {"prices": "*fp32"}),
    ("triton_matching", "_price_kernel", {"BLOCK": 128}, 4, {"prices": "*fp32"}),
    ("triton_matching", "_scan_kernel", _TILE, 8, {"cost": "*fp64"}),
    ("triton_matching", "_finish_kernel", {"DUMMIES": False, "BLOCK": 128}, 1, {}),
    ("triton_matching", "_finish_kernel", {"DUMMIES": True, "BLOCK": 1024}, 4, {"cost": "*fp64"}),
    ("triton_matching", "_finish_kernel", {"DUMMIES": False, "BLOCK": 16384}, 32, {}),
    ("triton_streaming", "_log_sums_kernel", _PAIRS, 4, {}),
    ("triton_streaming", "_log_sums_kernel", _PAIRS | _WIDE, 2, {}),
    ("triton_streaming", "_log_sums_kernel", _PAIRS | {"PRECISION": "tf32x3"}, 4, {}),
    ("triton_streaming", "_log_sums_kernel", _PAIRS | _WIDE, 2, {"x": "*bf16", "y": "*bf16"}),
    ("triton_streaming", "_transported_kernel", _PAIRS | {"OUT": 64}, 8, {}),
]


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize(("module", "name", "constants", "warps", "types"), CASES)
def test_a_kernel_compiles(module, name, constants, warps, types, capability, even):
    """As a launch compiles it, of aligned tensors and even sizes too, where threads share wider loads and stores."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"mbot.kernels.{module}"), name)
    signature = {
        argument: "constexpr" if argument in constants else types.get(argument) or _TYPES[argument]
        for argument in kernel.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(kernel.arg_names)
        if even and (signature[argument].startswith("*") or argument in _SIZES)
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True},
    )
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 48 << 10
    assert "ld.global.nc" not in compiled.asm["ptx"]  # state that other threads write must not be cached as constant
    if name == "_finish_kernel":
        # Loads (L), stores (S) and barriers (B) as they are written: threads share the state through memory, so there
        # is a barrier wherever loads follow stores or stores loads, and what a barrier was waited for is read again.
        found = re.findall(r"\b(ld\.global|st\.global|bar\.sync)", compiled.asm["ptx"])
        order = "".join({"ld.global": "L", "st.global": "S", "bar.sync": "B"}[what] for what in found)
        assert not re.search("LS|SL", order), order
        assert re.search("LB+L+B+S+B+L", order), order
