"""The validation server as an agent meets it: over HTTP, from another process, never a score."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from agent_tools.errors import UserError
from agent_tools.mle_bench import grade_process, validation_server
from agent_tools.mle_bench.folders import registry_of
from tests.agent_tools.mle_layout import GRADE, Checkout, command, make_checkout

ID = "some-competition"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    monkeypatch.delenv("SELFEVO_MLEBENCH", raising=False)
    return make_checkout(tmp_path).add(ID)


def client(checkout: Checkout) -> TestClient:
    competition = registry_of(checkout=checkout.root, data_dir=checkout.data).get(ID)
    return TestClient(validation_server.make_app(competition))


def post(server: TestClient, data: bytes, name: str = "submission.csv") -> str:
    reply = server.post("/validate", files={"file": (name, data)})
    assert reply.status_code == 200 and set(reply.json()) == {"result"}
    return str(reply.json()["result"])


def test_valid_invalid_and_health(checkout: Checkout) -> None:
    server = client(checkout)
    assert server.get("/health").json() == {"status": "running"}
    assert post(server, b"id,y\n1,3.25\n2,3.25\n") == "Submission is valid."
    assert post(server, b"id,y\n1,3.25\n2,3.25\n", "any.name") == "Submission is valid."
    message = post(server, b"id,z\n1,1\n")
    assert message.startswith("Submission invalid!") and "must have a column y" in message
    assert "as many rows" in post(server, b"id,y\n1,1\n")
    assert "must have a column y" in post(server, b"")
    assert "is not a CSV file" in post(server, b'id,y\n1,"\n')


def test_no_reply_holds_a_score(checkout: Checkout) -> None:
    """Valid submissions of any worth get the same bytes, and the process is not told either."""
    server = client(checkout)
    replies = {
        server.post("/validate", files={"file": f"id,y\n1,{s}\n2,{s}\n"}).content
        for s in (0, 1.5, 77, "nan")
    }
    assert replies == {b'{"result":"Submission is valid."}'}
    spec = registry_of(checkout=checkout.root, data_dir=checkout.data).get(ID).spec
    path = checkout.submission(checkout.root / "s.csv", 12.5)
    assert grade_process.score_submission(spec, path, tell_score=False).score == 0.0
    assert grade_process.score_submission(spec, path).score == 12.5


@pytest.mark.parametrize(
    "data",
    [
        b"id,y\r\n1,1\r\n2,1\r\n",
        b"id,y\n1,1\n2,1",
        b'id,y,text\n1,1,"--not\r\n--the boundary"\n2,1,b\n',
        b"id,y\n1,1\n2,1\n\r\n\r\n",
    ],
)
def test_the_file_arrives_to_the_byte(checkout: Checkout, tmp_path: Path, data: bytes) -> None:
    echo = "def grade(submission, answers):\n    return 1\n"
    (checkout.folder(ID) / "grade.py").write_text(echo)
    request = httpx.Request(
        "POST", "http://x", files={"other": b"x", "file": ("s.csv", data), "last": b"y"}
    )
    with (tmp_path / "form").open("w+b") as form:
        form.write(request.read())
        form.flush()
        kind = request.headers["content-type"]
        assert validation_server.extract_file(form, kind, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == data
    assert post(client(checkout), data) == "Submission is valid."


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data; boundary=b"),
        (b"id,y\n", "text/csv"),
        (b"--b\r\nno end of the header", "multipart/form-data; boundary=b"),
        (b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx', "x; boundary=b"),
        (b'--b\r\nContent-Disposition: form-data; name="f"\r\n\r\nx\r\n--b--', "x; boundary=b"),
        (b"\xff" * 100, "multipart/form-data; boundary="),
    ],
)
def test_a_form_without_the_field_is_a_bad_request(
    checkout: Checkout, body: bytes, kind: str
) -> None:
    reply = client(checkout).post("/validate", content=body, headers={"content-type": kind})
    assert reply.status_code == 400 and "`file`" in reply.json()["details"]


def test_a_file_that_is_too_large_is_refused_while_it_arrives(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation_server, "SIZE_FREE", 1000)
    server = client(checkout)
    assert "more than" in post(server, b"id,y\n" + b"1,1\n" * 50_000)
    assert post(server, b"id,y\n1,1\n2,1\n") == "Submission is valid."


def test_a_grader_that_cannot_be_loaded_is_a_server_error_without_its_text(
    checkout: Checkout,
) -> None:
    (checkout.folder(ID) / "grade.py").write_text("import a_secret_package\n" + GRADE)
    reply = client(checkout).post("/validate", files={"file": b"id,y\n"})
    assert reply.status_code == 500 and reply.json()["error"] == "An unexpected error occurred."
    assert "secret" not in reply.text


def test_an_unprepared_competition_is_not_served(checkout: Checkout) -> None:
    checkout.add("not-prepared", answers=None)
    competition = registry_of(checkout=checkout.root, data_dir=checkout.data).get("not-prepared")
    with pytest.raises(UserError, match="not prepared"):
        validation_server.make_app(competition)


@pytest.fixture
def address(checkout: Checkout) -> Iterator[str]:
    argv = [
        *(sys.executable, "-c", "from agent_tools.mle_bench.cli_compat import app; app()"),
        *("serve-validation", ID, "--port", "0"),
        *("--checkout", str(checkout.root), "--data-dir", str(checkout.data)),
    ]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    try:
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_the_command_serves_on_loopback(address: str, checkout: Checkout) -> None:
    assert address.startswith("http://127.0.0.1:")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            assert httpx.get(f"{address}/health", timeout=5).json() == {"status": "running"}
            break
        except httpx.TransportError:
            time.sleep(0.1)
    files = {"file": b"id,y\n1,1\n2,1\n"}
    reply = httpx.post(f"{address}/validate", files=files, timeout=60)
    assert reply.json() == {"result": "Submission is valid."}
    port = address.rpartition(":")[2]
    done = command(
        "serve-validation", ID, "--port", port,
        "--checkout", checkout.root, "--data-dir", checkout.data,
    )  # fmt: skip
    assert done.returncode == 2 and "--port" in done.stderr and done.stderr.count("\n") == 1
