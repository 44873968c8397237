"""``main.py push``: the export of a run goes to the hub, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HTTPError

from main import main


class Hub:
    """In the place of `huggingface_hub.HfApi`: records what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: Exception | None = None
        self.private = False

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> str:
        assert exist_ok
        self.calls.append(("create_repo", {"repo_id": repo_id, "private": private}))
        return f"https://huggingface.co/{repo_id}"

    def model_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def upload_folder(
        self, *, repo_id: str, folder_path: str | Path, commit_message: str | None = None
    ) -> None:
        if self.error:
            raise self.error
        self.calls.append(("upload_folder", {"repo_id": repo_id, "folder_path": folder_path}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_planted0123456789")
    return hub


@pytest.fixture
def run(tmp_path: Path) -> Path:
    export = tmp_path / "mine" / "export"
    export.mkdir(parents=True)
    (export / "model.safetensors").write_bytes(b"\0" * 3_000_000)
    (export / "README.md").write_text("card")
    (tmp_path / "mine/metrics.csv").write_text("not for the hub")
    return tmp_path / "mine"


def test_the_export_is_uploaded_and_nothing_else(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["push", str(run), "me/captioner"])
    assert hub.calls == [
        ("create_repo", {"repo_id": "me/captioner", "private": False}),
        ("upload_folder", {"repo_id": "me/captioner", "folder_path": run / "export"}),
    ]
    shown = capsys.readouterr().out
    assert "3.00 MB  model.safetensors" in shown
    assert "metrics.csv" not in shown
    assert shown.endswith("https://huggingface.co/me/captioner: uploaded\n")


def test_a_dry_run_uploads_nothing(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["push", str(run), "me/captioner", "--dry_run"])
    assert hub.calls == []
    shown = capsys.readouterr().out
    assert "-> me/captioner: 2 files, 3.00 MB" in shown
    assert shown.endswith("Nothing was uploaded.\n")


def test_without_a_token_it_is_said_how_to_log_in(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    main(["push", str(run), "me/captioner"])
    assert hub.calls == []
    assert "hf auth login" in capsys.readouterr().out


def test_a_private_repo_is_made_and_a_public_one_is_not_taken_for_it(hub: Hub, run: Path) -> None:
    with pytest.raises(SystemExit, match="there already, and public"):
        main(["push", str(run), "me/captioner", "--private"])
    hub.private = True
    main(["push", str(run), "me/captioner", "--private"])
    assert [name for name, _ in hub.calls] == ["create_repo", "create_repo", "upload_folder"]
    assert hub.calls[0][1]["private"] is True


def test_a_run_without_an_export_is_refused_with_the_way_out(hub: Hub, run: Path) -> None:
    (run / "export/model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"there is no export.*--ckpt_path last"):
        main(["push", str(run), "me/captioner"])
    assert hub.calls == []


def test_a_name_that_is_none_is_refused(hub: Hub, run: Path) -> None:
    with pytest.raises(SystemExit, match="is no name of a repo, such as owner/name"):
        main(["push", str(run), "me/my captioner"])
    assert hub.calls == []


@pytest.mark.parametrize("error", [OSError("disk"), HTTPError("no way to hf_planted0123456789")])
def test_an_upload_that_fails_is_one_message_without_the_token(hub: Hub, run: Path, error: Exception) -> None:
    hub.error = error
    with pytest.raises(SystemExit, match="Error: me/captioner: the upload failed: ") as failed:
        main(["push", str(run), "me/captioner"])
    assert "hf_planted" not in str(failed.value)


def test_an_adapter_for_a_folder_of_this_machine_is_pointed_out(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"base_model_name_or_path": str(run)}
    (run / "export/adapter_config.json").write_text(json.dumps(config))
    (run / "export/README.md").unlink()
    main(["push", str(run), "me/captioner", "--dry_run"])
    shown = capsys.readouterr().out
    assert f"the adapter is for {run}, a folder of this machine" in shown
    assert "it has no model card" in shown
