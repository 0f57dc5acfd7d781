"""Whole folders in every format: described, read back, run by both engines, and read or refused by transformers.

Bounds for logits are relative to their spread. What an engine holds exactly differs by the order of float32 sums alone:
1e-4. A weight that the C++ engine holds in bfloat16 is off by at most 2^-9 of itself, which in these models of random
weights moves some logits by up to a fifth; beside a decoder of weights rounded alike the bound is 1e-4 again.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

from engine_batches import check, random_steps
from format_codes import random_outliers
from gossamer.checkpoint import open_checkpoint
from gossamer.checkpoint.load import load_decoder, resident_bytes
from gossamer.checkpoint.save import save_folder
from gossamer.compress.method import QuantizeOptions
from gossamer.compress.quantize.rtn import RTN
from gossamer.engine.cpu import CpuBackend
from gossamer.errors import CorruptCheckpoint, UnsupportedModel
from gossamer.formats import Codebook, Codes, Dense, Format, Integer, KMeans, Sparse, only_ours, quantization_config
from gossamer.formats.layout import layout_from_quantization_config
from gossamer.model import OWN_PREFIX

FORMS: list[Format] = [
    Integer(5, 32),
    Integer(6, None, symmetric=False),
    Integer(8, None, outliers=True, outlier_share=0.03),
    Codebook("nf4", 32),
    Codebook("nf4", 32, double_quant=True),
    Codebook("fp4", 32),
    Codebook("mxfp4", 32),
    Codebook("nvfp4", 16),
    Codebook("fp8", None),
    KMeans(3),
    KMeans(4, 0.02),
    Sparse(Dense(torch.bfloat16), 0.4),
    Sparse(Integer(8, None), 0.5),
    Sparse(Integer(3, 32, symmetric=False), 0.25),
]
ids = [form.name for form in FORMS]
COMPRESSED_TENSORS = [Codebook("mxfp4", 32), Codebook("nvfp4", 16), Codebook("fp8", None), Integer(5, 32)]


def quantized(weight: torch.Tensor, form: Format, seed: int) -> Codes:
    """Rounded to nearest; levels of a row's own are evenly spaced here, and outliers anywhere."""
    g = torch.Generator().manual_seed(seed)
    out, columns = weight.shape
    if isinstance(form, KMeans):
        at = torch.linspace(0, 1, 2**form.bits)
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        levels = (low + (high - low) * at).half().float()
        codes = (weight.unsqueeze(-1) - levels.unsqueeze(1)).abs().argmin(-1).to(torch.int8)
        q = Codes(codes, torch.ones(out, 1), None, levels)
    else:
        q = RTN(QuantizeOptions()).quantize(weight, form, None)
    if isinstance(form, Codebook | Sparse) or not form.outliers:
        return q
    outliers = random_outliers(out, columns, out * round(form.outlier_share * columns), g)
    return Codes(q.codes, q.scale, q.zero, q.levels, outliers)


def pruned(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The same without its smallest numbers."""
    gone = weight.abs().flatten().argsort()[: round(sparsity * weight.numel())]
    return weight.flatten().index_fill(0, gone, 0.0).view(weight.shape)


def write(source: Path, folder: Path, forms: dict[str, Format]) -> dict[str, torch.Tensor]:
    """A copy of a dense folder whose modules are in these formats; its float weights."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    tensors, floats = {}, {}
    for i, (name, tensor) in enumerate(load_file(source / "model.safetensors").items()):
        form = forms.get(name.removesuffix(".weight"), Dense(torch.bfloat16))
        floats[name] = tensor.float()
        if isinstance(form, Dense):
            tensors[name] = tensor
            continue
        if isinstance(form, Sparse):
            tensor = pruned(tensor, form.sparsity)
        if form.grid == Dense(torch.bfloat16):
            floats[name], stored = tensor.float(), form.compress(tensor)
        else:
            codes = quantized(tensor.float(), form, i)
            floats[name], stored = codes.dequantize(), form.pack(codes)
        tensors |= {f"{name.removesuffix('.weight')}.{local}": t for local, t in stored.items()}
    config = json.loads((source / "config.json").read_text())
    kinds = {m: "embedding" if m.endswith("embed_tokens") else "linear" for m in forms}
    config["quantization_config"] = quantization_config(forms, kinds, "lm_head")
    if only_ours(forms, kinds):
        config["model_type"] = OWN_PREFIX + config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return floats


def modules(source: Path, embedding: bool) -> list[str]:
    names = [n.removesuffix(".weight") for n in load_file(source / "model.safetensors")]
    return [n for n in names if n.endswith("_proj") or (embedding and n.endswith("embed_tokens"))]


@pytest.fixture(params=FORMS, ids=ids)
def form(request) -> Format:
    return request.param


@pytest.mark.parametrize("embedding", [False, True], ids=["linear", "all"])
def test_a_folder_is_read_as_it_was_written(tiny_model, tmp_path, form, embedding) -> None:
    floats = write(tiny_model, tmp_path / "m", dict.fromkeys(modules(tiny_model, embedding), form))
    checkpoint = open_checkpoint(tmp_path / "m")
    assert set(checkpoint.names()) == set(floats)
    for name, expected in floats.items():
        assert torch.equal(checkpoint.tensor(name), expected)
        for rows in (slice(3, 40), slice(33, 34), slice(0, 0)):
            assert torch.equal(checkpoint.tensor(name, rows), expected[rows])
    linear = "model.layers.1.mlp.down_proj.weight"
    assert checkpoint.format(linear) == form
    assert checkpoint.nbytes(linear) == sum(t.nbytes for t in checkpoint.stored(linear).values())
    on_disk = load_file(tmp_path / "m" / "model.safetensors")
    assert checkpoint.weight_bytes() == sum(t.nbytes for t in on_disk.values())
    assert form.name in (checkpoint.source_note or "")
    copy = open_checkpoint(save_folder(checkpoint, tmp_path / "copy"))
    assert copy.fingerprint() == checkpoint.fingerprint()


@pytest.mark.parametrize("embedding", [False, True], ids=["linear", "all"])
def test_both_engines_run_it_as_its_dequantized_weights(tiny_model, tmp_path, form, embedding) -> None:
    write(tiny_model, tmp_path / "m", dict.fromkeys(modules(tiny_model, embedding), form))
    checkpoint = open_checkpoint(tmp_path / "m")
    oracle, packed = load_decoder(checkpoint), load_decoder(checkpoint, packed=True)
    tokens = torch.arange(2, 42).view(2, 20)
    expected, found = oracle(tokens), packed(tokens)
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    held = sum(t.nbytes for t in {t.data_ptr(): t for t in packed.state_dict().values()}.values())
    # Beside what is stored there are scales and levels in float32.
    assert held < 2 * resident_bytes(checkpoint, torch.float32, packed=True) + 4096
    backend = CpuBackend(checkpoint, activations="exact", kv_dtype="fp32", threads=2)
    exact = all(backend.expanded.values())
    if not exact:
        assert f"{form.name} weights held as bfloat16, rounded" in backend.describe()
        check(backend, oracle, random_steps(backend.config, 3), 0.25)
        for weight in oracle.parameters():
            if weight.ndim == 2:
                weight.copy_(weight.bfloat16().float())
    check(backend, oracle, random_steps(backend.config, 3), 1e-4)
    assert exact or isinstance(form, KMeans)


def test_a_model_may_mix_formats_and_each_keeps_its_own(tiny_model, tmp_path) -> None:
    forms = {m: FORMS[i % len(FORMS)] for i, m in enumerate(modules(tiny_model, True))}
    floats = write(tiny_model, tmp_path / "m", forms)
    checkpoint = open_checkpoint(tmp_path / "m")
    for module, form in forms.items():
        assert checkpoint.format(f"{module}.weight") == form
        assert torch.equal(checkpoint.tensor(f"{module}.weight"), floats[f"{module}.weight"])
    backend = CpuBackend(checkpoint, activations="exact", kv_dtype="fp32", threads=2)
    check(backend, load_decoder(checkpoint), random_steps(backend.config, 3), 0.25)


# Other tools.


@pytest.mark.parametrize("mixed", [False, True], ids=["one", "mixed"])
@pytest.mark.parametrize("form", COMPRESSED_TENSORS, ids=lambda f: f.name)
def test_transformers_reads_what_compressed_tensors_can_say(tiny_model, tmp_path, form, mixed) -> None:
    from transformers import AutoModelForCausalLM

    forms = dict.fromkeys(modules(tiny_model, False), form)
    if mixed:
        forms |= {m: f for f in COMPRESSED_TENSORS for m in forms if m.endswith(f"{_ROLES[f.name]}_proj")}
    write(tiny_model, tmp_path / "m", forms)
    said = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    QuantizationConfig.model_validate({k: v for k, v in said.items() if k != "version"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    tokens = torch.arange(2, 42).view(2, 20)
    with torch.inference_mode():
        found = theirs(tokens).logits.float()  # its first step makes its weights dense
    checkpoint = open_checkpoint(tmp_path / "m")
    for module in forms:
        weight = theirs.get_submodule(module).weight
        assert torch.equal(weight, checkpoint.tensor(f"{module}.weight").bfloat16())
    expected = load_decoder(checkpoint)(tokens)
    assert (found - expected).abs().max() < 0.3 * expected.std()  # it computes in bfloat16


_ROLES = {"mxfp4": "q", "nvfp4": "o", "fp8-channel": "down", "int5-g32": "up"}


@pytest.mark.parametrize(
    "form",
    [f for f in FORMS if f not in (*COMPRESSED_TENSORS, Integer(6, None, symmetric=False))],
    ids=lambda f: f.name,
)
def test_transformers_refuses_what_it_would_read_wrongly(tiny_model, tmp_path, form) -> None:
    from transformers import AutoModelForCausalLM

    write(tiny_model, tmp_path / "m", dict.fromkeys(modules(tiny_model, False), form))
    with pytest.raises(ValueError, match="gossamer"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_a_packed_embedding_is_for_no_other_tool() -> None:
    forms = {"model.embed_tokens": Codebook("mxfp4", 32), "model.layers.0.mlp.up_proj": Integer(4, 32)}
    assert only_ours(forms, {"model.embed_tokens": "embedding", "model.layers.0.mlp.up_proj": "linear"})
    assert not only_ours(forms, dict.fromkeys(forms, "linear"))
    assert not only_ours({"model.embed_tokens": Dense()}, {"model.embed_tokens": "embedding"})


# Descriptions.


def described(form: Format, **changes: object) -> dict[str, object]:
    config = quantization_config({"a": form}, {"a": "linear"}, "lm_head")
    assert config is not None
    config["config_groups"]["group_0"]["format"] |= changes
    return config


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"quant_method": "gossamer"}, UnsupportedModel, "version None"),
        ({"quant_method": "gossamer", "version": 2}, UnsupportedModel, "version 2"),
        ({"quant_method": "gossamer", "version": 1}, CorruptCheckpoint, "config_groups"),
        ({"quant_method": "gossamer", "version": 1, "config_groups": {"x": 3}}, CorruptCheckpoint, "config_groups.x"),
        (
            {"quant_method": "gossamer", "version": 1, "config_groups": {"x": {"targets": [1], "format": {}}}},
            CorruptCheckpoint,
            "config_groups.x",
        ),
        (described(KMeans(3), type="kmean"), UnsupportedModel, "kmean"),
        (described(KMeans(3), type=["kmeans"]), UnsupportedModel, "kmeans"),
        (described(KMeans(3), bits=3.0), CorruptCheckpoint, "bits is 3.0"),
        (described(KMeans(3), bits=True), CorruptCheckpoint, "bits is True"),
        (described(KMeans(3), bits=9), CorruptCheckpoint, "9"),
        (described(KMeans(3), bits=-1), CorruptCheckpoint, "-1"),
        (described(KMeans(3), outlier_share=float("nan")), CorruptCheckpoint, "nan"),
        (described(KMeans(3), more=1), CorruptCheckpoint, "more"),
        (described(Sparse(Dense(), 0.5), sparsity=1.5), CorruptCheckpoint, "1.5"),
        (described(Sparse(Dense(), 0.5), sparsity=float("nan")), CorruptCheckpoint, "nan"),
        (described(Sparse(Dense(), 0.5), sparsity="half"), CorruptCheckpoint, "half"),
        (described(Sparse(Dense(), 0.5), inner={"type": "float"}), CorruptCheckpoint, "dtype is 'missing'"),
        (described(Sparse(Dense(), 0.5), inner={"type": "float", "dtype": "fp8"}), CorruptCheckpoint, "fp8"),
        (described(Sparse(Dense(), 0.5), inner=[]), CorruptCheckpoint, "inner is []"),
        (described(Sparse(Dense(), 0.5), inner={"type": "sparse"}), UnsupportedModel, "sparse"),
        (described(Sparse(Dense(), 0.5), inner={"type": "nf4"}), UnsupportedModel, "nf4"),
        (described(Codebook("nf4", 64), group_size=0), CorruptCheckpoint, "group_size is 0"),
        (described(Codebook("nf4", 64), group_size="64"), CorruptCheckpoint, "group_size"),
        (described(Codebook("nf4", 64), type="mxfp4"), CorruptCheckpoint, "mxfp4"),
    ],
)
def test_descriptions_that_make_no_sense_are_typed_errors(config, error, words) -> None:
    with pytest.raises(error) as caught:
        layout_from_quantization_config(config, torch.bfloat16)
    assert words in caught.value.message


@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_a_description_says_the_format_again(form) -> None:
    config = json.loads(json.dumps(quantization_config({"a": form}, {"a": "linear"}, "lm_head")))
    layout = layout_from_quantization_config(config, torch.float16)
    assert layout("a", "linear") == form
    if config["quant_method"] == "gossamer":
        assert layout("b", "linear") == Dense(torch.float16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_bits": 8}, "num_bits 8"),
        ({"type": "int"}, "type 'int'"),
        ({"symmetric": False}, "symmetric False"),
        ({"group_size": 64}, "group_size 64"),
        ({"strategy": "block"}, "strategy 'block'"),
    ],
)
def test_floats_with_unusual_scales_are_refused_by_name(change, words) -> None:
    config = quantization_config({"a": Codebook("mxfp4", 32)}, {"a": "linear"}, "lm_head")
    assert config is not None
    config["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(UnsupportedModel) as caught:
        layout_from_quantization_config(config, torch.bfloat16)
    assert words in caught.value.message


def test_scales_of_a_dtype_that_is_no_float_are_refused(tiny_model, tmp_path) -> None:
    write(tiny_model, tmp_path / "m", dict.fromkeys(modules(tiny_model, False), Codebook("fp8", None)))
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name] = torch.ones_like(tensors[name], dtype=torch.int16)
    save_file(tensors, path)
    with pytest.raises(CorruptCheckpoint, match="scales"):
        open_checkpoint(tmp_path / "m")
