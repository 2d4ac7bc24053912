"""An exported set to a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otdd.distill.config import ConfigError, require
from otdd.distill.hf import CARD
from otdd.distill.setfiles import LAYOUTS, SetFiles
from otdd.distill.store import MANIFEST, Store, StoreError
from otdd.distill.sums import SUMS

_REPO = re.compile(r"(?!.*(--|\.\.))(?:\w[\w.-]*/)?\w[\w.-]{0,94}(?<![-.])", re.ASCII)
_NAMES = re.compile(
    rf"{re.escape(CARD)}|{re.escape(MANIFEST)}|{SUMS}|(classes|metrics)\.json|grid\.png"
    r"|data/train-\d{5}\.parquet|labels(-\d{5}-of-\d{5})?\.safetensors|images/\d{5}/\d{5}\.png"
)


@dataclass(frozen=True)
class Upload:
    """What is sent, or would be.

    Attributes:
        repo_id: the repository, OWNER/NAME or NAME.
        files: names in the folder -> bytes.
        license: that the card names, or `unknown`.
        url: of the commit; None if nothing was sent.
    """

    repo_id: str
    files: dict[str, int]
    license: str
    url: str | None = None


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    api: Any = None,
) -> Upload:
    """Send a folder made by `otdd export --to hf` to a data set repository, in one commit.

    Files that the export did not write are left alone.

    Args:
        folder: the exported folder; its card may have been edited.
        repo_id: OWNER/NAME, or NAME of the owner of the token; made where it does not exist.
        private: whether a new repository is private.
        dry_run: only say what would be sent; needs neither network nor token.
        token: of the Hub; by default the one of `hf auth login` or HF_TOKEN.
        api: an object like `huggingface_hub.HfApi`, in place of it.

    Raises:
        StoreError: no such folder, files of the export are missing, or the card is damaged.
        ConfigError: a name that the Hub does not accept, no token, or a refusal of the Hub.
    """
    ok = _REPO.fullmatch(repo_id) is not None and not repo_id.endswith(".git")
    require(ok, "repo_id", repo_id, "OWNER/NAME of letters, digits, '-', '_' and '.'")
    files = exported_files(folder)
    Store(folder).sums.verify(name for name in files if name != CARD)
    licence = _licence(Path(folder) / CARD)
    if dry_run:
        return Upload(repo_id, files, licence)
    if api is None:
        api = _api(token)
    try:
        made = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=getattr(made, "repo_id", None) or repo_id,
            repo_type="dataset",
            folder_path=os.fspath(folder),
            allow_patterns=list(files),
            commit_message="Distilled set",
        )
    except Exception as error:
        if not _refused(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"cannot push to {repo_id}: {reason}") from error
    return Upload(repo_id, files, licence, str(getattr(commit, "commit_url", commit)))


def exported_files(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Names and sizes of what `otdd export --to hf` wrote into a folder.

    Raises:
        StoreError: the folder is none of such, or files are missing.
    """
    found = SetFiles.find(folder)
    root, manifest = found.store.path, found.manifest
    if not found.exported or manifest["layout"] != "images" or not (root / CARD).is_file():
        raise StoreError(
            f"{root} is no Hugging Face data set; `otdd export {root} --to hf --out OUT` makes one"
        )
    files = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if _NAMES.fullmatch(name) and path.is_file():
            files[name] = path.stat().st_size
    wanted = [CARD, MANIFEST, "classes.json", "data/train-00000.parquet", *found.labels]
    for label, count in enumerate(manifest["counts"]):
        wanted += [f"{LAYOUTS['images']}{label:05d}/{index:05d}.png" for index in range(count)]
    missing = [name for name in wanted if name not in files]
    if missing:
        some = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        raise StoreError(f"{root} is not complete: {some} missing; export the set again")
    return files


def _licence(card: Path) -> str:
    """What the head of a card names, which may have been edited."""
    import yaml

    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        head = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise StoreError(f"{card}: its head is no YAML ({problem})") from None
    return str(head.get("license", "unknown")) if isinstance(head, dict) else "unknown"


def _api(token: str | None) -> Any:
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError as error:
        raise ConfigError(f'push: {error}; pip install "otdd[hub]"') from None
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("cannot push: HF_HUB_OFFLINE is set; unset it, or use --dry-run")
    if not (token or huggingface_hub.get_token()):
        raise ConfigError(
            "cannot push without a token of the Hugging Face Hub: `hf auth login`, or set HF_TOKEN"
        )
    return huggingface_hub.HfApi(token=token)


def _refused(error: Exception) -> bool:
    """Whether the network or the Hub is the cause, and no mistake in here."""
    if isinstance(error, OSError):  # of the network, and every answer of the Hub that is an error
        return True
    return type(error).__module__.partition(".")[0] in ("huggingface_hub", "httpx", "httpx2")
