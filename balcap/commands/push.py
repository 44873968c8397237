"""``python main.py push RUN REPO``: the export of a run on Hugging Face's hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from balcap.utils.arguments import Parser
from balcap.utils.errors import UserError
from balcap.utils.redact import redact


def push(run: str, repo: str, private: bool = False, dry_run: bool = False) -> None:
    """Upload ``export/`` of a run, and nothing else; without a token, or with `dry_run`, only say what would be.

    Args:
        run: the run folder.
        repo: ``owner/name`` on the hub; made if it is not there.
        private: whether a repo that is made is private.
        dry_run: upload nothing.

    Raises:
        UserError: there is no export, `repo` is no name, the hub refuses or cannot be reached, or a repo that
            shall be private is there and public.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, HTTPError
    from huggingface_hub.utils import validate_repo_id

    export = Path(run) / "export"
    if not any(export.glob("*.safetensors")):
        raise UserError(
            f"{export}: there is no export of a model. A fit writes it at its end, unless export.enabled is false; "
            "one that was cut off goes on with --ckpt_path last"
        )
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"REPO: {repo!r} is no name of a repo, such as owner/name ({error})") from None
    _show(export, repo)
    if get_token() is None or dry_run:
        how = "" if get_token() else " There is no token here: hf auth login, or set HF_TOKEN."
        print(f"Nothing was uploaded.{how}")
        return
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(
                f"--private: {url} is there already, and public; name another repo, or make it private"
            )
        api.upload_folder(
            repo_id=repo, folder_path=export, commit_message=f"Export of {Path(run).resolve().name}"
        )
    except (OSError, HTTPError) as error:
        raise UserError(f"{repo}: the upload failed: {redact(f'{type(error).__name__}: {error}')}") from error
    print(f"{url}: uploaded")


def _show(export: Path, repo: str) -> None:
    files = {
        str(path.relative_to(export)): path.stat().st_size
        for path in sorted(export.rglob("*"))
        if path.is_file()
    }
    for name, size in files.items():
        print(f"  {size / 1e6:10,.2f} MB  {name}")
    print(f"{export} -> {repo}: {len(files)} files, {sum(files.values()) / 1e6:,.2f} MB")
    if "README.md" not in files:
        print("Attention: it has no model card (README.md)")
    config = export / "adapter_config.json"
    base = json.loads(config.read_text()).get("base_model_name_or_path") if config.is_file() else None
    if base and Path(base).is_dir():
        print(
            f"Attention: the adapter is for {base}, a folder of this machine; put the base's hub id in {config} first"
        )


def main(args: Sequence[str]) -> None:
    """``python main.py push RUN REPO [--private] [--dry_run]``."""
    parser = Parser(prog="main.py push", description="Upload the export of a run to Hugging Face's hub.")
    parser.add_argument("run", type=str, help="The run folder.")
    parser.add_argument("repo", type=str, help="Name on the hub, owner/name; made if it is not there.")
    parser.add_argument("--private", action="store_true", help="Make a private repo.")
    parser.add_argument("--dry_run", action="store_true", help="Only list what would be uploaded.")
    given = parser.parse_args(list(args))
    push(given.run, given.repo, given.private, given.dry_run)
