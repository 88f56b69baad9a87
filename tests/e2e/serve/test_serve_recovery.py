"""A served model whose workers die, hang and come back: every answer is the whole model's, or ends with a reason."""

import concurrent.futures
import json
import signal
import threading

import httpx
import pytest
from real_processes import eventually, port_of, processes_in, write_registry
from tiny_models import greedy_answer
from transformers import AutoTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

NUM_TOKENS = 350
QUESTIONS = ("Why is the sky blue?", "Who was here first, and why?", "x")
SAMPLED = {
    "temperature": 0.8, "seed": 11, "frequency_penalty": 0.4, "n": 2, "logit_bias": {"70": 1.5}, "max_tokens": 150,
    "ignore_eos": True,
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "pattern": "^[a-z]{200}$"}, "known": {"type": "boolean"}},
    "required": ["word", "known"],
    "additionalProperties": False,
}
IN_JSON = {
    "temperature": 0.8, "seed": 5, "max_tokens": 400,
    "response_format": {"type": "json_schema", "json_schema": {"name": "word", "strict": True, "schema": SCHEMA}},
}  # fmt: skip
IN_LETTERS = {"temperature": 0.8, "seed": 7, "max_tokens": 300, "structured_outputs": {"regex": "[a-z]{300}"}}


def text_of(answer):
    """The first choice's tokens as text."""
    choices, _ = answer
    return b"".join(token for token, _ in choices[0]).decode()


def late_stop(text):
    """A stop string that comes up in this text after 150 characters at the earliest."""
    return next(text[at : at + 3] for at in range(150, len(text)) if text.index(text[at : at + 3]) == at)


class Cluster:
    """A server and its registered workers, which can be killed and started again on their ports."""

    def __init__(self, processes, serve_in, tiny, ids, count, *options):
        self.processes, self.tiny, self.ids = processes, tiny, ids
        self.cache = processes.folder / "worker-cache"
        pairs = processes.workers(count, "--cache-dir", self.cache)
        self.workers = {f"worker{n}": worker for n, (worker, _) in enumerate(pairs, start=1)}
        self.ports = {f"worker{n}": port for n, (_, port) in enumerate(pairs, start=1)}
        registry = write_registry(processes.folder / "workers.json", list(self.ports.values()))
        self.server = serve_in(processes, "--registry", registry, *options, local_workers=0)
        self.url = self.server.url

    def state(self):
        return httpx.get(f"{self.url}/api/state", timeout=30).raise_for_status().json()

    def stages(self):
        """The workers of the pipeline, in order."""
        placed = [worker for worker in self.state()["workers"] if worker["stage_index"] is not None]
        return [worker["worker_id"] for worker in sorted(placed, key=lambda worker: worker["stage_index"])]

    def status(self, worker):
        return next(each["status"] for each in self.state()["workers"] if each["worker_id"] == worker)

    def start_again(self, name):
        """A new process on the old port, registered under the old name."""
        self.workers[name], _ = self.processes.worker("--cache-dir", self.cache, port=self.ports[name])
        assert port_of(self.workers[name]) == self.ports[name]

    def is_ready(self):
        return httpx.get(f"{self.url}/ready", timeout=30).status_code == 200

    def chat(self, question, on_token=lambda: None, **fields):
        """The streamed token ids of each choice, and the reasons of their ends; an error event is raised."""
        messages = [{"role": "user", "content": question}]
        body = {"model": self.tiny.folder.name, "messages": messages, "stream": True, "logprobs": True, **fields}
        choices, reasons = {}, {}
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=90) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                for choice in event["choices"]:
                    for token in (choice.get("logprobs") or {}).get("content") or ():
                        choices.setdefault(choice["index"], []).append((bytes(token["bytes"]), token["logprob"]))
                        on_token()
                    if choice["finish_reason"]:
                        reasons[choice["index"]] = choice["finish_reason"]
        return choices, reasons

    def greedy(self, question, on_token=lambda: None):
        choices, reasons = self.chat(question, on_token, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        assert reasons == {0: "length"}
        return [self.ids[token] for token, _ in choices[0]]

    def expected(self, question):
        tokenizer = AutoTokenizer.from_pretrained(self.tiny.folder)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        return greedy_answer(self.tiny.model, prompt, NUM_TOKENS)

    def prepare(self):
        """Find out what the requests that `answers_while` sends are answered when nothing disturbs them."""
        self.whole = [self.expected(question) for question in QUESTIONS]
        stop = late_stop(text_of(self.chat(QUESTIONS[0], **IN_LETTERS)))
        self.others = (SAMPLED, IN_JSON, {**IN_LETTERS, "stop": stop})
        self.undisturbed = [self.chat(QUESTIONS[0], **fields) for fields in self.others]
        _, in_json, stopped = self.undisturbed
        assert set(json.loads(text_of(in_json))) == {"word", "known"}
        assert [reasons for _, reasons in (in_json, stopped)] == [{0: "stop"}] * 2
        assert 150 <= len(text_of(stopped)) < 300

    def answers_while(self, disturb):
        """All questions at once, and others that are sampled, follow a grammar or end at a stop string.

        `disturb` is called when each of them has given tokens.
        """
        barrier = threading.Barrier(len(QUESTIONS) + len(self.others) + 1)

        def meeting():
            left = [20]

            def on_token():
                left[0] -= 1
                if left[0] == 0:
                    barrier.wait(60)

            return on_token

        with concurrent.futures.ThreadPoolExecutor(barrier.parties) as pool:
            greedy = [pool.submit(self.greedy, question, meeting()) for question in QUESTIONS]
            others = [pool.submit(self.chat, QUESTIONS[0], meeting(), **fields) for fields in self.others]
            barrier.wait(60)
            num_choices = len(greedy) + sum(fields.get("n", 1) for fields in self.others)
            assert self.state()["snapshot"]["num_running"] == num_choices, "somebody has all its tokens already"
            disturb()
            return [each.result() for each in greedy], [each.result() for each in others]


@pytest.fixture(scope="module")
def three(tmp_path_factory, serve_in, tiny, byte_ids):
    with processes_in(tmp_path_factory.mktemp("three")) as processes:
        cluster = Cluster(processes, serve_in, tiny, byte_ids, 3, "--heartbeat-timeout", 3)
        cluster.prepare()
        yield cluster


def check_same(answers, expected):
    """Token by token, with their probabilities and the reasons of the ends."""
    for (choices, reasons), (others, other_reasons) in zip(answers, expected, strict=True):
        assert reasons == other_reasons
        for index, tokens in choices.items():
            assert [token for token, _ in tokens] == [token for token, _ in others[index]]
            assert [score for _, score in tokens] == pytest.approx([score for _, score in others[index]], abs=1e-4)


@pytest.mark.parametrize("place", [1, 0, -1], ids=["middle", "first", "last"])
def test_answers_go_on_when_a_worker_is_killed(three, place):
    """Of three stages the middle one, then the first and the last of the two that are left and a spare."""
    epoch = three.state()["snapshot"]["epoch"]
    victim = three.stages()[place]
    answers, others = three.answers_while(lambda: three.workers[victim].send(signal.SIGKILL))
    assert answers == three.whole
    check_same(others, three.undisturbed)
    after = three.state()
    assert after["snapshot"]["epoch"] > epoch
    assert victim not in three.stages()
    assert three.status(victim) == "lost"
    assert three.is_ready()
    three.start_again(victim)
    assert eventually(lambda: three.status(victim) == "joining")
    assert three.is_ready()
    figures = three.server.metrics()
    assert figures["recoveries_total"] >= 1
    assert figures["recovery_seconds_total"] > 0
    assert figures["recomputed_tokens_total"] >= 80
    assert figures["pipeline_epoch"] == after["snapshot"]["epoch"]


def test_answers_go_on_when_a_worker_hangs_and_it_is_a_spare_when_it_goes_on(three):
    victim = three.stages()[-1]
    answers, others = three.answers_while(lambda: three.workers[victim].send(signal.SIGSTOP))
    assert answers == three.whole
    check_same(others, three.undisturbed)
    assert three.status(victim) == "lost"
    three.workers[victim].send(signal.SIGCONT)
    assert eventually(lambda: three.status(victim) == "joining")
    assert three.greedy(QUESTIONS[0]) == three.whole[0]


def test_requests_that_come_while_the_pipeline_is_placed_anew_wait_and_are_answered(three):
    victim = three.stages()[0]
    three.workers[victim].send(signal.SIGKILL)
    assert eventually(lambda: not three.is_ready())
    assert httpx.get(f"{three.url}/health").status_code == 200
    assert three.greedy(QUESTIONS[0]) == three.whole[0]
    three.start_again(victim)
    assert eventually(lambda: three.status(victim) == "joining")


def test_without_enough_workers_requests_end_with_the_reason_until_one_is_back(processes, serve_in, tiny, byte_ids):
    """Both workers die: the open request gets an error that names one, new ones 503; one that is back is enough."""
    cluster = Cluster(processes, serve_in, tiny, byte_ids, 2)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        started = threading.Event()
        answer = pool.submit(cluster.chat, "x", started.set, temperature=0, max_tokens=30000, ignore_eos=True)
        assert started.wait(60)
        for worker in cluster.workers.values():
            worker.send(signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"worker.*worker\d"):
            answer.result(60)
    refused = httpx.post(
        f"{cluster.url}/v1/completions", json={"model": tiny.folder.name, "prompt": "x", "max_tokens": 2}
    )
    assert refused.status_code == 503
    assert "worker" in refused.json()["error"]["message"]
    assert not cluster.is_ready()
    assert httpx.get(f"{cluster.url}/health").status_code == 200
    cluster.start_again("worker2")
    assert eventually(cluster.is_ready, timeout_s=40)
    assert cluster.stages() == ["worker2"]
    assert cluster.greedy(QUESTIONS[2]) == cluster.expected(QUESTIONS[2])
    cluster.server.run.send(signal.SIGTERM)
    assert cluster.server.run.wait() == 0


def test_a_dead_local_worker_is_started_again_and_the_model_with_it(serve):
    """The only worker: nobody is left, and nobody but the server can start another."""
    server = serve(local_workers=1)
    assert server.url
    [first] = server.run.descendants()
    first.kill()
    assert eventually(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
    assert eventually(lambda: httpx.get(f"{server.url}/ready").status_code == 200, timeout_s=60)
    [second] = server.run.descendants()
    assert second.pid != first.pid
    server.run.send(signal.SIGTERM)
    assert server.run.wait() == 0
    assert eventually(lambda: server.run.descendants() == [])
