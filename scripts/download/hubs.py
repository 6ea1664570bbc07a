"""The two hubs of the published files, each through its own client: list them, fetch one.

A client takes a second to import, so that waits until a hub is asked.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError

# Seconds until a hub that does not answer counts as out of reach.
TIMEOUT = 30
# Seconds that one file may take: a week.
LONGEST = 7 * 24 * 3600


class RemoteFile(NamedTuple):
    """A file as its hub lists it.

    The digest is SHA-256, or git's SHA-1 of a small file, in hexadecimal; "" if the hub gives none.
    """

    name: str
    size: int  # bytes
    digest: str


class HuggingFace:
    """huggingface_hub. A file grows beside its place, and goes on growing in the next run.

    `hf_hub_download` would throw away what it has when its process is stopped. So the client's own
    `http_get`, which can begin anywhere, is given the file.
    """

    def __init__(self):
        # What huggingface_hub speaks HTTP with.
        import httpx2
        from huggingface_hub import HfApi, errors, hf_hub_url, logging

        self.api, self.find_url, self.errors, self.http = HfApi(), hf_hub_url, errors, httpx2
        # The client tells of its retries with links of a thousand characters.
        logging.set_verbosity_error()
        self.revisions: dict[str, str] = {}  # repository -> listed commit

    def list_files(self, repo: str, kind: str) -> list[RemoteFile]:
        """All files of a repository. UserError if there is none or the hub cannot be reached."""
        with self._readable_errors(repo, kind):
            info = self.api.repo_info(repo, repo_type=kind, files_metadata=True, timeout=TIMEOUT)
        self.revisions[repo] = info.sha
        files = []
        for entry in info.siblings:
            digest = read_digest(entry.lfs.sha256 if entry.lfs else entry.blob_id)
            files.append(RemoteFile(entry.rfilename, entry.size or 0, digest))
        return files

    def partial_path(self, folder: Path, file: RemoteFile) -> Path:
        """Where the file grows until it is whole; the digest says of which version it is."""
        return folder / f".{file.name}.{file.digest[:12]}.partial"

    def fetch(self, repo: str, kind: str, file: RemoteFile, folder: Path) -> None:
        """Put a listed file into `folder`, going on with a part of it that is there."""
        partial, revision = self.partial_path(folder, file), self.revisions[repo]
        url = self.find_url(repo, file.name, repo_type=kind, revision=revision)
        with self._readable_errors(repo, kind, file.name):
            while not self._grow(partial, url, file):
                pass
        if not is_whole(partial, file):
            partial.unlink()
            raise UserError(_other_bytes(repo, file.name))
        os.replace(partial, folder / file.name)

    def _grow(self, partial: Path, url: str, file: RemoteFile) -> bool:
        """Fetch what is missing; False if the connection was reset after some of it.

        `http_get` itself mends other losses.
        """
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        with open(partial, "ab") as stream:
            begun = stream.tell()
            if begun > file.size:
                begun = stream.truncate(0)
            headers = build_hf_headers() | {"Accept-Encoding": "identity"}
            known = dict(headers=headers, expected_size=file.size, displayed_filename=file.name)
            try:
                http_get(url, stream, resume_size=begun, **known)
            except self.http.ReadError:
                if stream.tell() == begun:
                    raise
                return False
            except OSError as error:
                # One of the disk has a number, one of the hub is an answer such as 404. What is
                # left is a file of another length, which the digest will show.
                if error.errno is not None or isinstance(error, self.errors.HfHubHTTPError):
                    raise
        return True

    @contextmanager
    def _readable_errors(self, repo: str, kind: str, name: str = "") -> Iterator[None]:
        errors, hub = self.errors, "huggingface"
        try:
            yield
        except errors.HFValidationError as error:
            message = f"--repo {repo} is no repository name: give it as OWNER/NAME"
            raise UserError(message) from error
        except errors.OfflineModeIsEnabled as error:
            raise UserError("HF_HUB_OFFLINE is set: unset it to download") from error
        except errors.GatedRepoError as error:
            message = f"{repo} asks for consent: give it on its page, then `hf auth login`"
            raise UserError(message) from error
        except errors.RepositoryNotFoundError as error:
            raise UserError(_no_repository(repo, kind, hub, "hf auth login")) from error
        except errors.EntryNotFoundError as error:
            raise UserError(_no_file(repo, name)) from error
        except errors.HfHubHTTPError as error:
            raise UserError(_other_answer(hub, error.response.status_code, repo)) from error
        except self.http.HTTPError as error:
            raise UserError(_no_connection(hub, error)) from error
        except OSError as error:
            raise UserError(_no_place(name, error)) from error
        except ValueError as error:
            raise UserError(_no_hub(hub, "HF_ENDPOINT")) from error


class ModelScope:
    """modelscope. Its client keeps a file's beginning as NAME.incomplete and goes on from there."""

    def __init__(self):
        # The client warns of the older name.
        if "MODELSCOPE_DOMAIN" in os.environ:
            os.environ.setdefault("MODELSCOPE_ENDPOINT", os.environ["MODELSCOPE_DOMAIN"])
        os.environ.setdefault("MODELSCOPE_LOG_LEVEL", "CRITICAL")
        # It would give up after an hour.
        os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", str(LONGEST))
        # To list; a file is asked for more often.
        os.environ.setdefault("MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS", "2")
        import modelscope_hub

        self.client, self.api = modelscope_hub, modelscope_hub.HubApi()

    def list_files(self, repo: str, kind: str) -> list[RemoteFile]:
        """All files of a repository. UserError if there is none or the hub cannot be reached."""
        with self._readable_errors(repo, kind):
            entries = [entry for entry in self.api.list_repo_files(repo, kind) if not entry.is_dir]
        return [RemoteFile(one.path, one.size, read_digest(one.sha256)) for one in entries]

    def partial_path(self, folder: Path, file: RemoteFile) -> Path:
        """Where the file grows until it is whole."""
        return folder / f"{file.name}.incomplete"

    def fetch(self, repo: str, kind: str, file: RemoteFile, folder: Path) -> None:
        """Put a listed file into `folder`, going on with a part of it that is there."""
        known = dict(expected_sha256=file.digest or None, file_size=file.size)
        with self._readable_errors(repo, kind, file.name):
            self.api.download_file(repo, kind, file.name, local_dir=folder, **known)

    @contextmanager
    def _readable_errors(self, repo: str, kind: str, name: str = "") -> Iterator[None]:
        client, hub = self.client, "modelscope"
        try:
            yield
        except client.NotExistError as error:
            if name:
                raise UserError(_no_file(repo, name)) from error
            raise UserError(_no_repository(repo, kind, hub, "ms login")) from error
        except (client.AuthenticationError, client.PermissionDeniedError) as error:
            message = f"modelscope does not let you read {repo}: `ms login` first, or pass --repo"
            raise UserError(message) from error
        except client.FileIntegrityError as error:
            raise UserError(_other_bytes(repo, name)) from error
        except client.NetworkError as error:
            raise UserError(_no_connection(hub, error)) from error
        except client.APIError as error:
            raise UserError(_other_answer(hub, error.status_code, repo)) from error
        except ValueError as error:
            raise UserError(_no_hub(hub, "MODELSCOPE_ENDPOINT")) from error
        except OSError as error:
            raise UserError(_no_place(name, error)) from error
        except client.HubError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"cannot fetch {name} of {repo} ({reason}): run this again to go on"
            ) from error


HUBS = {"huggingface": HuggingFace, "modelscope": ModelScope}


def _no_repository(repo: str, kind: str, hub: str, login: str) -> str:
    return (
        f"no {kind} repository {repo} on {hub}: pass its name as --repo, or `{login}` if it is "
        "private"
    )


def _no_file(repo: str, name: str) -> str:
    return f"{repo} lists {name} but does not have it: try again later, or pass --repo"


def _other_bytes(repo: str, name: str) -> str:
    return f"{name} of {repo} came with other bytes than the hub lists: fetch it again"


def _other_answer(hub: str, status: int, repo: str) -> str:
    return f"{hub} answers {status} for {repo}: try again later"


def _no_place(name: str, error: OSError) -> str:
    reason = error.strerror or error
    return f"cannot write {name} ({reason}): free some space, or choose another --root"


def _no_hub(hub: str, variable: str) -> str:
    return (
        f"what answers as {hub} is no hub: check {variable}, and whether the network wants you to "
        "log in"
    )


def _no_connection(hub: str, error: Exception) -> str:
    (other,) = HUBS.keys() - {hub}
    return (
        f"cannot reach {hub} ({type(error).__name__}): check the network and run this again, which "
        f"goes on where it stopped, or pass --source {other}"
    )


def read_digest(text: str | None) -> str:
    """What a hub calls a digest, if it is one: it becomes part of a file's name."""
    return text.lower() if re.fullmatch(r"[0-9a-fA-F]{40}|[0-9a-fA-F]{64}", text or "") else ""


def is_whole(path: Path, file: RemoteFile) -> bool:
    """Whether the file at `path` is the one listed: its length, and its digest if there is one."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if not file.digest:
        return True
    # Git hashes a header with the length first.
    is_git = len(file.digest) == 40
    digest = hashlib.sha1(b"blob %d\0" % file.size) if is_git else hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest() == file.digest
