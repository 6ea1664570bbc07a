"""The two hubs the published files are on, each through its own client: list a repository's files, fetch one of them."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx2  # what huggingface_hub speaks HTTP with
from huggingface_hub import HfApi, errors, hf_hub_url, logging
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from common.errors import UserError

TIMEOUT = 30  # seconds until a hub that does not answer counts as out of reach
LONGEST = 7 * 24 * 3600  # seconds that one file may take


class RemoteFile(NamedTuple):
    """A file as its hub lists it."""

    name: str
    size: int  # bytes
    digest: (
        str  # SHA-256, or git's SHA-1 of a small file, in hexadecimal; "" where the hub gives none
    )


class HuggingFace:
    """huggingface_hub. A file grows beside its place, named by its digest, and goes on growing in the next run.

    `hf_hub_download` would throw away what it has when its process is stopped, so the client's own `http_get`, which can
    begin anywhere, is given the file.
    """

    other = "modelscope"

    def __init__(self):
        logging.set_verbosity_error()  # its retries are told with links of a thousand characters
        self.revisions: dict[str, str] = {}  # repository -> the commit that was listed

    def list_files(self, repo: str, kind: str) -> list[RemoteFile]:
        """All files of a repository. UserError where there is none or the hub cannot be reached."""
        with self._readable_errors(repo, kind):
            info = HfApi().repo_info(repo, repo_type=kind, files_metadata=True, timeout=TIMEOUT)
        self.revisions[repo] = info.sha
        return [
            RemoteFile(
                entry.rfilename,
                entry.size or 0,
                read_digest(entry.lfs.sha256 if entry.lfs else entry.blob_id),
            )
            for entry in info.siblings
        ]

    def partial_path(self, folder: Path, file: RemoteFile) -> Path:
        """Where the file grows until it is whole."""
        return folder / f".{file.name}.{file.digest[:12]}.partial"

    def fetch(self, repo: str, kind: str, file: RemoteFile, folder: Path) -> None:
        """Put a listed file into `folder`, going on with a part of it that is there."""
        partial = self.partial_path(folder, file)
        url = hf_hub_url(repo, file.name, repo_type=kind, revision=self.revisions[repo])
        with self._readable_errors(repo, kind, file.name):
            while not self._grow(partial, url, file):
                pass
        if not is_whole(partial, file):
            partial.unlink()
            raise UserError(_other_bytes(repo, file.name))
        os.replace(partial, folder / file.name)

    def _grow(self, partial: Path, url: str, file: RemoteFile) -> bool:
        """Fetch what is missing. False where the connection was reset after some of it; other losses http_get mends itself."""
        with open(partial, "ab") as stream:
            begun = stream.tell()
            if begun > file.size:
                begun = stream.truncate(0)
            headers = build_hf_headers() | {"Accept-Encoding": "identity"}
            known = dict(headers=headers, expected_size=file.size, displayed_filename=file.name)
            try:
                http_get(url, stream, resume_size=begun, **known)
            except httpx2.ReadError:
                if stream.tell() == begun:
                    raise
                return False
            except OSError as error:  # the disk's, or an answer such as 404, or without a number: of another length
                if error.errno is not None or isinstance(error, errors.HfHubHTTPError):
                    raise
        return True

    @contextmanager
    def _readable_errors(self, repo: str, kind: str, name: str = "") -> Iterator[None]:
        try:
            yield
        except errors.HFValidationError as error:
            raise UserError(
                f"--repo {repo} is no repository name: give it as OWNER/NAME"
            ) from error
        except errors.OfflineModeIsEnabled as error:
            raise UserError("HF_HUB_OFFLINE is set: unset it to download") from error
        except errors.GatedRepoError as error:
            raise UserError(
                f"{repo} asks for consent: give it on its page, then `hf auth login`"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise UserError(_no_repository(repo, kind, "huggingface", "hf auth login")) from error
        except errors.EntryNotFoundError as error:
            raise UserError(_no_file(repo, name)) from error
        except errors.HfHubHTTPError as error:
            raise UserError(
                f"huggingface answers {error.response.status_code} for {repo}: try again later"
            ) from error
        except httpx2.HTTPError as error:
            raise UserError(_no_connection("huggingface", error, self.other)) from error
        except OSError as error:
            raise UserError(_no_place(name, error)) from error
        except ValueError as error:
            raise UserError(_no_hub("huggingface", "HF_ENDPOINT")) from error


class ModelScope:
    """modelscope's hub client, which keeps a file's beginning as NAME.incomplete and goes on from there in the next run."""

    other = "huggingface"

    def __init__(self):
        if "MODELSCOPE_DOMAIN" in os.environ:  # the older name, of which the client warns
            os.environ.setdefault("MODELSCOPE_ENDPOINT", os.environ["MODELSCOPE_DOMAIN"])
        os.environ.setdefault("MODELSCOPE_LOG_LEVEL", "CRITICAL")
        os.environ.setdefault(
            "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", str(LONGEST)
        )  # it gives up after an hour otherwise
        os.environ.setdefault(
            "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS", "2"
        )  # to list; a file is asked for more often
        import modelscope_hub

        self.client, self.api = modelscope_hub, modelscope_hub.HubApi()

    def list_files(self, repo: str, kind: str) -> list[RemoteFile]:
        """All files of a repository. UserError where there is none or the hub cannot be reached."""
        with self._readable_errors(repo, kind):
            listed = self.api.list_repo_files(repo, kind)
        return [
            RemoteFile(entry.path, entry.size, read_digest(entry.sha256))
            for entry in listed
            if not entry.is_dir
        ]

    def partial_path(self, folder: Path, file: RemoteFile) -> Path:
        """Where the file grows until it is whole."""
        return folder / f"{file.name}.incomplete"

    def fetch(self, repo: str, kind: str, file: RemoteFile, folder: Path) -> None:
        """Put a listed file into `folder`, going on with a part of it that is there."""
        with self._readable_errors(repo, kind, file.name):
            self.api.download_file(
                repo,
                kind,
                file.name,
                local_dir=folder,
                expected_sha256=file.digest or None,
                file_size=file.size,
            )

    @contextmanager
    def _readable_errors(self, repo: str, kind: str, name: str = "") -> Iterator[None]:
        client = self.client
        try:
            yield
        except client.NotExistError as error:
            message = (
                _no_file(repo, name)
                if name
                else _no_repository(repo, kind, "modelscope", "ms login")
            )
            raise UserError(message) from error
        except (client.AuthenticationError, client.PermissionDeniedError) as error:
            raise UserError(
                f"modelscope does not let you read {repo}: `ms login` first, or pass --repo"
            ) from error
        except client.FileIntegrityError as error:
            raise UserError(_other_bytes(repo, name)) from error
        except client.NetworkError as error:
            raise UserError(_no_connection("modelscope", error, self.other)) from error
        except client.APIError as error:
            raise UserError(
                f"modelscope answers {error.status_code} for {repo}: try again later"
            ) from error
        except ValueError as error:
            raise UserError(_no_hub("modelscope", "MODELSCOPE_ENDPOINT")) from error
        except OSError as error:
            raise UserError(_no_place(name, error)) from error
        except client.HubError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"cannot fetch {name} of {repo} ({reason}): run this again to go on"
            ) from error


HUBS = {"huggingface": HuggingFace, "modelscope": ModelScope}


def _no_repository(repo: str, kind: str, source: str, login: str) -> str:
    return f"no {kind} repository {repo} on {source}: pass its name as --repo, or `{login}` if it is private"


def _no_file(repo: str, name: str) -> str:
    return f"{repo} lists {name} but does not have it: try again later, or pass --repo"


def _other_bytes(repo: str, name: str) -> str:
    return f"{name} of {repo} came with other bytes than the hub lists: fetch it again"


def _no_place(name: str, error: OSError) -> str:
    return f"cannot write {name} ({error.strerror or error}): free some space, or choose another --root"


def _no_hub(source: str, variable: str) -> str:
    return f"what answers as {source} is no hub: check {variable}, and whether the network wants you to log in"


def _no_connection(source: str, error: Exception, other: str) -> str:
    return (
        f"cannot reach {source} ({type(error).__name__}): check the network and run this again, which goes on where it "
        f"stopped, or pass --source {other}"
    )


def read_digest(text: str | None) -> str:
    """What a hub calls a digest, if it is one; it becomes part of a file's name."""
    return text.lower() if re.fullmatch(r"[0-9a-fA-F]{40}|[0-9a-fA-F]{64}", text or "") else ""


def is_whole(path: Path, file: RemoteFile) -> bool:
    """Whether the file at `path` is the one listed: its length, and its digest where the hub gives one."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if not file.digest:
        return True
    is_git = (
        len(file.digest) == hashlib.sha1().digest_size * 2
    )  # git hashes a header with the length first
    digest = hashlib.sha1(b"blob %d\0" % file.size) if is_git else hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest() == file.digest
