"""Both hubs' real clients against a server here: whole, interrupted, killed, missing, wrong."""

import signal
import time

import pytest

from common.errors import UserError
from scripts.download.__main__ import choose_names, make_folder, parse_args, plan_fetches
from scripts.download.hubs import RemoteFile, read_digest
from scripts.download.items import ITEMS
from scripts.processes import free_port
from tests.helpers import run_script, start_script
from tests.scripts.download_files import (
    clip_files,
    large_archive,
    parquet_file,
    put,
    rows_and_images,
    tokenizer_files,
    zeros,
)
from tests.scripts.hub_server import HubServer

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
        flags = ["--root", tmp_path / "root", *args]
        return run_script("-m", "tests.scripts.fresh_hub", "scripts.download", *flags, env=env)

    return run


def publish(hub: HubServer, name: str, files: dict[str, bytes]) -> None:
    """Put files into the repositories of that name, on both hubs."""
    item = ITEMS[name]
    for repo in item.repos.values():
        hub.repos.setdefault((item.kind, repo), {}).update(files)


def start(source: str, hub: HubServer, tmp_path):
    """The script, left running, to be stopped."""
    flags = ["--root", tmp_path / "root", "--source", source, "pretrain-data"]
    return start_script("-m", "scripts.download", *flags, env=hub.env(tmp_path / "home"))


@pytest.mark.parametrize("source", SOURCES)
def test_each_thing_goes_to_its_place(source, hub, download, tmp_path):
    """Only what is needed comes, is opened, and is not fetched again by the next call."""
    rows, archive = rows_and_images()
    publish(hub, "clip", clip_files() | {"../evil.json": b"{}", "/tmp/evil.json": b"{}"})
    others = {"pytorch_model.bin": b"no", "config.json": b"{}"}
    publish(hub, "tokenizer", tokenizer_files() | others)
    publish(hub, "lm-512", {"lm_512.pth": zeros(language_only=True), "sft_vlm_512.pth": b"no"})
    files = {"pretrain_vlm_data.jsonl": rows, "pretrain_images.zip": archive}
    publish(hub, "pretrain-data", files | {"sft_images.zip": b""})
    names = ["clip", "tokenizer", "lm-512", "pretrain-data"]
    finished = download("--source", source, *names)
    printed, root = finished.stdout, tmp_path / "root"
    assert finished.returncode == 0, printed
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    clip = ["config.json", "preprocessor_config.json", "model.safetensors"]
    expected = {f"{CLIP_FOLDER}/{name}" for name in (*clip, "model.safetensors.sha256")}
    expected |= {f"model/minimind_tokenizer/{n}" for n in tokenizer_files()}
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
        assert line in printed.splitlines(), printed
    assert "warn" not in printed.lower()

    hub.requests.clear()
    again = download("--source", source, "pretrain-data")
    assert again.returncode == 0 and again.stdout.count("already there") == 2, again.stdout
    assert "to fetch" not in again.stdout and hub.requests == []


@pytest.mark.parametrize("source", SOURCES)
def test_a_lost_connection_and_a_killed_process_cost_little(source, hub, download, tmp_path):
    """The client goes on by itself; a new process goes on with what the killed one left."""
    archive = large_archive(32 * MB)
    files = {"pretrain_vlm_data.jsonl": rows_and_images()[0], "pretrain_images.zip": archive}
    publish(hub, "pretrain-data", files)
    hub.cut_after["pretrain_images.zip"] = 13 * MB
    hub.reset_after["pretrain_images.zip"] = 12 * MB
    finished = download("--source", source, "pretrain-data")
    assert finished.returncode == 0, finished.stdout
    starts = [request.start for request in hub.requests if request.file == "pretrain_images.zip"]
    assert starts[0] == 0 and len(starts) == 3
    assert 10 * MB <= starts[1] <= 13 * MB and starts[1] + 10 * MB <= starts[2]
    assert (tmp_path / "root/dataset/pretrain_images.zip").read_bytes() == archive

    def partials() -> list:
        files = (tmp_path / "root/dataset").iterdir()
        return [path for path in files if path.suffix in (".partial", ".incomplete")]

    (tmp_path / "root/dataset/pretrain_images.zip").unlink()
    hub.requests.clear(), hub.sent.clear()
    hub.stall_after["pretrain_images.zip"] = 22 * MB
    process = start(source, hub, tmp_path)
    until = time.monotonic() + 30
    while not any(path.stat().st_size >= 20 * MB for path in partials()):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (partial,) = partials()
    kept = partial.stat().st_size
    finished = download("--source", source, "pretrain-data")
    assert finished.returncode == 0 and "goes on at 2" in finished.stdout, finished.stdout
    starts = [request.start for request in hub.requests if request.file == "pretrain_images.zip"]
    assert starts == [0, kept] and kept >= 20 * MB
    assert (tmp_path / "root/dataset/pretrain_images.zip").read_bytes() == archive
    assert not partials()


@pytest.mark.parametrize("source", SOURCES)
def test_ctrl_c_stops_in_one_line(source, hub, tmp_path):
    files = {"pretrain_vlm_data.jsonl": b"{}", "pretrain_images.zip": bytes(2 * MB)}
    publish(hub, "pretrain-data", files)
    hub.stall_after["pretrain_images.zip"] = MB
    process = start(source, hub, tmp_path)
    until = time.monotonic() + 30
    while "pretrain_images.zip" not in hub.sent and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and printed.endswith("stopped\n"), printed
    assert "Traceback" not in printed


def test_the_token_stays_on_the_hub(hub, download):
    """Large files are served by another host, which must not see who asks."""
    files = {"pretrain_vlm_data.jsonl": b"{}", "pretrain_images.zip": bytes(2 * MB)}
    publish(hub, "pretrain-data", files)
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

    repo = ITEMS["lm-512"].repos[source]
    assert fails("lm-512").startswith(f"error: no model repository {repo} on {source}: pass")
    publish(hub, "lm-512", {"lm_768.pth": b"other", "README.md": b""})
    assert f"{repo} has no lm_512.pth (it has README.md, lm_768.pth)" in fails("lm-512")
    publish(hub, "lm-512", {"lm_512.pth": zeros()})
    hub.gone.add("lm_512.pth")
    assert "lists lm_512.pth but does not have it" in fails("lm-512")
    nowhere = f"http://127.0.0.1:{free_port()}"
    message = fails("lm-512", HF_ENDPOINT=nowhere, MODELSCOPE_DOMAIN=nowhere)
    assert message.startswith(f"error: cannot reach {source} (") and "or pass --source " in message
    hub.portal = True
    assert f"what answers as {source} is no hub: check " in fails("lm-512")
    hub.portal = False
    hub.sizes["lm_512.pth"] = 10**18
    message = fails("lm-512")
    assert message.startswith("error: 1000000000.0 GB do not fit into the ")
    assert "free some space" in message


@pytest.mark.parametrize("source", SOURCES)
def test_other_bytes_than_listed_are_thrown_away(source, hub, download, tmp_path):
    publish(hub, "lm-512", {"lm_512.pth": b"published"})
    # A short file makes modelscope wait before it gives up.
    others = {"huggingface": (b"otherwise", b"short"), "modelscope": (b"otherwise",)}
    for other in others[source]:
        hub.replaced["lm_512.pth"] = other
        finished = download("--source", source, "lm-512")
        message = "came with other bytes than the hub lists: fetch it again\n"
        assert finished.returncode == 2, finished.stdout
        assert finished.stdout.endswith(message), finished.stdout
        assert list((tmp_path / "root/out").iterdir()) == []


def test_only_a_digest_becomes_part_of_a_name():
    assert read_digest("A" * 64) == "a" * 64 and read_digest("0" * 40) == "0" * 40
    assert read_digest("a/../../../" + "0" * 29) == read_digest("") == read_digest(None) == ""


def test_a_file_of_ones_own_is_not_lost(hub, download, tmp_path):
    """sft_vlm_512.pth may be the result of two days of training."""
    published = dict.fromkeys(("pretrain_vlm_512.pth", "sft_vlm_512.pth"), b"published")
    publish(hub, "weights-512", published)
    rows, archive = rows_and_images()
    publish(hub, "pretrain-data", {"pretrain_vlm_data.jsonl": rows, "pretrain_images.zip": archive})
    put(tmp_path / "root", "weights-512", {"sft_vlm_512.pth": b"own"})
    put(tmp_path / "root", "pretrain-data", {"pretrain_vlm_data.jsonl": b"own"})
    for name in ("weights-512", "pretrain-data"):
        finished = download(name)
        assert finished.returncode == 2
        assert "move it away to keep it, or pass --overwrite" in finished.stdout
    assert (tmp_path / "root/out/sft_vlm_512.pth").read_bytes() == b"own" and hub.requests == []
    finished = download("pretrain-data", "--overwrite")
    assert finished.returncode == 0, finished.stdout
    assert "ready: pretrain-data: 30 rows, 30 images\n" in finished.stdout
    command = f"python -m scripts.download clip tokenizer lm-512 --root {tmp_path / 'root'}"
    assert f"next: {command}\n" in finished.stdout


def test_another_repository_and_names_that_do_not_exist(hub, download, tmp_path):
    hub.repos["dataset", "me/mine"] = {"sft_i2t.parquet": parquet_file(text=["a"])}
    finished = download("sft-data", "--repo", "me/mine")
    assert finished.returncode == 2
    assert "sft_i2t.parquet has columns text, not conversations" in finished.stdout
    assert "--repo a b c is no repository name" in download("lm-512", "--repo", "a b c").stdout
    with pytest.raises(UserError, match="nothing is called lm_512: choose from clip,"):
        choose_names(parse_args(["lm_512"]))
    with pytest.raises(UserError, match="nothing to fetch: name one or more of clip,"):
        choose_names(parse_args([]))
    with pytest.raises(UserError, match="--repo me/mine cannot hold all of clip, lm-512"):
        plan_fetches(["clip", "lm-512"], None, parse_args(["--repo", "me/mine"]))


def test_check_lists_what_is_missing(download, tmp_path):
    rows, archive = rows_and_images()
    files = {"pretrain_vlm_data.jsonl": rows, "pretrain_images.zip": archive}
    put(tmp_path / "root", "pretrain-data", files)
    nowhere = f"http://127.0.0.1:{free_port()}"
    finished = download("--check", HF_ENDPOINT=nowhere)
    assert finished.returncode == 0
    assert "ready: pretrain-data: 30 rows, 30 images\n" in finished.stdout
    assert finished.stdout.count("missing: ") == len(ITEMS) - 1
    clip = "config.json + preprocessor_config.json + model.safetensors or pytorch_model.bin"
    assert f"missing: clip: {clip} in {CLIP_FOLDER}/\n" in finished.stdout
    files = "sft_vlm_data.jsonl + sft_images.zip or sft_i2t.parquet"
    assert f"missing: sft-data: {files} in dataset/\n" in finished.stdout
    command = f"python -m scripts.download clip tokenizer lm-512 --root {tmp_path / 'root'}"
    assert finished.stdout.endswith(f"next: {command}\n")
    finished = download("--check", "lm-768")
    assert finished.returncode == 2
    assert finished.stdout.endswith("fetch with `python -m scripts.download lm-768`\n")


def test_all_goes_on_without_what_is_optional(tmp_path, capsys):
    """As where the data set is Parquet, and without rows of several images."""
    models = [item for item in ITEMS.values() if item.kind == "model"]
    names = [name for item in models for name in item.choices[-1]]
    names += ["pretrain_i2t.parquet", "sft_i2t.parquet", "README.md"]
    listing = [RemoteFile(name, 1, "") for name in names]

    class Hub:
        def list_files(self, repo, kind):
            return listing

        def partial_path(self, folder, file):
            return folder / f"{file.name}.partial"

    args = parse_args(["all", "--root", str(tmp_path)])
    plan = plan_fetches(list(ITEMS), Hub(), args)
    assert list(plan) == [name for name in ITEMS if name != "sft-multi-data"]
    assert [fetch.file.name for fetch in plan["sft-data"]] == ["sft_i2t.parquet"]
    assert [fetch.file.name for fetch in plan["clip"]][-1] == "pytorch_model.bin"
    line = "sft-multi-data: jingyaogong/minimind-v_dataset does not have it; going on"
    assert line in capsys.readouterr().out
    (tmp_path / "dataset").write_text("in the way")
    with pytest.raises(UserError, match="cannot make .*dataset"):
        make_folder(plan["sft-data"][0].folder)
