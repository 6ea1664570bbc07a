"""The real clients of both hubs against a server on this machine: whole, interrupted, killed, missing, wrong."""

import io
import json
import signal
import time
import zipfile
from argparse import Namespace

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from conftest import SHARED, TOKENIZER, free_port, needs_shared, picture, run_script, start_script
from hub_server import HubServer

from model.errors import MissingFileError, UserError
from model.LMConfig import VLMConfig
from model.model_vlm import MiniMindVLM
from model.processing import load_tokenizer
from scripts.download import make_folder, plan_fetches
from scripts.download_check import check_item
from scripts.download_hubs import RemoteFile
from scripts.download_items import GOALS, ITEMS, next_command

SOURCES = ("huggingface", "modelscope")
CLIP_FOLDER = "model/vision_model/clip-vit-base-patch16"
MB = 2**20


@pytest.fixture
def hub(tmp_path):
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def download(hub, tmp_path):
    """Runs the script against the hub, everything below tmp_path / "root"."""

    def run(*args, **env):
        env = hub.env(tmp_path / "home") | env
        return run_script("scripts/download.py", "--root", tmp_path / "root", *args, env=env)

    return run


def publish(hub: HubServer, name: str, files: dict[str, bytes]) -> None:
    """Put files into the repositories of that name, on both hubs."""
    item = ITEMS[name]
    for repo in item.repos.values():
        hub.repos.setdefault((item.kind, repo), {}).update(files)


def zeros(dim: int = 512, n_layers: int = 8, language_only: bool = False, **sizes) -> bytes:
    """A weights file of the published shapes, all of whose tensors share one zero."""
    with torch.device("meta"):
        names = MiniMindVLM(VLMConfig(dim=dim, n_layers=n_layers, **sizes)).state_dict().items()
    kept = {n: torch.zeros(1).expand(w.shape) for n, w in names if not (language_only and n.startswith("vision_proj"))}
    file = io.BytesIO()
    torch.save(kept, file)
    return file.getvalue()


def rows_and_images(n_rows: int = 30) -> tuple[bytes, bytes]:
    """A .jsonl and the .zip of its images."""
    file, packed = io.BytesIO(), io.BytesIO()
    picture().save(file, format="PNG")
    turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A thing."}]
    rows = [json.dumps({"image": f"{number}.png", "conversations": turns}) for number in range(n_rows)]
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(n_rows):
            archive.writestr(f"pretrain_images/{number}.png", file.getvalue())
    return "\n".join(rows).encode(), packed.getvalue()


def parquet_file(**columns) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def large_archive(n_bytes: int) -> bytes:
    """The .zip of `rows_and_images`, with an entry more that makes it large."""
    packed = io.BytesIO(rows_and_images()[1])
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("pretrain_images/large.bin", bytes(n_bytes))
    return packed.getvalue()


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory) -> dict[str, bytes]:
    """A tokenizer of 6,400 tokens with the ids the model counts on."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.add_tokens([f"word{number}" for number in range(VLMConfig().vocab_size - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def clip_files(tower_dir) -> dict[str, bytes]:
    """As openai/clip-vit-base-patch16 has it: the same weights four times."""
    files = {path.name: path.read_bytes() for path in tower_dir.iterdir()}
    return files | dict.fromkeys(("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "README.md"), b"no")


@pytest.mark.parametrize("source", SOURCES)
def test_each_thing_goes_to_its_place(source, hub, download, tmp_path, clip_files, tokenizer_files):
    """Only what is needed comes, is opened, and is not fetched again by the next call."""
    rows, archive = rows_and_images()
    publish(hub, "clip", clip_files | {"../evil.json": b"{}", "/tmp/evil.json": b"{}"})
    publish(hub, "tokenizer", tokenizer_files | {"pytorch_model.bin": b"no", "config.json": b"{}"})
    publish(hub, "lm-512", {"lm_512.pth": zeros(language_only=True), "sft_vlm_512.pth": b"no"})
    publish(hub, "pretrain-data", {"pretrain_vlm_data.jsonl": rows, "pretrain_images.zip": archive, "sft_images.zip": b""})
    names = ["clip", "tokenizer", "lm-512", "pretrain-data"]
    finished = download("--source", source, *names)
    printed, root = finished.stdout, tmp_path / "root"
    assert finished.returncode == 0, printed
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    expected = {f"{CLIP_FOLDER}/{n}" for n in ("config.json", "preprocessor_config.json", "model.safetensors")}
    expected |= {f"model/minimind_tokenizer/{n}" for n in tokenizer_files}
    expected |= {"out/lm_512.pth", "dataset/pretrain_vlm_data.jsonl", "dataset/pretrain_images.zip"}
    assert files == expected
    assert "to fetch: " in printed and "free disk: " in printed
    for line in (
        "ready: clip: 9 patches of 32 numbers for an image",
        "ready: tokenizer: 6400 tokens",
        "ready: lm-512: lm_512.pth fits dim 512 with 8 layers",
        "ready: pretrain-data: 30 rows, 30 images",
        "next: python train_pretrain_vlm.py --epochs 4",
    ):
        assert f"\n{line}\n" in printed, printed
    assert "warn" not in printed.lower()

    hub.requests.clear()
    again = download("--source", source, "pretrain-data")
    assert again.returncode == 0 and again.stdout.count("already there") == 2, again.stdout
    assert "to fetch" not in again.stdout and hub.requests == []


@pytest.mark.parametrize("source", SOURCES)
def test_a_lost_connection_and_a_killed_process_cost_little(source, hub, download, tmp_path):
    """The client goes on by itself; a new process goes on with what the killed one left."""
    archive = large_archive(32 * MB)
    publish(hub, "pretrain-data", {"pretrain_vlm_data.jsonl": rows_and_images()[0], "pretrain_images.zip": archive})
    hub.cut_after["pretrain_images.zip"] = 13 * MB
    hub.reset_after["pretrain_images.zip"] = 12 * MB
    finished = download("--source", source, "pretrain-data")
    assert finished.returncode == 0, finished.stdout
    starts = [request.start for request in hub.requests if request.file == "pretrain_images.zip"]
    assert starts[0] == 0 and 10 * MB <= starts[1] <= 13 * MB and starts[1] + 10 * MB <= starts[2] and len(starts) == 3
    assert (tmp_path / "root/dataset/pretrain_images.zip").read_bytes() == archive

    def partials() -> list:
        return [path for path in (tmp_path / "root/dataset").iterdir() if path.suffix in (".partial", ".incomplete")]

    (tmp_path / "root/dataset/pretrain_images.zip").unlink()
    hub.requests.clear(), hub.sent.clear()
    hub.stall_after["pretrain_images.zip"] = 22 * MB
    command = ["scripts/download.py", "--root", tmp_path / "root", "--source", source, "pretrain-data"]
    process = start_script(*command, env=hub.env(tmp_path / "home"))
    until = time.monotonic() + 30
    while not any(path.stat().st_size >= 20 * MB for path in partials()) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial,) = partials()
    kept = partial.stat().st_size
    finished = download("--source", source, "pretrain-data")
    assert finished.returncode == 0 and "goes on at 2" in finished.stdout, finished.stdout
    starts = [request.start for request in hub.requests if request.file == "pretrain_images.zip"]
    assert starts == [0, kept] and kept >= 20 * MB
    assert (tmp_path / "root/dataset/pretrain_images.zip").read_bytes() == archive and not partials()


@pytest.mark.parametrize("source", SOURCES)
def test_ctrl_c_stops_in_one_line(source, hub, tmp_path):
    publish(hub, "pretrain-data", {"pretrain_vlm_data.jsonl": b"{}", "pretrain_images.zip": bytes(2 * MB)})
    hub.stall_after["pretrain_images.zip"] = MB
    command = ["scripts/download.py", "--root", tmp_path / "root", "--source", source, "pretrain-data"]
    process = start_script(*command, env=hub.env(tmp_path / "home"))
    until = time.monotonic() + 30
    while "pretrain_images.zip" not in hub.sent and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and printed.endswith("stopped\n") and "Traceback" not in printed


def test_the_token_stays_on_the_hub(hub, download):
    """Large files are served by another host, which must not see who asks."""
    publish(hub, "pretrain-data", {"pretrain_vlm_data.jsonl": b"{}", "pretrain_images.zip": bytes(2 * MB)})
    download("pretrain-data")
    small, large = hub.requests
    assert small.host == "127.0.0.1" and small.authorization == "Bearer hf_secret"
    assert large.host == "localhost" and large.authorization is None


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_not_there_is_named_in_one_line(source, hub, download):
    def fails(*args, **env) -> str:
        finished = download("--source", source, *args, **env)
        assert finished.returncode == 2 and "Traceback" not in finished.stdout, finished.stdout
        return finished.stdout.splitlines()[-1]

    assert fails("lm-512").startswith(f"error: no model repository {ITEMS['lm-512'].repos[source]} on {source}: pass")
    publish(hub, "lm-512", {"lm_768.pth": b"other", "README.md": b""})
    assert f"{ITEMS['lm-512'].repos[source]} has no lm_512.pth (it has README.md, lm_768.pth)" in fails("lm-512")
    publish(hub, "lm-512", {"lm_512.pth": zeros()})
    hub.gone.add("lm_512.pth")
    assert "lists lm_512.pth but does not have it" in fails("lm-512")
    nowhere = f"http://127.0.0.1:{free_port()}"
    message = fails("lm-512", HF_ENDPOINT=nowhere, MODELSCOPE_DOMAIN=nowhere)
    assert message.startswith(f"error: cannot reach {source} (") and f"--source {SOURCES[source == SOURCES[0]]}" in message
    hub.portal = True
    assert f"what answers as {source} is no hub: check " in fails("lm-512")
    hub.portal = False
    hub.sizes["lm_512.pth"] = 10**18
    message = fails("lm-512")
    assert message.startswith("error: 1000000000.0 GB do not fit into the ") and "free some space" in message


@pytest.mark.parametrize("source", SOURCES)
def test_other_bytes_than_listed_are_thrown_away(source, hub, download, tmp_path):
    publish(hub, "lm-512", {"lm_512.pth": b"published"})
    for other in (b"otherwise", b"short"):
        hub.replaced["lm_512.pth"] = other
        finished = download("--source", source, "lm-512")
        message = "came with other bytes than the hub lists: fetch it again"
        assert finished.returncode == 2 and finished.stdout.endswith(f"{message}\n"), finished.stdout
        assert list((tmp_path / "root/out").iterdir()) == []


def test_a_file_of_ones_own_is_not_lost(hub, download, tmp_path):
    """sft_vlm_512.pth may be the result of two days of training."""
    publish(hub, "weights-512", {"pretrain_vlm_512.pth": b"published", "sft_vlm_512.pth": b"published"})
    rows, archive = rows_and_images()
    publish(hub, "pretrain-data", {"pretrain_vlm_data.jsonl": rows, "pretrain_images.zip": archive})
    put(tmp_path / "root", "weights-512", {"sft_vlm_512.pth": b"own"})
    put(tmp_path / "root", "pretrain-data", {"pretrain_vlm_data.jsonl": b"own"})
    for name in ("weights-512", "pretrain-data"):
        finished = download(name)
        assert finished.returncode == 2 and "move it away to keep it, or pass --overwrite" in finished.stdout
    assert (tmp_path / "root/out/sft_vlm_512.pth").read_bytes() == b"own" and hub.requests == []
    finished = download("pretrain-data", "--overwrite")
    assert finished.returncode == 0 and "ready: pretrain-data: 30 rows, 30 images\n" in finished.stdout, finished.stdout
    assert "next: python scripts/download.py clip tokenizer lm-512\n" in finished.stdout


def test_another_repository_and_names_that_do_not_exist(hub, download):
    hub.repos["dataset", "me/mine"] = {"sft_i2t.parquet": parquet_file(text=["a"])}
    finished = download("sft-data", "--repo", "me/mine")
    assert finished.returncode == 2 and "sft_i2t.parquet has columns text, not conversations" in finished.stdout
    assert "cannot hold all of clip, lm-512" in download("lm-512", "clip", "--repo", "me/mine").stdout
    assert "--repo a b c is no repository name" in download("lm-512", "--repo", "a b c").stdout
    assert "error: nothing is called lm_512: choose from clip," in download("lm_512").stdout
    assert "error: nothing to fetch: name one or more of clip," in download().stdout


def test_check_lists_what_is_missing(download, tmp_path):
    rows, archive = rows_and_images()
    put(tmp_path / "root", "pretrain-data", {"pretrain_vlm_data.jsonl": rows, "pretrain_images.zip": archive})
    nowhere = f"http://127.0.0.1:{free_port()}"
    finished = download("--check", HF_ENDPOINT=nowhere)
    assert finished.returncode == 0 and "ready: pretrain-data: 30 rows, 30 images\n" in finished.stdout
    assert finished.stdout.count("missing: ") == len(ITEMS) - 1
    assert "missing: sft-data: sft_vlm_data.jsonl + sft_images.zip or sft_i2t.parquet in dataset/\n" in finished.stdout
    assert finished.stdout.endswith("next: python scripts/download.py clip tokenizer lm-512\n")
    finished = download("--check", "lm-768")
    assert finished.returncode == 2 and finished.stdout.endswith("fetch with `python scripts/download.py lm-768`\n")


def test_all_goes_on_without_what_is_optional(tmp_path, capsys):
    """As where the data set is Parquet, and without rows of several images."""
    listing = [RemoteFile(name, 1, "") for name in ("pretrain_i2t.parquet", "sft_i2t.parquet", "README.md")]
    listing += [RemoteFile(name, 1, "") for item in ITEMS.values() if item.kind == "model" for name in item.choices[-1]]

    class Hub:
        def list_files(self, repo, kind):
            return listing

        def partial_path(self, folder, file):
            return folder / f"{file.name}.partial"

    args = Namespace(what=["all"], repo=None, source="huggingface", root=tmp_path, overwrite=False)
    plan = plan_fetches(list(ITEMS), Hub(), args)
    assert list(plan) == [name for name in ITEMS if name != "sft-multi-data"]
    assert [fetch.file.name for fetch in plan["sft-data"]] == ["sft_i2t.parquet"]
    assert [fetch.file.name for fetch in plan["clip"]][-1] == "pytorch_model.bin"
    assert capsys.readouterr().out == "sft-multi-data: jingyaogong/minimind-v_dataset does not have it; going on without\n"
    (tmp_path / "dataset").write_text("in the way")
    with pytest.raises(UserError, match="cannot make .*dataset"):
        make_folder(plan["sft-data"][0].folder)


def put(root, name, files) -> None:
    folder = root / ITEMS[name].folder
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)


def test_wrong_files_are_named(tmp_path, clip_files, tokenizer_files):
    def refuses(name: str, files: dict[str, bytes], match: str) -> None:
        put(tmp_path, name, files)
        with pytest.raises(UserError, match=match):
            check_item(name, tmp_path)

    with pytest.raises(MissingFileError, match=r"lm_512.pth in out/"):
        check_item("lm-512", tmp_path)
    whole = zeros()
    refuses("lm-512", {"lm_512.pth": whole[: len(whole) // 2]}, "lm_512.pth is damaged")
    refuses("lm-512", {"lm_512.pth": zeros(n_layers=7)}, "dim 512 with 7 layers, not of dim 512 with 8")
    refuses("lm-512", {"lm_512.pth": zeros(768, 16)}, "lm_512.pth is 768 wide, not 512: it is another model")
    weights = {"pretrain_vlm_512.pth": whole, "sft_vlm_512.pth": zeros(language_only=True)}
    refuses("weights-512", weights, "sft_vlm_512.pth does not fit the model, missing: vision_proj")
    refuses("clip", clip_files | {"model.safetensors": b"cut off"}, "cannot load the vision tower")
    refuses("tokenizer", tokenizer_files | {"tokenizer.json": b"{}"}, "is damaged")
    demo = {path.name: path.read_bytes() for path in TOKENIZER.iterdir()}
    refuses("tokenizer", demo, "knows 672 tokens, not 6400")
    rows, archive = rows_and_images()
    data = {"pretrain_vlm_data.jsonl": rows, "pretrain_images.zip": archive}
    refuses("pretrain-data", data | {"pretrain_images.zip": archive[:-30]}, "is no whole .zip")
    others = rows.replace(b".png", b".jpg")
    refuses("pretrain-data", data | {"pretrain_vlm_data.jsonl": others}, r"no usable row with .*\(30 image missing\)")
    refuses("pretrain-data", data | {"pretrain_vlm_data.jsonl": b"<html>"}, r"no usable row .*\(1 not a JSON object\)")
    refuses("sft-data", {"sft_i2t.parquet": b"PAR1"}, "sft_i2t.parquet is damaged")
    refuses("sft-data", {"sft_i2t.parquet": parquet_file(text=["a"])}, "has columns text, not conversations and image_bytes")


def test_either_kind_of_data_is_ready(tmp_path):
    """Parquet; .jsonl with its .zip; .jsonl with the folder that the .zip was unpacked to, with a few images missing."""
    turns = json.dumps([{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "A thing."}])
    put(tmp_path, "sft-data", {"sft_i2t.parquet": parquet_file(conversations=[turns] * 3, image_bytes=[b"a", b"b", None])})
    assert check_item("sft-data", tmp_path) == "3 rows, images in 2 of the first 3"
    rows, archive = rows_and_images(1200)
    put(tmp_path, "sft-data", {"sft_vlm_data.jsonl": rows})
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        opened.extractall(tmp_path / "dataset")
    (tmp_path / "dataset/pretrain_images").rename(tmp_path / "dataset/sft_images")
    (tmp_path / "dataset/sft_images/7.png").unlink()
    assert check_item("sft-data", tmp_path) == "1,200 rows, 1,199 images; of the first 1,000 rows 1 image missing"


@needs_shared
def test_published_data_and_tokenizer_pass(tmp_path):
    put(tmp_path, "tokenizer", {path.name: path.read_bytes() for path in (SHARED / "minimind_tokenizer").iterdir()})
    assert check_item("tokenizer", tmp_path) == "6400 tokens"
    (tmp_path / "dataset").symlink_to(SHARED / "flickr8k")
    assert "rows, " in check_item("pretrain-data", tmp_path)


def test_the_next_command_fits_what_is_there(tmp_path, tokenizer_files):
    """Each goal comes first once its own things are there and asked for; Parquet needs its flag."""
    for folder in ("clip", "tokenizer"):
        put(tmp_path, folder, dict.fromkeys(ITEMS[folder].choices[0], b""))
    put(tmp_path, "weights-512", {"pretrain_vlm_512.pth": b""})
    assert next_command(["sft-data"], tmp_path) == "python scripts/download.py sft-data"
    put(tmp_path, "sft-data", {"sft_i2t.parquet": b""})
    command = "python train_sft_vlm.py --epochs 4 --data dataset/sft_i2t.parquet"
    assert next_command(["sft-data"], tmp_path) == command
    put(tmp_path, "weights-512", {"sft_vlm_512.pth": b""})
    put(tmp_path, "sft-multi-data", dict.fromkeys(ITEMS["sft-multi-data"].choices[0], b""))
    multi = "python train_sft_vlm.py --save_name sft_vlm_multi --epochs 4 --data dataset/sft_vlm_data_multi.jsonl"
    assert next_command(["sft-multi-data"], tmp_path) == f"{multi} --images dataset/sft_multi_images"
    put(tmp_path, "weights-768", dict.fromkeys(ITEMS["weights-768"].choices[0], b""))
    assert next_command(["weights-768"], tmp_path).endswith("--dim 768 --n_layers 16 --data dataset/sft_i2t.parquet")
    assert {need for needs, _ in GOALS for need in needs} >= set(ITEMS)
