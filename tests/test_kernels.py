"""Matrices in blocks of 8 and 4 bits: what the kernels compute, with and without the compiler."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from emu3 import kernels, matrices, quantization
from emu3.matrices import Scheme
from emu3.quantization import Int8Linear, QuantizedHead, QuantizedLinear, multiply_head

SCHEMES = [Scheme(8), Scheme(4, 32), Scheme(4, 128)]
needs_kernels = pytest.mark.skipif(kernels.library() is None, reason="no kernels for this machine")


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 9, 21])
@torch.no_grad()
def test_eight_bits_are_those_of_int8_bit_for_bit(monkeypatch, rows):
    monkeypatch.setattr(quantization, "_LARGEST_UNPACKED", 0)
    torch.manual_seed(rows)
    linear, x = nn.Linear(224, 80, bias=rows % 2 == 0), torch.randn(rows, 224) * torch.logspace(-3, 3, rows)[:, None]
    x[0, :32] = 0
    theirs = Int8Linear(linear)
    assert theirs.packed == quantization._VNNI
    assert torch.equal(QuantizedLinear.quantize(linear, Scheme(8))(x), theirs(x))


@needs_kernels
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 13])
@torch.no_grad()
def test_four_bits_are_exact_where_activations_are_whole(group, rows):
    """Whole activations of at most 127, of which each 32 hold one of 127: nothing is rounded."""
    torch.manual_seed(rows)
    layer = QuantizedLinear.quantize(nn.Linear(256, 48, bias=False), Scheme(4, group))
    x = torch.randint(-127, 128, (rows, 8, 32)).float()
    x[..., 5] = 127.0
    x = (x * torch.logspace(-2, 2, 8)[:, None]).view(rows, 256)
    expected = x.double() @ layer.dequantized().double().T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@torch.no_grad()
def test_no_weight_is_further_from_its_value_than_half_a_step(scheme):
    torch.manual_seed(0)
    linear = nn.Linear(256, 32, bias=False)
    linear.weight[3] = 0
    linear.weight[4, :128] = 0
    layer = QuantizedLinear.quantize(linear, scheme)
    found, weight = layer.dequantized(), linear.weight
    error = float((found - weight).norm() / weight.norm())
    assert error < {8: 0.006, 4: 0.09}[scheme.bits]
    assert (found[3] == 0).all() and (found[4, :128] == 0).all()
    size = scheme.group or 256
    step = weight.view(32, -1, size).abs().amax(2, keepdim=True) / {8: 127, 4: 6.8}[scheme.bits]
    largest = (found - weight).view(32, -1, size).abs()
    # In 4 bits the largest weight itself may be cut off, by a sixth.
    bound = step * {8: 0.5001, 4: 1.3}[scheme.bits]
    assert bool((largest <= bound + 1e-9).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@torch.no_grad()
def test_the_machine_without_kernels_gives_nearly_the_same(monkeypatch, scheme):
    torch.manual_seed(0)
    layer, x = QuantizedLinear.quantize(nn.Linear(256, 64), scheme), torch.randn(3, 5, 256).bfloat16()
    with_kernels = layer(x)
    monkeypatch.setattr(kernels, "library", lambda: None)
    without = layer(x)
    assert with_kernels.dtype == without.dtype == torch.bfloat16 and without.shape == (3, 5, 64)
    assert float((with_kernels - without).norm() / without.norm()) < 0.02


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_is_saved_moved_and_copied_like_any_module(tmp_path, scheme):
    torch.manual_seed(0)
    layer, x = QuantizedLinear.quantize(nn.Linear(128, 32), scheme), torch.randn(4, 128)
    expected = layer(x)
    state = layer.to("cpu", torch.bfloat16).state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "weight": torch.uint8,
        "scales": torch.float32 if scheme.bits == 8 else torch.float16,
        "bias": torch.float32,
    }
    with torch.device("meta"):
        empty = QuantizedLinear(128, 32, scheme, bias=True)
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), expected)


HEADS = [torch.int8, torch.bfloat16, torch.float16]


def head_of(dtype, outputs, inputs):
    """Weights of a head, and its scales or None."""
    weight = torch.randn(outputs, inputs)
    if dtype == torch.int8:
        return matrices.quantize_rows(weight)
    return weight.to(dtype), None


def logits_of(rows, weight, scales):
    """In float64."""
    logits = rows.double() @ weight.double().T
    return logits if scales is None else logits * scales.double()


@needs_kernels
@pytest.mark.parametrize("dtype", HEADS, ids=str)
@pytest.mark.parametrize("inputs", [16, 48, 256])
def test_heads_are_exact_to_float32(dtype, inputs):
    """Of any ids; and a row depends on nothing but itself."""
    torch.manual_seed(inputs)
    (weight, scales), x = head_of(dtype, 37, inputs), torch.randn(17, inputs)
    for start, stop in ((0, 37), (3, 36), (5, 6)):
        part = weight[start:stop], None if scales is None else scales[start:stop]
        together = kernels.head(x, *part)
        expected = logits_of(x, *part)
        assert float((together - expected).abs().max()) < 1e-6 * float(expected.abs().max()) * inputs**0.5
        for count in (1, 2, 3, 4, 5, 16):
            assert torch.equal(kernels.head(x[:count], *part), together[:count])


@needs_kernels
def test_heads_take_the_largest_and_the_smallest_numbers():
    weight = torch.tensor([[127, -127] * 8, [-128, 0] * 8, [0, 1] * 8], dtype=torch.int8)
    x = torch.tensor([[1.0, 2.0] * 8, [1e25, 0.0] * 8])
    found = kernels.head(x, weight, torch.tensor([1.0, 0.5, 1e-6]))
    expected = torch.tensor([[-127.0 * 8, -64.0 * 8, 16e-6], [127e25 * 8, -64e25 * 8, 0.0]])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for dtype in (torch.bfloat16, torch.float16):
        numbers = torch.finfo(dtype)
        weight = torch.tensor([[numbers.max, 0.0] * 8, [numbers.tiny, -1.0] * 8, [torch.inf, 0.0] * 8]).to(dtype)
        expected = logits_of(x[:1], weight, None).float()
        torch.testing.assert_close(kernels.head(x[:1], weight), expected, rtol=1e-6, atol=0)


def test_without_kernels_a_head_says_nearly_the_same(monkeypatch):
    torch.manual_seed(0)
    weight, scales = matrices.quantize_rows(torch.randn(37, 48))
    x = torch.randn(5, 48)
    with_kernels = multiply_head(x, weight, scales)
    monkeypatch.setattr(kernels, "library", lambda: None)
    monkeypatch.setattr(quantization, "_HEAD_CHUNK", 10 * 48)  # in pieces, of which the last is smaller
    torch.testing.assert_close(multiply_head(x, weight, scales), with_kernels, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_head_is_saved_and_moved_like_any_module():
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 37, bias=False), torch.randn(2, 3, 48)
    head = QuantizedHead.quantize(linear)
    expected = head(x)
    assert float((expected - linear(x)).norm() / linear(x).norm()) < 0.006
    state = head.to("cpu", torch.bfloat16).state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {"weight": torch.int8, "scales": torch.float32}
    with torch.device("meta"):
        empty = QuantizedHead(48, 37)
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), expected) and empty(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("arguments", [(3,), (8, 32), (4,), (4, 64), ("8",), (8, None, 4)])
def test_schemes_that_are_none(arguments):
    with pytest.raises(ValueError, match="is no scheme"):
        Scheme(*arguments)


@needs_kernels
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@torch.no_grad()
def test_a_row_depends_on_nothing_but_itself(scheme):
    """Not on its neighbours, nor on how many there are, nor on the threads."""
    torch.manual_seed(0)
    layer, x = QuantizedLinear.quantize(nn.Linear(256, 160), scheme), torch.randn(19, 256)
    together, threads = layer(x), torch.get_num_threads()
    for count in (1, 2, 5):
        assert torch.equal(torch.cat([layer(part) for part in x.split(count)]), together)
    try:
        torch.set_num_threads(1)
        assert torch.equal(layer(x), together)
    finally:
        torch.set_num_threads(threads)


@needs_kernels
def test_without_avx512_the_same_numbers(tmp_path):
    """The other half of the source, which older processors compile."""
    program = """
import sys, torch
from emu3 import kernels
from emu3.matrices import Scheme
from emu3.quantization import QuantizedHead, QuantizedLinear
if sys.argv[2] == "avx2":
    kernels._FLAGS = tuple("-mavx2 -mfma -mf16c".split()) + tuple(f for f in kernels._FLAGS if f != "-march=native")
torch.manual_seed(0)
linear, x = torch.nn.Linear(256, 64), torch.randn(11, 256)
schemes = Scheme(8), Scheme(4, 32), Scheme(4, 128)
found = [QuantizedLinear.quantize(linear, scheme)(x).detach() for scheme in schemes]
weight = linear.weight.detach()
found += [kernels.head(x, weight.bfloat16()), kernels.head(x, weight.half()), QuantizedHead.quantize(linear)(x)]
torch.save(found, sys.argv[1])
"""
    found = []
    for name in ("native", "avx2"):
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
        subprocess.run([sys.executable, "-c", program, tmp_path / name, name], env=environment, check=True)
        found.append(torch.load(tmp_path / name))
    assert len(list((tmp_path / "emu3").glob("*.so"))) == 2
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert torch.equal(found[0][0], found[1][0])


@needs_kernels
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@torch.no_grad()
def test_what_is_not_finite_shows(scheme, value):
    torch.manual_seed(0)
    layer, x = QuantizedLinear.quantize(nn.Linear(256, 48), scheme), torch.randn(6, 256)
    expected = layer(x)
    x[3, 77] = value
    found = layer(x)
    assert found[3].isnan().all()
    assert torch.equal(found[[0, 1, 2, 4, 5]], expected[[0, 1, 2, 4, 5]])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@torch.no_grad()
def test_numbers_too_small_for_a_scale_are_zero(scheme):
    layer = QuantizedLinear.quantize(nn.Linear(256, 48, bias=False), scheme)
    x = torch.full((2, 256), 1e-44)
    x[1, :32] = 1.0
    found, expected = layer(x), x @ layer.dequantized().T
    assert float(found[0].abs().max()) < 1e-30
    assert float((found[1] - expected[1]).norm() / expected[1].norm()) < 0.01


@needs_kernels
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("inputs", [32, 96, 127, 129, 4096])
def test_rows_of_another_width_are_refused(scheme, inputs):
    layer = QuantizedLinear(128, 32, scheme)
    with torch.no_grad(), pytest.raises(ValueError, match=f"rows of {inputs} numbers, but the matrix has 128 inputs"):
        layer(torch.zeros(2, inputs))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_pass_through(scheme):
    torch.manual_seed(0)
    layer, x = QuantizedLinear.quantize(nn.Linear(128, 32), scheme), torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantized().sum(0).expand(3, 128))


@needs_kernels
def test_a_head_refuses_what_does_not_fit():
    weight, scales = torch.zeros(6, 32, dtype=torch.int8), torch.ones(6)
    for x, given in ((torch.zeros(1, 48), scales), (torch.zeros(1, 32), None), (torch.zeros(1, 32), scales[:5])):
        with pytest.raises(ValueError, match=r"no head of \(6, 32\) in torch.int8 for rows of"):
            kernels.head(x, weight, given)


def test_sums_that_32_bits_do_not_hold_are_not_tried():
    assert Scheme(8).fits(2**17, 16) and not Scheme(8).fits(2**18, 16)


def test_huge_weights_are_cut_off():
    layer = QuantizedLinear.quantize(nn.Linear(32, 16), Scheme(4, 32))
    weight = torch.zeros(16, 32)
    weight[0, 0], weight[1, 1] = 1e6, -3e5
    layer.weight, layer.scales = matrices.quantize_matrix(weight, Scheme(4, 32))
    found = layer.dequantized()
    assert 4e5 < found[0, 0] <= 65504 * 8 and abs(found[1, 1] / -3e5 - 1) < 0.01
    assert float(found.abs().sum()) == float(found[0, 0] - found[1, 1])


@needs_kernels
def test_memory_that_runs_out_is_an_error_like_any_other():
    program = """
import resource, torch
from emu3 import kernels
from emu3.matrices import Scheme
from emu3.quantization import QuantizedLinear
layer, x = QuantizedLinear(2**16, 16, Scheme(8)), torch.zeros(2**13, 2**16)
kernels.library()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, -1))
try:
    kernels.linear(x, layer.weight, layer.scales, 8)
except MemoryError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("no memory is left to compute layers"), done


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A cache of its own, and a compiler that copies what was compiled already and counts its calls."""
    compiled = kernels.library()
    if compiled is None:
        pytest.skip("no kernels for this machine")
    program = tmp_path / "my compiler"
    program.write_text(f'#!/bin/sh\necho x >> "{tmp_path}/calls"\nfor last; do :; done\ncp {compiled._name} "$last"\n')
    program.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{program}' -m64")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def load():
        return kernels.library.__wrapped__()

    load.calls = lambda: len((tmp_path / "calls").read_text().split())
    load.folder = tmp_path / "cache/emu3"
    return load


def test_what_was_compiled_is_kept_and_made_anew_where_it_is_damaged(compiler, tmp_path, monkeypatch):
    assert compiler() is not None and compiler() is not None and compiler.calls() == 1
    (file,) = compiler.folder.iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "emu3").mkdir(mode=0o700)
    (tmp_path / "emu3" / file.name).write_bytes(b"not a library")
    assert compiler() is not None and compiler.calls() == 2
    assert (tmp_path / "emu3" / file.name).read_bytes() == file.read_bytes()


def test_nothing_is_loaded_that_others_could_write(compiler):
    compiler()
    (file,) = compiler.folder.iterdir()
    file.chmod(0o666)
    assert compiler() is not None and compiler.calls() == 2
    assert file.stat().st_mode & 0o022 == 0
    compiler.folder.chmod(0o777)
    assert compiler() is not None and compiler.calls() == 3
    assert [each.name for each in compiler.folder.iterdir()] == [file.name]


def test_without_a_home_it_is_compiled_each_time(compiler, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kernels.Path, "home", no_home)
    assert compiler() is not None and compiler() is not None and compiler.calls() == 2


def test_a_compiler_that_fails_is_told(compiler, tmp_path, monkeypatch, caplog):
    program = tmp_path / "broken"
    program.write_text("#!/bin/sh\necho 'no such target' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    assert compiler() is None and "no such target" in caplog.text
    monkeypatch.setenv("CXX", "'unclosed")
    assert compiler() is None and "No closing quotation" in caplog.text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
@pytest.mark.parametrize(
    "make", [Int8Linear, QuantizedHead.quantize, lambda linear: QuantizedLinear.quantize(linear, Scheme(4, 32))]
)
@torch.no_grad()
def test_the_compiler_takes_any_number_of_rows_at_once(monkeypatch, make):
    """Guessing decoders feed another number at each step, and each compilation takes half a minute."""
    monkeypatch.setattr(quantization, "_LARGEST_UNPACKED", 0)
    torch.manual_seed(0)
    layer, compilations = make(nn.Linear(64, 32)), []

    def backend(graph, example):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, dynamic=True)
    for rows in (5, 7, 3):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x), layer(x))
    assert len(compilations) == 1
