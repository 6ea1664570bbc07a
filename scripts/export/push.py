"""Upload an exported folder to a hub, where it becomes a model's page.

Each hub's own client does it, with the login that it keeps (HF_TOKEN or `hf auth login`,
MODELSCOPE_API_TOKEN or `ms login`).
"""

import os
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path

from common.errors import UserError

MESSAGE = "Written by MiniMind-V"


def push(folder: Path, repo: str, hub: str) -> str:
    """Upload every file of a folder; files of the same names there are replaced.

    Args:
        folder: what was exported.
        repo: OWNER/NAME; it is made if there is none.
        hub: huggingface or modelscope.

    Returns the address of the page. UserError where it cannot be done; the folder stays.
    """
    upload, login, again = {
        "huggingface": (push_to_huggingface, "hf auth login", "hf upload"),
        "modelscope": (push_to_modelscope, "ms login", "ms upload"),
    }[hub]
    try:
        return upload(folder, repo)
    # Whatever goes wrong there, what was exported is of use, and the client itself can go on.
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise UserError(
            f"cannot upload to {repo} on {hub} ({type(error).__name__}: {reason[0]:.200}): "
            f"{folder} is whole; check the network and the login (`{login}`), then "
            f"`{again} {repo} {folder}`"
        ) from error


def push_to_huggingface(folder: Path, repo: str) -> str:
    from huggingface_hub import HfApi, logging
    from huggingface_hub.utils import disable_progress_bars

    # It tells of its retries with links of a thousand characters.
    logging.set_verbosity_error()
    disable_progress_bars()
    api = HfApi()
    page = api.create_repo(repo, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message=MESSAGE)
    return str(page)


def push_to_modelscope(folder: Path, repo: str) -> str:
    # The client warns of the older name.
    if "MODELSCOPE_DOMAIN" in os.environ:
        os.environ.setdefault("MODELSCOPE_ENDPOINT", os.environ["MODELSCOPE_DOMAIN"])
    os.environ.setdefault("MODELSCOPE_LOG_LEVEL", "CRITICAL")
    import modelscope_hub

    api = modelscope_hub.HubApi()
    with suppress(modelscope_hub.errors.AlreadyExistsError):
        api.create_repo(repo, "model")
    # It would keep notes in the folder, and print a report.
    how = dict(commit_message=MESSAGE, use_cache=False, disable_tqdm=True)
    with redirect_stdout(StringIO()):
        api.upload_folder(repo, "model", folder, **how)
    return f"{modelscope_hub.config.get_default_config().endpoint}/models/{repo}"
