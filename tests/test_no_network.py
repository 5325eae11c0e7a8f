"""The suite runs without a network, and says so of whoever asks for one; no command asks unless the user did."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from vitreous.commands.cli import main

ELSEWHERE = "192.0.2.1"  # set aside for documentation: nobody has it
ATTEMPTS = {
    f"{ELSEWHERE}:80": f"socket.create_connection(('{ELSEWHERE}', 80), timeout=1)",
    f"{ELSEWHERE}:53": f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('{ELSEWHERE}', 53))",
    "2001:db8::1:80": "socket.socket(socket.AF_INET6).connect(('2001:db8::1', 80))",
    "example.org": "socket.getaddrinfo('example.org', 443)",
    "example.com": "socket.gethostbyname('example.com')",
}


@pytest.mark.parametrize("place", ATTEMPTS)
def test_a_connection_is_stopped_and_named(place, connections):
    with pytest.raises(OSError, match="No network in tests"):
        exec(ATTEMPTS[place], {"socket": socket})
    (found,) = connections()
    assert found["to"] == place
    assert "test_no_network.py" in found["at"]


@pytest.mark.parametrize("place", ATTEMPTS)
def test_processes_that_a_test_starts_are_stopped_as_well(place, connections):
    """Though they swallow the error, and whatever they were started with."""
    text = f"import socket\ntry:\n    {ATTEMPTS[place]}\nexcept OSError:\n    print('stopped')\n"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "stopped\n"
    (found,) = connections()
    assert found["to"] == place
    assert text.splitlines()[0] in found["by"]


def test_a_fork_is_stopped_as_well(connections):
    child = os.fork()
    if not child:
        try:
            urllib.request.urlopen("http://example.org", timeout=1)
        except urllib.error.URLError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert [found["to"] for found in connections()] == ["example.org"]


def test_a_test_that_asks_fails(pytestconfig, tmp_path):
    """The fixture in a session of its own: an attempt that was swallowed fails its test, and that alone."""
    for name in ("conftest.py", "no_network/sitecustomize.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(pytestconfig.rootpath / "tests" / name, tmp_path / name)
    (tmp_path / "test_it.py").write_text(
        "import contextlib, socket\n\n\ndef test_asks():\n    with contextlib.suppress(OSError):\n"
        f"        {ATTEMPTS['example.org']}\n\n\ndef test_asks_nobody():\n    socket.getaddrinfo('localhost', 80)\n"
    )
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # without the guard of this session
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=bare, check=False)
    assert "2 passed, 1 error" in done.stdout  # the error is at the end of the first
    assert "connection to example.org by " in done.stdout
    assert "in test_asks\n" in done.stdout


def test_this_machine_can_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
    a, b = socket.socketpair()
    a.close()
    b.close()
    assert socket.getaddrinfo("localhost", 80)


def test_the_browser_reaches_no_other_machine(browser):
    from playwright.sync_api import Error

    page = browser.new_page()
    for address in (f"http://{ELSEWHERE}/", "https://example.org/"):
        with pytest.raises(Error, match="ERR_PROXY_CONNECTION_FAILED"):
            page.goto(address)
    page.close()


@pytest.mark.parametrize(
    "words",
    [
        "list",
        "list svda",
        "train cutouts:train=16,test=8,size=16 --model test_vit --epochs 1 --graft svda --out run",
        "train cutouts:train=16,test=8,size=16 --model vit_tiny_patch16_224 --model-kwargs depth=1 embed_dim=24 patch_size=4 "
        "--epochs 1 --out run",
        "look test_vit --random-weights photo.png --out reading",
        "data check photos",
    ],
)
def test_commands_ask_nobody(words, tmp_path, monkeypatch, capsys):
    """The fixture of all tests is what checks; here it does so for networks that have published weights."""
    from data import made

    monkeypatch.chdir(tmp_path)
    made.write(tmp_path, {"photo.png": made.picture(1, (64, 64))} | {f"photos/{n}": raw for n, raw in made.tree().items()})
    assert main(words.split()) == 0


def test_weights_are_asked_for_when_the_user_does_and_not_before(tmp_path, monkeypatch, capsys, connections):
    """And what follows is one message. The client's waits between attempts are left out here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert main(["train", "cutouts", "--model", "test_vit", "--pretrained", "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert "timm's weights of test_vit cannot be had" in said
    assert "Traceback" not in said
    assert {found["to"] for found in connections()} == {"huggingface.co"}
    assert not (tmp_path / "run").exists()
