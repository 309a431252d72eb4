"""Upload of an export to the Hugging Face hub, or to another server that speaks its protocol.

An export is checked before anything leaves this machine: it is whole, its hashes are right, and its card names a
license. One commit holds all files, so the repository never has half an export.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kabrn_dist.inference.folder import check_run_folder, is_export
from kabrn_dist.inference.load import list_entries, verify_data
from kabrn_dist.utils.errors import UserError
from kabrn_dist.utils.safe_open import open_plain, read_plain
from kabrn_dist.utils.strict_yaml import load_yaml

CARD_NAME = "README.md"
CARD_BYTES_LIMIT = 1 << 22
# What exports consist of. Anything else in the folder was put there by someone, and may be private.
_SUFFIXES = {".safetensors", ".json", ".yaml", ".py", ".md", ".jinja", ".txt"}
_NAMES = {"LICENSE", ".gitattributes"}
_SHOWN_KEYS = ("license", "language", "datasets", "pipeline_tag", "library_name", "base_model")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FRONT_MATTER = re.compile(r"---\r?\n(.*?\n)---\r?\n", re.DOTALL)


@dataclass(frozen=True)
class Publication:
    """An export that can be uploaded.

    Attributes:
        folder: The export.
        files: Names of its files and their bytes, by name.
        card: Metadata of its model card.
        readme: Content of the model card as it is uploaded.
    """

    folder: Path
    files: dict[str, int]
    card: dict[str, Any]
    readme: bytes

    def describe(self) -> str:
        """Return the files with their sizes, and what the card says, one a line."""
        width = max(len(f"{size:,}") for size in self.files.values())
        lines = [f"{size:>{width},}  {name}" for name, size in self.files.items()]
        said = [f"{key} {_as_text(self.card[key])}" for key in _SHOWN_KEYS if key in self.card]
        return "\n".join(
            [*lines, f"{sum(self.files.values()):,} bytes in {len(lines)} files", *[f"card: {s}" for s in said]]
        )


def plan_publication(folder: Path, license_id: str | None = None) -> Publication:
    """Check an export and list what would be uploaded. Nothing is sent and nothing is written.

    Args:
        folder: A folder that `mixkabrn export` wrote.
        license_id: License for the card, such as `mit`; None takes the one that the card names.

    Raises:
        UserError: for a folder that is no export, is not whole, or is damaged, or has a file that is not of an export;
            for a card without a license.
    """
    if not folder.is_dir() or not is_export(folder):
        _refuse(folder)
    if not ((folder / "config.yaml").exists() or (folder / "config.json").exists()):
        raise UserError(f"{folder}: has neither config.yaml nor config.json, so it is not whole; export the run again")
    entries = list_entries(folder)
    for file in sorted({file for file, _ in entries.values()}):
        verify_data(file)
    files = _list_files(folder)
    readme, card = _read_card(folder / CARD_NAME, license_id)
    return Publication(folder, files | {CARD_NAME: len(readme)}, card, readme)


def check_repository(repository: str) -> None:
    """Check that a repository is named as OWNER/NAME.

    Raises:
        UserError: if not.
    """
    if not _REPOSITORY.fullmatch(repository) or len(repository) > 96 or ".." in repository or "--" in repository:
        raise UserError(
            f"{repository!r} is no name of a repository; give OWNER/NAME, such as ada/tiny-retnet, of letters, digits, "
            "'-', '_' and '.'"
        )


def publish(
    publication: Publication,
    repository: str,
    private: bool = False,
    revision: str = "main",
    endpoint: str | None = None,
) -> str:
    """Upload an export as one commit; the repository and the branch are made if they are missing.

    The token is that of HF_TOKEN or of `hf auth login`.

    Args:
        publication: From `plan_publication`.
        repository: OWNER/NAME.
        private: Whether a new repository is private.
        revision: Branch to commit to.
        endpoint: Address of the server; None for HF_ENDPOINT or the hub.

    Returns:
        The address of the commit.

    Raises:
        UserError: without a token, or if the server refuses or cannot be reached.
    """
    check_repository(repository)
    import huggingface_hub

    token = huggingface_hub.get_token()
    if not token:
        raise UserError(
            "no token for the upload; set HF_TOKEN to one with write access (https://huggingface.co/settings/tokens), "
            "or use `hf auth login`"
        )
    api = huggingface_hub.HfApi(endpoint=endpoint, token=token)
    additions = [
        huggingface_hub.CommitOperationAdd(
            name, publication.readme if name == CARD_NAME else str(publication.folder / name)
        )
        for name in publication.files
    ]
    with _one_line(f"{api.endpoint}/{repository}"):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision != "main":
            api.create_branch(repository, branch=revision, exist_ok=True)
        message = f"Upload {publication.folder.absolute().name}"
        return str(api.create_commit(repository, additions, commit_message=message, revision=revision).commit_url)


@contextmanager
def _one_line(target: str) -> Iterator[None]:
    """Turn the library's errors into one line each."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {
            401: "the token is not valid; make a new one",
            403: "the token may not write there; use one with write access to that owner",
            404: "there is no such repository or branch, or the token may not see it; check the name",
        }.get(status, "try again later")
        raise UserError(f"{target}: the server refused with status {status} ({_reason(error)}); {remedy}") from None
    except (HTTPError, OSError) as error:
        raise UserError(
            f"{target}: cannot be reached ({_reason(error)}); check the network or --endpoint, and repeat the command"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{target}: the upload failed ({_reason(error)}); repeat the command") from None


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error
    message = getattr(cause, "server_message", None) or str(cause) or type(cause).__name__
    return " ".join(message.split())[:200]


def _refuse(folder: Path) -> None:
    """Say what a folder is that is no export."""
    # A run is told what to do; anything else is named by what lies there.
    check_run_folder(folder, "config.yaml")
    raise UserError(
        f"{folder}: is a run, with its optimizer's state; publish an export of it: mixkabrn export {folder} OUT"
    )


def _list_files(folder: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() or (path.suffix not in _SUFFIXES and path.name not in _NAMES):
            raise UserError(f"{path}: is no file of an export and may be private; move it away, and publish again")
        # Refuses links, which could lead to anything.
        with open_plain(path) as file:
            sizes[path.name] = file.seek(0, 2)
    return sizes


def _read_card(path: Path, license_id: str | None) -> tuple[bytes, dict[str, Any]]:
    """The card's content, with a license in its front matter, and its metadata."""
    content = read_plain(path, CARD_BYTES_LIMIT, remedy="export the run again, or write a model card").decode(
        "utf-8", "replace"
    )
    match = _FRONT_MATTER.match(content)
    card = load_yaml(match[1]) if match else {}
    if not isinstance(card, dict):
        raise UserError(f"{path}: what stands between the lines --- is no mapping; write `license: mit` there")
    if license_id is not None and license_id != card.get("license"):
        if "license" in card:
            raise UserError(f"{path}: names the license {card['license']}, not {license_id}; change it there")
        card = {"license": license_id, **card}
        rest = content[match.end() :] if match else content
        content = f"---\nlicense: {license_id}\n{match[1] if match else ''}---\n{rest}"
    if not isinstance(card.get("license"), str):
        raise UserError(
            f"{path}: names no license, without which nobody may use the model; give --license, such as mit, "
            "apache-2.0 or cc-by-4.0, or write `license: …` between two lines --- at its beginning"
        )
    return content.encode(), card


def _as_text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
