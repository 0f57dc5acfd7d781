"""Which kernel torch tensors reach, and what the environment changes about it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from random_weights import random_weight

from gossamer.errors import KernelError
from gossamer.kernels import cpu, dispatch, reference


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A clean environment for GOSSAMER_KERNELS."""
    monkeypatch.delenv("GOSSAMER_KERNELS", raising=False)
    return monkeypatch


@pytest.mark.parametrize("tokens", [0, 1, dispatch.FEW_TOKENS, dispatch.FEW_TOKENS + 1])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_linear_packed_agrees_with_the_reference_on_both_sides_of_the_crossover(
    kernels: pytest.MonkeyPatch, tokens: int, asymmetric: bool
) -> None:
    weight = random_weight(24, 128, 4, 64, asymmetric)
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(0))
    arguments = (x, weight.packed, weight.scale, weight.zero, 4, 64)
    torch.testing.assert_close(
        dispatch.linear_packed(*arguments), reference.linear_packed(*arguments), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("tokens", [0, 1, dispatch.FEW_TOKENS, dispatch.FEW_TOKENS + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_dense_agrees_with_the_reference(kernels: pytest.MonkeyPatch, tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(tokens, 70, generator=generator), torch.randn(9, 70, generator=generator).to(dtype)
    torch.testing.assert_close(
        dispatch.linear_dense(x, weight), reference.linear_dense(x, weight), rtol=1e-4, atol=1e-4
    )


def test_few_tokens_never_make_the_float_weight(kernels: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("dequantized")

    weight = random_weight(8, 64, 4, 32)
    kernels.setattr(cpu, "dequantize", refuse)
    dispatch.linear_packed(torch.zeros(dispatch.FEW_TOKENS, 64), weight.packed, weight.scale, None, 4, 32)
    with pytest.raises(AssertionError, match="dequantized"):
        dispatch.linear_packed(torch.zeros(dispatch.FEW_TOKENS + 1, 64), weight.packed, weight.scale, None, 4, 32)


@pytest.mark.parametrize("tokens", [1, dispatch.FEW_TOKENS + 1])
@pytest.mark.parametrize("x_dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_activations_of_another_dtype_are_refused(
    kernels: pytest.MonkeyPatch, tokens: int, x_dtype: torch.dtype
) -> None:
    weight = random_weight(8, 64, 4, 32)
    x = torch.zeros(tokens, 64, dtype=x_dtype)
    with pytest.raises(KernelError, match="x is"):
        dispatch.linear_packed(x, weight.packed, weight.scale, None, 4, 32)
    with pytest.raises(KernelError, match="x is"):
        dispatch.linear_dense(x, torch.zeros(8, 64).bfloat16())


@pytest.mark.parametrize("tokens", [1, dispatch.FEW_TOKENS + 1])
def test_activations_of_another_width_are_refused(kernels: pytest.MonkeyPatch, tokens: int) -> None:
    weight = random_weight(8, 64, 4, 32)
    with pytest.raises(KernelError, match=r"expected .*\[any, (12|64)\]"):
        dispatch.linear_packed(torch.zeros(tokens, 96), weight.packed, weight.scale, None, 4, 32)
    with pytest.raises(KernelError, match=r"expected .*\[any, (96|64)\]"):
        dispatch.linear_dense(torch.zeros(tokens, 96), torch.zeros(8, 64).bfloat16())


def test_tensor_that_is_not_on_the_cpu_is_refused(kernels: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match="on meta"):
        dispatch.unpack_codes(torch.empty(1, 4, dtype=torch.int32, device="meta"), 4, 32)


def test_dense_weight_must_be_floats(kernels: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match=r"weight is torch.int8 \[8, 64\]"):
        dispatch.linear_dense(torch.zeros(1, 64), torch.zeros(8, 64, dtype=torch.int8))


def test_reference_is_used_if_the_environment_asks_for_it(kernels: pytest.MonkeyPatch) -> None:
    weight = random_weight(8, 64, 4, 32, asymmetric=True)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    arguments = (weight.packed, weight.scale, weight.zero, 4, 32)
    kernels.setenv("GOSSAMER_KERNELS", "reference")
    kernels.setattr(cpu, "extension", lambda: pytest.fail("the extension was asked for"))
    assert dispatch.isa() == "reference"
    assert torch.equal(dispatch.linear_packed(x, *arguments), reference.linear_packed(x, *arguments))
    assert torch.equal(dispatch.dequantize(*arguments), reference.dequantize(*arguments))
    assert torch.equal(dispatch.unpack_codes(weight.packed, 4, 64), weight.codes)
    assert torch.equal(dispatch.pack_codes(weight.codes, 4), weight.packed)
    assert torch.equal(dispatch.linear_dense(x, weight.scale.repeat(1, 32)), x @ weight.scale.repeat(1, 32).T)


def test_unknown_kernels_are_refused_with_the_nearest_name(kernels: pytest.MonkeyPatch) -> None:
    kernels.setenv("GOSSAMER_KERNELS", "referense")
    with pytest.raises(KernelError, match="did you mean 'reference'"):
        dispatch.isa()


def test_missing_extension_says_how_to_build_it() -> None:
    code = "import sys\nsys.modules['gossamer.kernels._cpu'] = None\n" + (
        "from gossamer.errors import KernelError\nfrom gossamer.kernels import cpu\n"
        "try: cpu.isa()\nexcept KernelError as error: print(error)"
    )
    assert "make build" in run(code)


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_environment_forces_an_instruction_set(name: str) -> None:
    if name not in cpu.isas():
        pytest.skip(f"this machine has no {name}")
    assert run("from gossamer.kernels import cpu\nprint(cpu.isa())", GOSSAMER_ISA=name).strip() == name


def test_unknown_instruction_set_is_refused_with_those_that_exist() -> None:
    code = (
        "from gossamer.errors import KernelError\nfrom gossamer.kernels import cpu\n"
        "try: cpu.isa()\nexcept KernelError as error: print(error)"
    )
    said = run(code, GOSSAMER_ISA="mmx")
    assert "'mmx'" in said
    assert "portable" in said


def test_kernels_run_from_several_python_threads_at_once() -> None:
    weight = random_weight(1000, 512, 4, 64)
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).numpy()
    expected = cpu.packed_linear(x, *weight.arguments, 4, 64, 1)
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(20):
            if not (cpu.packed_linear(x, *weight.arguments, 4, 64, 2) == expected).all():
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_child_has_threads_of_its_own() -> None:
    code = (
        "import os, numpy as np\nfrom gossamer.kernels import cpu\n"
        "data = np.zeros(1 << 20, np.uint8)\ncpu.read_bytes(data, 3)\n"
        "child = os.fork()\ncpu.read_bytes(data, 3)\n"
        "if child: print('status', os.waitpid(child, 0)[1])\nelse: os._exit(0)"
    )
    assert "status 0" in run(code)


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints; it must succeed."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
