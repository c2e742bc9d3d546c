"""The interface of OpenAI's clients: with their own package, with curl, and against `Learner.generate`."""

from __future__ import annotations

import json
import math
import shutil
import subprocess

import pytest
import torch

from nested_learning.continual import stack_levels
from tests.server.serving import LEVELS, client_of, make_mind, served, text_of, tiny_llama

openai = pytest.importorskip("openai")

HELLO = [{"role": "user", "content": "hello there"}]
PROMPT = "User: hello there\nAssistant:"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with served(tmp_path_factory.mktemp("memories"), make_mind(), learn="none") as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def learner():
    model, tokenizer = tiny_llama()
    return stack_levels(model, tokenizer, levels=LEVELS)


def ask(client, **options):
    return client.chat.completions.create(model="tiny", messages=HELLO, **options)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("gpt-4")


def test_greedy_is_what_the_learner_generates(client, learner):
    expected = learner.generate(PROMPT, max_new_tokens=30, do_sample=False, pad_token_id=257)
    assert len(set(expected)) > 3
    answer = ask(client, max_completion_tokens=30)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT), 30)
    plain = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30)
    assert plain.choices[0].text == expected
    ids = client.completions.create(model="tiny", prompt=list(PROMPT.encode()), max_tokens=30)
    assert ids.choices[0].text == expected


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}, {"stop": ["ag", "zz"]}])
def test_a_stream_is_the_answer_in_parts(client, options):
    whole = ask(client, max_tokens=24, **options)
    chunks = list(ask(client, max_tokens=24, stream=True, stream_options={"include_usage": True}, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_stop_ends_before_the_text(client):
    whole = ask(client, max_tokens=24).choices[0].message.content
    stop = whole[7:10]
    cut = ask(client, max_tokens=24, stop=stop).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_seeds_and_choices(client):
    def texts(**options):
        return [choice.message.content for choice in ask(client, temperature=1.5, **options).choices]

    two = texts(seed=1, n=2)
    assert two == texts(seed=1, n=2)
    assert two[0] != two[1]
    assert two[0] == texts(seed=1)[0]
    assert texts(seed=2) != texts(seed=1)
    assert texts() != texts()
    # so little probability is left that the likeliest token is drawn
    assert texts(top_p=1e-6) == [ask(client).choices[0].message.content]


def test_samples_have_the_distribution_of_the_model(client, learner):
    ids = torch.tensor([list(PROMPT.encode())])
    probabilities = (learner.logits(ids)[0, -1] / 2.0).softmax(-1)
    letters = range(97, 123)
    expected = torch.stack([*(probabilities[letter] for letter in letters), torch.tensor(0.0)])
    expected[-1] = 1 - expected.sum()  # all tokens that are no letters together
    counts = torch.zeros_like(expected)
    for seed in range(40):
        answer = ask(client, temperature=2.0, max_tokens=1, n=8, seed=seed)
        for choice in answer.choices:
            found = ord(choice.message.content or " ")
            counts[found - 97 if found in letters else -1] += 1
    assert 0.02 < expected[-1] < 0.98
    assert (counts / 320 - expected).abs().sum() / 2 < 0.15  # total variation


def test_logprobs_are_those_of_the_model(client, learner):
    answer = ask(client, max_tokens=4, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    text = answer.choices[0].message.content
    ids = torch.tensor([list((PROMPT + text).encode())])
    logprobs = learner.logits(ids)[0].log_softmax(-1)[len(PROMPT) - 1 : -1]
    for place, expected, letter in zip(content, logprobs, text, strict=True):
        assert place.token == letter
        assert place.bytes == list(letter.encode())
        assert place.logprob == pytest.approx(float(expected[ord(letter)]), abs=1e-4)
        assert [t.logprob for t in place.top_logprobs] == pytest.approx(
            expected.topk(3).values.tolist(), abs=1e-4
        )
    plain = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=4, logprobs=3).choices[0]
    assert plain.logprobs.token_logprobs == pytest.approx([p.logprob for p in content])
    assert plain.logprobs.text_offset == [0, 1, 2, 3]
    streamed = [
        place
        for chunk in ask(client, max_tokens=4, logprobs=True, stream=True)
        if chunk.choices[0].logprobs
        for place in chunk.choices[0].logprobs.content
    ]
    assert [p.logprob for p in streamed] == [p.logprob for p in content]


def test_penalties_and_bias(client, learner):
    """The penalised answer, token by token, by OpenAI's formula."""
    ids, written = list(PROMPT.encode()), []
    for _ in range(12):
        logits = learner.logits(torch.tensor([ids + written]))[0, -1]
        for token in set(written):
            logits[token] -= 1.5 + 0.7 * written.count(token)
        logits[ord("q")] += 3.0
        written.append(int(logits.argmax()))
    options = {"presence_penalty": 1.5, "frequency_penalty": 0.7, "logit_bias": {str(ord("q")): 3.0}}
    answer = ask(client, max_tokens=12, **options).choices[0].message.content
    assert answer == bytes(written).decode()
    assert answer != ask(client, max_tokens=12).choices[0].message.content


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 100_000}, "max_completion_tokens"),
        ({"n": 99}, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"extra_body": {"guided_json": {"a": 1}}}, "guided_json"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
    ],
)
def test_what_is_refused_is_named(client, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **options})
    assert caught.value.param == param
    assert param.rpartition(".")[2] in caught.value.message
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", '"messages": [{"role": "user", "content": "cut \\ud83d"}]'),
        (
            "/v1/chat/completions",
            '"messages": [{"role": "user", "content": "x"}], "logit_bias": {"\\udca9": 1}',
        ),
        ("/v1/completions", '"prompt": ["whole", "cut \\ud83d"]'),
        ("/v1/memories/learn", '"text": "cut \\ud83d"'),
        ("/v1/memories/score", '"text": "x", "user": "\\ud83d"'),
    ],
)
def test_half_a_character_is_refused(address, path, fields):
    body = f'{{"model": "tiny", {fields}}}'
    with client_of(address) as http:
        for content in (body.encode(), body.encode().replace(b"\\ud83d", b"\xed\xa0\xbd")):
            refused = http.post(path, content=content, headers={"content-type": "application/json"})
            assert refused.status_code == 400
            assert "half of a surrogate pair" in refused.json()["error"]["message"]
        whole = body.replace("\\ud83d", "\\ud83d\\ude00")
        if "logit_bias" not in whole and "memories" not in path:
            taken = http.post(path, content=whole, headers={"content-type": "application/json"})
            assert taken.status_code == 200


def test_completions_take_a_number_of_logprobs(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", extra_body={"logprobs": False})
    assert caught.value.param == "logprobs"


def test_neutral_values_are_accepted(client):
    neutral = {
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "tools": [],
        "store": False,
        "metadata": {"a": "b"},
        "n": 1,
        "logit_bias": {},
        "presence_penalty": 0,
        "logprobs": False,
        "parallel_tool_calls": True,
        "service_tier": "auto",
    }
    assert ask(client, **neutral).choices[0].message.content == ask(client).choices[0].message.content
    dumped = ask(client).choices[0].message.model_dump()  # with the fields that clients send back
    again = [*HELLO, dumped, {"role": "user", "content": [{"type": "text", "text": "more"}]}]
    assert client.chat.completions.create(model="tiny", messages=again).choices


def test_a_long_conversation_drops_its_oldest_turns(client):
    turns = [{"role": "system", "content": "be brief"}]
    for _ in range(12):
        turns += [{"role": "user", "content": "u" * 20}, {"role": "assistant", "content": "a" * 20}]
    turns += HELLO
    answer = client.chat.completions.create(model="tiny", messages=turns, max_tokens=8)
    assert 150 < answer.usage.prompt_tokens <= 248


def test_plain_completions_of_several_prompts(client):
    one, two = (client.completions.create(model="tiny", prompt=p).choices[0].text for p in ("abc", "xyz"))
    both = client.completions.create(model="tiny", prompt=["abc", "xyz"], n=1)
    assert [choice.text for choice in both.choices] == [one, two]
    assert [choice.index for choice in both.choices] == [0, 1]
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x" * 300)
    assert caught.value.code == "context_length_exceeded"


def test_errors_of_http_have_the_form_too(address):
    with client_of(address) as http:
        cases = [
            (http.get("/v1/nothing"), 404, "not_found"),
            (http.get("/v1/chat/completions"), 405, "http"),
            (http.post("/v1/chat/completions", content=b"{}"), 415, "content_type"),
            (
                http.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}),
                400,
                "invalid_json",
            ),
            (http.post("/v1/chat/completions", json=[1]), 400, "invalid_value"),
            (
                http.post("/v1/chat/completions", json={"model": "other", "messages": HELLO}),
                404,
                "model_not_found",
            ),
            (
                http.post("/v1/chat/completions", json={"x": "y" * 2**20}),
                413,
                "body_too_long",
            ),
            (http.get("/v1/models", headers={"host": "evil.example"}), 403, "host"),
            (http.get("/v1/memories", params={"user": "x" * 257}), 400, "invalid_value"),
            (http.delete("/v1/memories", params={"user": "x" * 257}), 400, "invalid_value"),
        ]
        for response, status, code in cases:
            assert response.status_code == status
            assert response.json()["error"]["code"] == code
            assert not any(name.startswith("access-control") for name in response.headers)
        assert http.get("/v1/models", headers={"host": "LocalHost:8000"}).status_code == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(address, client):
    body = json.dumps({"model": "tiny", "messages": HELLO, "stream": True})
    header = "content-type: application/json"
    done = subprocess.run(
        ["curl", "-sN", f"{address}/v1/chat/completions", "-H", header, "-d", body],
        capture_output=True,
        check=True,
        text=True,
    )
    lines = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line]
    assert lines[-1] == "[DONE]"
    text = "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1])
    assert text == text_of(json.loads(ask(client).to_json()))


def test_metrics_and_health(address, client):
    before = _metric(address, "answer_tokens_total")
    ask(client, max_tokens=5)
    assert _metric(address, "answer_tokens_total") == before + 5
    with client_of(address) as http:
        assert http.get("/health").json() == {"status": "ok", "troubles": 0}


def _metric(address, name: str) -> float:
    with client_of(address) as http:
        for line in http.get("/metrics").text.splitlines():
            if line.startswith(f"nested_learning_{name} "):
                return float(line.split()[1])
    return math.nan
