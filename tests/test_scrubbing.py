"""No secret survives the scrubber, however it is spelt; what a report needs does."""

import base64
import html
import json
import os
import re
import urllib.parse
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.utils import scrubbing
from scripts.utils.scrubbing import scrub

SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "JSON": lambda s: json.dumps(s)[1:-1],
    "JSON, not ASCII": lambda s: json.dumps(s, ensure_ascii=False)[1:-1],
    "JSON in JSON": lambda s: json.dumps(json.dumps(s))[1:-1],
    "JSON with \\/": lambda s: json.dumps(s)[1:-1].replace("/", "\\/"),
    "address": lambda s: urllib.parse.quote(s, safe=""),
    "address, small letters": lambda s: re.sub("%..", lambda m: m[0].lower(), urllib.parse.quote(s, safe="")),
    "path": urllib.parse.quote,
    "form": urllib.parse.quote_plus,
    "address in an address": lambda s: urllib.parse.quote(urllib.parse.quote(s, safe=""), safe=""),
    "HTML": html.escape,
    "base64": lambda s: base64.b64encode(s.encode()).decode(),
    "base64 of addresses": lambda s: base64.urlsafe_b64encode(s.encode()).decode(),
    "Python": lambda s: repr("'" + s)[2:-1] if "'" in s else repr(s)[1:-1],
}
SECRETS = (
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=6, max_size=40)
    .map(str.strip)
    .filter(lambda s: len(s) >= 6)
)
ORDINARY = st.text(st.sampled_from(" abz09.,:;/\\\"'={}[]<>&%\n"), max_size=30)


@pytest.mark.parametrize("spelling", SPELLINGS)
@given(secret=SECRETS, before=ORDINARY, after=ORDINARY)
def test_a_known_secret_never_survives_in_any_spelling(spelling, secret, before, after):
    written = SPELLINGS[spelling](secret)
    left = scrub(before + written + after, [secret])
    # what is left is at most what stood around it, so that the secret is not there even in part
    assert len(re.findall(re.escape(scrubbing.HIDDEN), left)) >= 1
    assert written not in left.replace(scrubbing.HIDDEN, "\0") or written in before + after


LETTERS = st.text(st.sampled_from("ABCDEFGHabcdefgh0123456789"), min_size=36, max_size=36)
HEX = st.text(st.sampled_from("0123456789abcdef"), min_size=40, max_size=40)
UPPER = st.text(st.sampled_from("ABCDEFGHIJ234567"), min_size=16, max_size=16)
FORMS = {
    "hub": LETTERS.map(lambda s: f"hf_{s}"),
    "wandb": HEX,
    "AWS": UPPER.map(lambda s: f"AKIA{s}"),
    "GitHub": LETTERS.map(lambda s: f"ghp_{s}"),
    "OpenAI": LETTERS.map(lambda s: f"sk-proj-{s}"),
    "Slack": LETTERS.map(lambda s: f"xoxb-{s[:12]}-{s}"),
    "web token": st.tuples(LETTERS, LETTERS).map(lambda p: f"eyJ{p[0]}.eyJ{p[1]}.{p[0][:20]}"),
}
PLACES = [
    "{}", "train: started with {} in it", '{{"key": "{}"}}', "TOKEN={}", "export X='{}'", "https://host/path?x={}&y=1", "({})", "--key {}",
    "/data/{}/rows.jsonl", "https%3A%2F%2Fhost%2F%3Fx%3D{}%26", "Authorization: Bearer {}", "a\n{}\nb", "{},", "\\n{}\\n"[2:],
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data(), place=st.sampled_from(PLACES))
def test_what_looks_like_a_token_goes_though_nobody_knows_it(form, data, place):
    token = data.draw(FORMS[form])
    assert token not in scrub(place.format(token))


VALUES = st.text(st.sampled_from("abcXYZ0189+/=._~-!#$*@"), min_size=8, max_size=40)
NAMES = "token password api_key API-KEY secret WANDB_API_KEY aws_secret_access_key client_secret access_token db_passwd".split()


@given(
    value=VALUES,
    name=st.sampled_from(NAMES),
    form=st.sampled_from(["{}={}", "{}: {}", '"{}": "{}"', '\\"{}\\": \\"{}\\"', "'{}' = '{}'", "--{} x1{}"]),
)
def test_a_value_behind_a_secrets_name_goes(value, name, form):
    assert value not in scrub("before " + form.format(name, value) + " after")


@given(
    user=st.text(st.sampled_from("abc019._-"), min_size=1, max_size=12), password=VALUES.filter(lambda s: "/" not in s)
)
def test_credentials_in_an_address_go_also_where_it_stands_in_another(user, password):
    for address in (
        f"https://{user}:{password}@host.example/x",
        urllib.parse.quote(f"https://{user}:{password}@host.example/x", safe=""),
        json.dumps({"url": f"git+ssh://{user}:{password}@host.example/x"}),
        f"postgres:\\/\\/{user}:{password}@host\\/db",
    ):
        left = scrub(f"get {address} now")
        assert password not in left and urllib.parse.quote(password, safe="") not in left
        assert "host" in left


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/alice/sft/outputs", "~/sft/outputs"),
        ("C:\\Users\\Alice\\sft", "C:~\\sft"),
        ("/Users/alice.b/x and /mnt/c/Users/bob/y", "~/x and /mnt/c~/y"),
        ('{"cwd": "C:\\\\Users\\\\alice\\\\x"}', '{"cwd": "C:~\\\\x"}'),
        ("%2Fhome%2Falice%2Fx", "~%2Fx"),
        ("from ALICE on box7", "from *** on ***"),
        ("write to a.lice@mail.example.org", "write to ***@***"),
    ],
)
def test_people_and_machines_have_no_name(text, left):
    assert scrub(text, (), ["alice", "box7"]) == left


ORDINARY_LINES = [
    "train: step 40/200  loss 1.83  2,310 tok/s  5.1 GiB",
    'pad_token: <|im_end|>  eos_token: "<|endoftext|>"',
    "tokenizer_hash: 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    '{"max_new_tokens": 256, "trained_tokens": 123456, "tokens_per_second": 2310.5}',
    "error: the authors of a token present no secret",
    "basic attention kernels run; bearer of news",
    "torch==2.13.0+cpu",
    "see https://host.example/docs?page=2 and data/raw/rows.jsonl:17",
    "the key render.max_length: 2048",
]


@pytest.mark.parametrize("line", ORDINARY_LINES)
def test_what_a_report_needs_stays(line):
    assert scrub(line, ["another secret"], ["alice"]) == line


def test_a_private_key_goes_whole_also_where_its_end_is_cut_off():
    key = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\naC1rZXk=\n-----END OPENSSH PRIVATE KEY-----"
    assert scrub(f"a\n{key}\nb") == "a\n***\nb"
    assert "aC1rZXk" not in scrub(key[:-20])


def test_known_secrets_come_from_the_environment_the_file_and_the_hub(tmp_path, monkeypatch):
    for name in [name for name in os.environ if scrubbing.SECRET_NAME.search(name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "pass word 1")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsefalse")
    (tmp_path / ".env").write_text("WANDB_API_KEY='from the file'\nPLAIN=nothing here\n")
    (tmp_path / "token").write_text("hf_from_the_hub\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    found = scrubbing.known_secrets(tmp_path)
    assert set(found) == {"pass word 1", "from the file", "hf_from_the_hub", str(tmp_path / "token")}
    assert found == sorted(found, key=len, reverse=True)


def test_a_json_value_is_cleaned_in_its_keys_and_under_secret_names():
    value = {
        "hf_" + "a1" * 12: [("x", 1)],
        "password": "short1",
        "pad_token": "<pad>",
        "nested": {"api_key": "12345678", "steps": 3},
    }
    clean = scrubbing.clean(value, ["known1"])
    assert clean == {
        "***": [["x", 1]],
        "password": "***",
        "pad_token": "<pad>",
        "nested": {"api_key": "***", "steps": 3},
    }


@pytest.mark.parametrize(
    "text",
    [
        'curl -H "X-Service: Bearer {}"',
        "sent bearer%20{} with it",
        "retry with Basic {}",
        "the AWS pair is {}",  # without a name before it
        "{}\n",
    ],
)
def test_what_a_request_carries_goes_without_a_secrets_name(text):
    key = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
    assert scrub(text.format(key)) == text.format("***")
    if "earer" in text:
        assert scrub(text.format("opaque.value-12")) == text.format("***")
