"""An exported folder as a repository on the hub: weights, tokenizer and card, and nothing else that a run has."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

from orpo.errors import UserError

UPLOADED = (
    "model*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "adapter_config.json", "config.json",
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "additional_chat_templates/*.jinja", "README.md",
)  # fmt: skip
"""All that is ever sent to a hub."""


def files_for_hub(folder: Path) -> list[Path]:
    """The files of a folder that would be published, in order of name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if any(fnmatch.fnmatchcase(path.relative_to(folder).as_posix(), one) for one in UPLOADED))


def publish(folder: Path, repo_id: str, *, is_public: bool = False) -> str:
    """Make the repository, private unless it is to be public, and upload; its address.

    A repository that is there already stays as private or public as it is.

    Raises:
        UserError: no such name, no token, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id):  # the hub's own check comes after an attempt to reach it
        raise UserError(f"{repo_id!r} is no name of a repository", where="--repo_id", expected="OWNER/NAME")
    hub = HfApi()
    try:
        address = hub.create_repo(repo_id, private=not is_public, exist_ok=True)
        hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload model", allow_patterns=list(UPLOADED))
    except HFValidationError as error:
        raise UserError(str(error).splitlines()[0], where="--repo_id", expected="OWNER/NAME") from error
    except (HfHubHTTPError, OSError, RuntimeError) as error:  # no network is one of httpx's, which derives from none of ours
        raise _refused(error, repo_id) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0].startswith("httpx"):
            raise _refused(error, repo_id) from error
        raise
    return str(address)


def _refused(error: Exception, repo_id: str) -> UserError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    mend = "check the connection; the export can be repeated"
    if status in (401, 403):
        mend = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    return UserError(f"the hub refused: {(str(error).strip() or type(error).__name__).splitlines()[0]}", where=repo_id, mend=mend)
