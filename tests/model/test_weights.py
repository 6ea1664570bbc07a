"""Published weight files load; whatever does not fit is refused by name, never half-loaded."""

import os
import pickle
import re
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.serialization import set_crc32_options

from common.digest import write_digest
from common.errors import MissingFileError, UserError
from model.files import info_path, read_info
from model.LMConfig import LMConfig, VLMConfig
from model.model_lm import MiniMindLM
from model.model_vlm import MiniMindVLM
from model.weights import load_weights, read_weights, save_atomically, save_weights, select_weights
from tests.helpers import small_model


def published_keys(n_layers: int) -> set[str]:
    """The key names of the early-2025 files, written out independently of the model."""
    parts = (
        [f"attention.w{x}" for x in "qkvo"]
        + [f"feed_forward.w{x}" for x in "123"]
        + ["attention_norm", "ffn_norm"]
    )
    keys = {f"layers.{layer}.{part}.weight" for layer in range(n_layers) for part in parts}
    return keys | {
        "tok_embeddings.weight",
        "norm.weight",
        "output.weight",
        "vision_proj.vision_proj.0.weight",
        "vision_proj.vision_proj.0.bias",
    }


def test_keys_are_the_published_ones():
    assert set(select_weights(small_model())) == published_keys(2)
    with torch.device("meta"):
        assert set(select_weights(MiniMindVLM(VLMConfig()))) == published_keys(8)


def test_a_published_file_loads_with_its_buffers(tmp_path):
    """Half precision, masks, RoPE tables and CLIP weights, as published files carry them."""
    source = small_model(seed=1)
    weights = {name: weight.half() for name, weight in select_weights(source).items()}
    weights |= {f"layers.{i}.attention.mask": torch.ones(1, 1, 8, 8) for i in range(2)}
    weights |= {
        "mask": torch.ones(8, 8),
        "pos_cis": torch.ones(8, 4, dtype=torch.complex64),
        "vision_encoder.x": torch.ones(2),
    }
    torch.save(weights, tmp_path / "sft_vlm_64.pth")
    model = small_model(seed=2)
    load_weights(model, read_weights(tmp_path / "sft_vlm_64.pth"), "file")
    for name, weight in select_weights(model).items():
        assert torch.equal(weight, select_weights(source)[name].half().float()), name
    assert model.output.weight is model.tok_embeddings.weight


def test_a_base_language_model_has_no_projector(tmp_path):
    weights = MiniMindLM(LMConfig(dim=64, n_layers=2, n_heads=4, vocab_size=672)).state_dict()
    model = small_model()
    projector = model.vision_proj.vision_proj[0].weight.clone()
    load_weights(model, weights, "lm_64.pth", language_only=True)
    assert torch.equal(model.vision_proj.vision_proj[0].weight, projector)
    with pytest.raises(
        UserError,
        match=r"missing: vision_proj.vision_proj.0.bias, vision_proj.vision_proj.0.weight",
    ):
        load_weights(model, weights, "lm_64.pth")


def test_what_does_not_fit_is_named(tmp_path):
    model = small_model()
    weights = select_weights(model)
    without = {
        name: weight for name, weight in weights.items() if name != "layers.1.attention.wq.weight"
    }
    with pytest.raises(
        UserError, match=r"missing: layers.1.attention.wq.weight; unexpected: extra.weight"
    ):
        load_weights(model, without | {"extra.weight": torch.ones(1)}, "x.pth")
    with pytest.raises(UserError, match=r"layers.0.ffn_norm.weight \(65,\) instead of \(64,\)"):
        load_weights(model, weights | {"layers.0.ffn_norm.weight": torch.ones(65)}, "x.pth")
    with pytest.raises(UserError, match=r"dim 128 with 3 layers.*--dim 128 --n_layers 3"):
        load_weights(model, select_weights(small_model(dim=128, n_layers=3)), "x.pth")
    with pytest.raises(UserError, match="knows 700 tokens but the tokenizer has 672"):
        load_weights(model, select_weights(small_model(vocab_size=700)), "x.pth")
    with pytest.raises(UserError, match="no MiniMind language model"):
        load_weights(model, {"lm_head.weight": torch.ones(3)}, "x.pth")


def test_missing_truncated_and_foreign_files(tmp_path):
    with pytest.raises(MissingFileError, match="python -m scripts.download lm-512"):
        read_weights(tmp_path / "lm_512.pth")
    save_atomically(select_weights(small_model()), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 10):
        (tmp_path / "cut.pth").write_bytes(content[:size])
        with pytest.raises(UserError, match="damaged"):
            read_weights(tmp_path / "cut.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no state dict"):
        read_weights(tmp_path / "list.pth")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_weights_file_cannot_run_code(tmp_path):
    torch.save({"tok_embeddings.weight": Malicious(str(tmp_path / "pwned"))}, tmp_path / "bad.pth")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(Malicious(str(tmp_path / "pwned")), protocol=2))
    for name in ("bad.pth", "bad.pkl"):
        with pytest.raises(UserError, match="damaged or not a weights file"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "pwned").exists()


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.pth"
    save_atomically({"a": torch.ones(2)}, path)
    with pytest.raises(Exception, match="pickle"):
        save_atomically({"a": lambda: 0}, path)
    assert (
        torch.equal(read_weights(path)["a"], torch.ones(2)) and len(list(tmp_path.iterdir())) == 1
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*an older file is intact"):
        save_atomically({"a": torch.ones(2)}, tmp_path / "file" / "model.pth")


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02"]),
    st.sampled_from(["pth", "safetensors"]),
)
def test_any_bytes_are_refused_in_one_line(tmp_path_factory, content, start, ending):
    path = tmp_path_factory.mktemp("bytes") / f"lm_512.{ending}"
    path.write_bytes(start + content)
    with pytest.raises(
        UserError, match="holds no state dict|pth is [a-zA-Z]|tensors is [a-zA-Z]"
    ) as refused:
        read_weights(path)
    assert "\n" not in str(refused.value)


def test_what_training_writes_beside_the_weights(tmp_path):
    """All sizes, those that no shape shows too; a wrong one is named, with both values."""
    model = small_model()
    path = tmp_path / "sft_vlm_64.pth"
    facts = {"tokenizer": "t", "vision_model": "v", "stage": "sft_vlm", "data": ["a.jsonl"]}
    save_weights(model, path, **facts, step=3, val_loss=None)
    info = read_info(path)
    assert info.items() >= (facts | {"step": 3, "val_loss": None}).items()
    assert info["config"].items() >= {"dim": 64, "n_layers": 2, "n_heads": 4}.items()
    assert info["config"]["rope_theta"] == 1e6 and info["config"]["n_image_tokens"] == 9
    again = LMConfig(**{name: info["config"][name] for name in model.config.language_sizes()})
    assert again.language_sizes() == model.config.language_sizes()
    load_weights(small_model(seed=1), read_weights(path), path)
    # No weight depends on how long a sequence may be.
    load_weights(small_model(seed=1, max_seq_len=64), read_weights(path), path)
    for change, message in (
        ({"rope_theta": 1e4}, "trained with rope_theta 1000000.0, but .* has rope_theta 10000.0"),
        ({"n_kv_heads": 4}, "trained with n_kv_heads 2, but the model here has n_kv_heads 4"),
        ({"n_heads": 2}, "trained with n_heads 4, but the model here has n_heads 2"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-05, but the model here has norm_eps 1e-06"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            load_weights(small_model(seed=1, **change), read_weights(path), path)
        assert len(str(raised.value)) < 250

    info_path(path).write_text("{")
    with pytest.raises(UserError, match="sft_vlm_64.json is damaged"):
        load_weights(small_model(), read_weights(path), path)
    info_path(path).unlink()
    with pytest.raises(UserError, match="has n_kv_heads 2, but the model here has n_kv_heads 4"):
        load_weights(small_model(n_kv_heads=4), read_weights(path), path)
    with pytest.raises(
        UserError, match="has hidden_dim 192, but the model here has hidden_dim 128"
    ):
        load_weights(small_model(hidden_dim=128), read_weights(path), path)


@pytest.mark.parametrize("config_class", [LMConfig, VLMConfig])
def test_a_misspelt_size_is_an_error(config_class):
    with pytest.raises(
        UserError, match=f"{config_class.__name__} has no rope_thetta: it has .*dim"
    ):
        config_class(rope_thetta=1e4)
    # What transformers writes into every config.json comes back without a complaint.
    config = config_class(dim=64, n_layers=3)
    assert config_class.from_dict(config.to_dict()).n_layers == 3


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {f"module.{name}": weight for name, weight in weights.items()},
        lambda weights: {f"_orig_mod.{name}": weight for name, weight in weights.items()},
        lambda weights: {f"module._orig_mod.{name}": weight for name, weight in weights.items()},
        # torch.compile of each block
        lambda weights: {
            re.sub(r"^(layers\.\d+)\.", r"\1._orig_mod.", name): weight
            for name, weight in weights.items()
        },
        lambda weights: {"model": weights, "epoch": 3},
        lambda weights: {"state_dict": {f"module.{name}": w for name, w in weights.items()}},
        lambda weights: {"optimizer": {"state": {}}, "weights": weights, "run": {"seed": 1}},
    ],
)
def test_what_a_network_was_wrapped_in_is_taken_off(tmp_path, wrap):
    weights = select_weights(small_model(seed=1))
    torch.save(wrap(weights), tmp_path / "wrapped.pth")
    read = read_weights(tmp_path / "wrapped.pth")
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_the_newer_minimind_is_named(tmp_path):
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
    torch.save(dict.fromkeys(names, torch.ones(8, 8)), tmp_path / "llm_512.pth")
    with pytest.raises(UserError, match="is of the newer MiniMind .* fetches them"):
        load_weights(small_model(), read_weights(tmp_path / "llm_512.pth"), "llm_512.pth")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_no_numbers_are_refused(tmp_path, number, dtype):
    weights = select_weights(small_model())
    weights["layers.1.attention.wq.weight"] = torch.full((64, 64), number, dtype=dtype)
    # Masks that some published files carry are full of it.
    weights["layers.0.attention.mask"] = torch.full((8, 8), -float("inf"))
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"layers.1.attention.wq.weight in .*/x.pth holds nan or"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**12), torch.eye(3).to_sparse(), torch.empty(10**12, device="meta")],
    ids=["endless", "sparse", "empty"],
)
def test_a_tensor_that_is_no_plain_one_is_refused_before_it_takes_memory(tmp_path, tensor):
    torch.save({"tok_embeddings.weight": tensor}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="is no plain tensor|is damaged or not a weights file"):
        read_weights(tmp_path / "x.pth")


@settings(max_examples=60)
@given(st.data())
def test_one_bit_that_is_not_as_written_changes_nothing_or_is_found(tmp_path_factory, data):
    """Where it stands in padding or in a date of the archive it harms nothing."""
    folder = tmp_path_factory.mktemp("bits")
    weights = {"a": torch.arange(300.0), "b": torch.ones(3, 4, dtype=torch.bfloat16)}
    save_atomically(weights, folder / "x.pth")
    content = bytearray((folder / "x.pth").read_bytes())
    position = data.draw(st.integers(0, 8 * len(content) - 1))
    content[position // 8] ^= 1 << position % 8
    (folder / "x.pth").write_bytes(content)
    try:
        read = read_weights(folder / "x.pth")
    except UserError as error:
        assert "is damaged or not a weights file" in str(error) and "\n" not in str(error)
    else:
        assert all(torch.equal(read[name], weights[name]) for name in weights)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_pointer_in_place_of_weights_is_called_so(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n")
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer: fetch the file with"):
        read_weights(tmp_path / name)


def test_a_bit_of_a_number_is_found_in_each_kind_of_file(tmp_path):
    number = torch.full((1000,), 7.0)
    torch.save({"a": number}, tmp_path / "x.pth")
    save_file({"a": number}, tmp_path / "x.safetensors")
    write_digest(tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        path = tmp_path / name
        assert torch.equal(read_weights(path)["a"], number)
        content = bytearray(path.read_bytes())
        content[content.index(number.numpy().tobytes()) + 400] ^= 1
        path.write_bytes(content)
        with pytest.raises(
            UserError, match="is damaged|differs from its checksum in x.safetensors.sha256"
        ):
            read_weights(path)


def test_files_without_checksums_load_as_ever(tmp_path):
    """Of old PyTorch, of one that was told to write none, and .safetensors of a hub."""
    number = torch.full((1000,), 7.0)
    torch.save({"a": number}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    set_crc32_options(False)
    torch.save({"a": number}, tmp_path / "none.pth")
    set_crc32_options(True)
    save_file({"a": number}, tmp_path / "hub.safetensors")
    for name in ("old.pth", "none.pth", "hub.safetensors"):
        assert torch.equal(read_weights(tmp_path / name)["a"], number)


def test_an_archive_that_is_packed_is_not_unpacked(tmp_path):
    """1 MB of zeros may be a thousand times as much."""
    torch.save({"a": torch.zeros(2**18)}, tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as source,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in source.infolist():
            packed.writestr(entry.filename, source.read(entry))
    with pytest.raises(UserError, match="is damaged or not a weights file"):
        read_weights(tmp_path / "packed.pth")
