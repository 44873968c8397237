"""Keys come from the environment and stay there: what settings may hold, and what a whole run leaves behind."""

from __future__ import annotations

import base64
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from balcap.judge import Judge, JudgeFailure, TaskModel
from balcap.judge.client import Deployment
from balcap.judge.errors import JudgeUnavailable
from balcap.utils.redact import keep_secret, redact, resolve, secret_problems
from examples.shapes.oracle import answer
from tests.judge_questions import rate
from tests.judge_server import JudgeServer

# Of no known shape, and with characters that URLs, JSON and base64 write in other ways.
KEY = 'pl4nted/Key+with="odd"&chars~0123456789'
OTHER = "another\\planted.key-9876543210"

# ---- settings


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("MY_JUDGE_KEY", OTHER)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0, "max_tokens": 4096, "reasoning_effort": "low", "seed": 1},
        {"max_completion_tokens": 100, "thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"api_base": "http://localhost:8000/v1", "extra_headers": {"X-Title": "BalCapRL"}},
        {"extra_body": {"stop_token_ids": [1, 2], "skip_special_tokens": False, "eos_token": "</s>"}},
        {"prompt_cache_key": "balcap", "logit_bias": {"50256": -100}, "api_version": "2026-01-01"},
        {"api_base": "https://me.openai.azure.com/?api-version=2026-01-01"},
        {"api_key": "os.environ/MY_JUDGE_KEY"},
        {
            "extra_headers": {
                "Authorization": "Bearer os.environ/MY_JUDGE_KEY",
                "X-Org": "os.environ/OPENAI_API_KEY",
            }
        },
        {"api_key": None, "use_auth": True, "token": ""},
        {},
    ],
)
def test_settings_without_secrets(planted: None, settings: dict[str, Any]) -> None:
    assert secret_problems(settings, "model.judge.params") == []


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"api_key": "anything"}, "api_key"),
        ({"api_key": "none"}, "api_key"),
        ({"apiKey": "anything"}, "apiKey"),
        ({"aws_secret_access_key": "anything"}, "aws_secret_access_key"),
        ({"aws_session_token": "anything"}, "aws_session_token"),
        ({"password": 12345678}, "password"),
        ({"vertex_credentials": "{}"}, "vertex_credentials"),
        ({"extra_headers": {"Authorization": "anything"}}, "extra_headers.Authorization"),
        ({"extra_headers": {"x-api-key": "anything"}}, "extra_headers.x-api-key"),
        (
            {"default_headers": {"Ocp-Apim-Subscription-Key": "a"}},
            "default_headers.Ocp-Apim-Subscription-Key",
        ),
        ({"extra_headers": {"Cookie": "session=1"}}, "extra_headers.Cookie"),
        ({"extra_body": {"auth": {"user": "me"}}}, "extra_body.auth.user"),
        ({"extra_body": {"tools": [{"name": "x", "token": "anything"}]}}, "extra_body.tools.token"),
        ({"extra_body": {"api_keys": ["a", "b"]}}, "extra_body.api_keys"),
        ({"api_base": "https://me:word@host/v1"}, "api_base"),
        ({"api_base": "https://me@host/v1"}, "api_base"),
        ({"api_base": "https://host/v1?key=abc"}, "api_base"),
        ({"base_url": "https://host/v1?a=1&access_token=abc"}, "base_url"),
        ({"extra_body": {"note": "sk-abcdefgh12345678"}}, "extra_body.note"),
        ({"extra_headers": {"X-Me": "Bearer abcdefgh"}}, "extra_headers.X-Me"),
        ({"user": "AKIAABCDEFGHIJKLMNOP"}, "user"),
        ({"user": "hf_abcdefghijklmn"}, "user"),
        ({"user": KEY}, "user"),
        ({"extra_headers": {"X-Me": f"me/{OTHER}"}}, "extra_headers.X-Me"),
        ({"api_key": "os.environ/MY_JUDGE_KEY and more"}, "api_key"),
    ],
)
def test_every_place_for_a_secret_is_found(planted: None, settings: dict[str, Any], where: str) -> None:
    (problem,) = secret_problems(settings, "model.judge.params")
    assert problem.startswith(f"model.judge.params.{where}: keys come from the environment")
    assert "os.environ/<NAME>" in problem
    assert not [
        text for text in (KEY, OTHER, "anything", "word", "abc") if text in problem.partition(": ")[2]
    ]


def test_several_secrets_are_reported_together_and_once(planted: None) -> None:
    settings = [{"params": {"api_key": "a", "extra_headers": {"token": "b"}}}, {"params": {"api_key": "c"}}]
    assert len(secret_problems(settings, "model.judge.deployments")) == 2


def test_places_in_the_environment_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYCLOAK_URL", "http://localhost:8000")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/user/1000/ssh")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    settings = {"api_base": "http://localhost:8000/v1", "user": "/run/user/1000/ssh", "strict": "false"}
    assert secret_problems(settings, "p") == []


def test_a_variable_that_is_missing_is_named() -> None:
    assert secret_problems({"api_key": "os.environ/NOT_THERE"}, "p") == [
        "p.api_key: needs NOT_THERE in the environment"
    ]
    with pytest.raises(LookupError, match="NOT_THERE"):
        resolve({"api_key": "os.environ/NOT_THERE"})


def test_references_are_resolved_to_any_depth_in_a_copy(planted: None) -> None:
    settings = {
        "api_key": "os.environ/MY_JUDGE_KEY",
        "temperature": 0,
        "extra_headers": {"Authorization": "Bearer os.environ/OPENAI_API_KEY"},
        "list": ["os.environ/MY_JUDGE_KEY", 1, None],
    }
    before = json.dumps(settings)
    assert resolve(settings) == {
        "api_key": OTHER,
        "temperature": 0,
        "extra_headers": {"Authorization": f"Bearer {KEY}"},
        "list": [OTHER, 1, None],
    }
    assert json.dumps(settings) == before


# ---- texts


def written(secret: str) -> dict[str, str]:
    """The ways in which a secret may stand in a text; base64 without what its neighbours share in."""
    ways = {
        "plain": secret,
        "json": json.dumps(secret)[1:-1],
        "url": quote(secret, safe=""),
        "url path": quote(secret),
        "form": quote_plus(secret),
        "url, lower case": re.sub("%..", lambda code: code.group().lower(), quote(secret, safe="")),
        "repr": repr(secret)[1:-1],
    }
    for user in ("", "u", "me", "abc"):
        encoded = base64.b64encode(f"{user}:{secret}:".encode()).decode()
        shared = -(-len(f"{user}:") * 8 // 6)
        core = encoded[shared : (len(f"{user}:{secret}".encode()) * 8) // 6]
        ways |= {f"base64 after {user!r}": core, f"url-safe after {user!r}": core.translate(URL_SAFE)}
    return ways


URL_SAFE = str.maketrans("+/", "-_")


@pytest.mark.parametrize("way", written(KEY))
@pytest.mark.parametrize("secret", [KEY, "schlüssel-мой-鍵"])
def test_secrets_of_the_environment_leave_texts_in_every_way_of_writing(
    monkeypatch: pytest.MonkeyPatch, secret: str, way: str
) -> None:
    monkeypatch.setenv("SOME_PROVIDER_API_KEY", secret)
    hidden = written(secret)[way]
    kept = redact(f"went wrong with ({hidden}), said the host")
    assert hidden not in kept
    assert secret not in kept
    assert kept.startswith("went wrong with (***")
    assert kept.endswith("), said the host")


def test_a_basic_header_is_hidden(planted: None) -> None:
    header = "Basic " + base64.b64encode(f"someone:{KEY}".encode()).decode()
    assert "***" in redact(f"sent {{'authorization': '{header}'}} to host")
    assert header[20:60] not in redact(f"sent {header} to host")


def test_one_secret_inside_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "abcdefgh")
    monkeypatch.setenv("B_KEY", "abcdefgh-and-more")
    assert redact("x abcdefgh-and-more y abcdefgh z") == "x *** y *** z"


def test_what_a_setting_refers_to_is_secret_by_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_DOOR", "open sesame\n now")
    monkeypatch.setenv("ACME_PIN", "1234567")
    assert "sesame" in redact("said open sesame\n now")
    resolve({"extra_headers": {"X-Login": "os.environ/ACME_DOOR"}})
    keep_secret(["ACME_PIN"])
    assert redact("said open sesame\n now, and 1234567.") == "said ***, and ***."


@pytest.mark.parametrize(
    "text",
    [
        "sk-abcdefgh1234", "sk-proj-ab*****yz", "Bearer xyz.abc", "bearer 0123456789", "AIzaSyA1234567890",
        "AKIAABCDEFGHIJKLMNOP", "hf_abcdefghijkl", "ghp_abcdefghijkl", "gsk_abcdefghijkl", "xai-abcdefghijkl",
        "https://me:word@host/", "https://host/v1?key=abc", "https://host/v1?a=1&api_key=abc", "x-api-key: abc",
        "{'Authorization': 'Basic bWU6d29yZA=='}", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc",
        "-----BEGIN RSA PRIVATE KEY----- abc -----END RSA PRIVATE KEY-----",
    ],
)  # fmt: skip
def test_shapes_of_keys_leave_texts(text: str) -> None:
    kept = redact(f"before {text} after")
    assert "***" in kept
    assert not [
        secret for secret in ("abc", "xyz", "word", "0123", "SyA", "bWU6", "ABCDEF") if secret in kept
    ]
    assert kept.startswith("before ")
    assert kept.endswith("after")


@pytest.mark.parametrize(
    "text",
    ["a desk-lamp and a task-force", "monkey business", "https://host/v1?page=2", "HTTP 429: slow down"],
)
def test_ordinary_texts_stay(text: str) -> None:
    assert redact(text) == text


@given(st.text(max_size=500))
def test_texts_are_one_short_line(text: str) -> None:
    kept = redact(text)
    assert len(kept) <= 300
    assert kept == " ".join(kept.split())


def test_a_whole_request_in_an_error_is_cut(planted: None) -> None:
    kept = redact(f"{KEY} {'x' * 10_000_000} {KEY}")
    assert kept.startswith("*** xxx")
    assert len(kept) == 300


def test_what_is_kept_can_be_written() -> None:
    assert redact("half of a \ud800 character").encode() == b"half of a ? character"


# ---- a whole run


def every_byte(folder: Path) -> Iterator[tuple[str, bytes]]:
    """All files below `folder`, what is packed inside them included."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path), path.read_bytes()
        if path.suffix == ".parquet":
            yield f"{path} (unpacked)", json.dumps(pq.read_table(path).to_pylist(), default=str).encode()
        if path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as packed:
                yield from ((f"{path}/{name}", packed.read(name)) for name in packed.namelist())


def assert_nowhere(folder: Path, *texts: str) -> set[str]:
    """No secret in any file or text; returns the names of the files."""
    hidden = {form.encode() for key in (KEY, OTHER) for form in written(key).values()}
    hidden |= {key.encode(utf) for key in (KEY, OTHER) for utf in ("utf-16-le", "utf-16-be")}
    hidden |= {key.encode().hex().encode() for key in (KEY, OTHER)}
    contents = dict(every_byte(folder)) | {f"text {i}": text.encode() for i, text in enumerate(texts)}
    assert [name for name, content in contents.items() for form in hidden if form in content] == []
    return {Path(name).name for name in contents}


@pytest.fixture
def judge_of_two_keys(planted: None, tmp_path: Path) -> Iterator[tuple[JudgeServer, list[str]]]:
    """A server whose errors quote the key, and arguments that make a fit ask it under two keys."""
    server = JudgeServer(answer, fault_share=0.3, faults=("400", "401", "429", "500", "503", "quota"))
    overlay = tmp_path / "judge.yaml"
    there = {"api_base": server.url, "api_key": "os.environ/OPENAI_API_KEY"}
    own = {"api_base": server.url, "api_key": "os.environ/MY_JUDGE_KEY"}
    judge = {
        "model": "openai/gpt-4o-mini",
        "providers": None,
        "params": there,
        "per_task": {"rate": {"model": "openai/gpt-4o-mini", "params": own}},
        "retries": 0,
        "max_failed_share": 1.0,
    }
    overlay.write_text(yaml.safe_dump({"model": {"judge": judge}}))
    yield server, ["--config", str(overlay)]
    server.close()


def test_keys_are_in_no_file_of_a_run_and_in_no_output(
    fit_arguments: Callable[..., list[str]],
    cli: Callable[[list[str]], None],
    judge_of_two_keys: tuple[JudgeServer, list[str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, overlay = judge_of_two_keys
    args = fit_arguments(**{"trainer.max_steps": 2, "model.num_captions": 4, "report.enabled": True})
    with caplog.at_level(logging.DEBUG):
        cli([*args[:3], *overlay, *args[3:]])
    assert {key for key in server.keys if key} == {f"Bearer {KEY}", f"Bearer {OTHER}"}
    assert sum(record["fault"] is not None for record in server.records) >= 5
    output = capfd.readouterr()
    assert (
        "went wrong with" in caplog.text + output.err + output.out
    )  # the errors are quoted, without the key
    files = assert_nowhere(tmp_path, caplog.text, output.out, output.err)
    suffixes = {Path(name).suffix for name in files}
    assert {".ckpt", ".yaml", ".csv", ".parquet", ".sqlite"} <= suffixes
    assert any("tfevents" in name for name in files)
    assert {"judge_ledger.sqlite", "report.html", "README.md"} <= files


def test_keys_are_not_in_the_message_of_a_run_that_stops(
    fit_arguments: Callable[..., list[str]],
    cli: Callable[[list[str]], None],
    judge_of_two_keys: tuple[JudgeServer, list[str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, overlay = judge_of_two_keys
    server.always = "401"
    args = fit_arguments(**{"model.judge.max_failed_share": 0.5, "trainer.max_steps": 50})
    with caplog.at_level(logging.DEBUG), pytest.raises((JudgeUnavailable, SystemExit)) as stopped:
        cli([*args[:3], *overlay, *args[3:]])
    chain: list[BaseException] = [stopped.value]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    said = " ".join(f"{error} {error!r} {error.args}" for error in chain)
    output = capfd.readouterr()
    assert "went wrong with" in said + output.err + output.out
    assert_nowhere(tmp_path, said, caplog.text, output.out, output.err)


def test_a_header_by_reference_reaches_the_provider_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACME_LOGIN", OTHER)  # a name that speaks of no secret
    server = JudgeServer()
    server.script = ["400", None]
    headers = {"Authorization": "Bearer os.environ/ACME_LOGIN"}
    files = {"cache": str(tmp_path / "cache.sqlite"), "ledger": str(tmp_path / "ledger.sqlite")}
    judge = Judge("openai/gpt-4o-mini", params={"api_base": server.url, "extra_headers": headers}, **files)
    try:
        assert judge.problems() == []
        with pytest.raises(JudgeFailure, match="went wrong") as failure:
            judge.run(rate(judge, "A cat."))
        assert judge.run(rate(judge, "A cat.")).clarity == 1.0
    finally:
        judge.close()
        server.close()
    assert server.keys == [f"Bearer {OTHER}"] * 2
    assert_nowhere(tmp_path, str(failure.value), repr(judge.__dict__))


def test_a_judge_names_its_secrets_before_it_is_asked(planted: None, tmp_path: Path) -> None:
    judge = Judge(
        "openai/gpt-4o-mini",
        deployments=[Deployment("openai/gpt-4o-mini", {"extra_headers": {"x-api-key": "a"}})],
        fallbacks=[TaskModel("openai/gpt-5-mini", {"api_base": f"https://host/v1?key={KEY}"})],
        per_task={"rate": TaskModel(params={"extra_body": {"auth": {"token": OTHER}}})},
        params={"default_headers": {"Authorization": "Bearer b"}},
        cache=None,
    )
    places = [
        "params.default_headers.Authorization", "deployments[0].params.extra_headers.x-api-key",
        "fallbacks[0].params.api_base", "per_task.rate.params.extra_body.auth.token",
    ]  # fmt: skip
    problems = [problem for problem in judge.problems() if "keys come from the environment" in problem]
    assert [problem.partition(": ")[0] for problem in problems] == [
        f"model.judge.{place}" for place in places
    ]
    assert not [secret for secret in (KEY, OTHER) if secret in str(judge.problems())]
