"""No password gets past redaction, and what is no password is left as it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quee_core.redaction import redacted, without_secrets

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"http://user:{SECRET}@host:5000/path", "http://host:5000/path"),
        (f"https://{SECRET}@host/a@b", "https://host/a@b"),
        (f"postgresql+asyncpg://user:{SECRET}@127.0.0.1:5432/mlflow", "postgresql+asyncpg://127.0.0.1:5432/mlflow"),
        (f"mysql://user:a/{SECRET}@x@host/db", "mysql://host/db"),
        (f"mysql://user:1{SECRET}@host/db", "mysql://host/db"),
        (f"s3://bucket/x?AWSSecretKey={SECRET}&part=1", "s3://bucket/x?AWSSecretKey=…&part=1"),
        (f"postgresql://host/db?user=me&password={SECRET}", "postgresql://host/db?user=me&password=…"),
        (f"cannot reach http://u:{SECRET}@a/b, nor 'http://u:{SECRET}@c'", "cannot reach http://a/b, nor 'http://c'"),
    ],
)
def test_secrets_go_and_the_rest_stays(text: str, left: str) -> None:
    assert without_secrets(text) == left
    assert without_secrets(left) == left


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000/a@b", "sqlite:////runs/mlflow.db", "models:/quee-router-x@champion", "me@example.org",
        "s3://bucket/folder?versionId=7", "8-4-2", "http://host:80", "tcp://10.0.0.1:8786",
        "file:///a:b/c@d",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_every_text_of_a_plain_value_is_redacted() -> None:
    url = f"http://me:{SECRET}@host"
    found = redacted({"run": {"mlflow_uri": url, "n": 3, "none": None}, "many": [url, (url, 1.5)]})
    assert found == {
        "run": {"mlflow_uri": "http://host", "n": 3, "none": None},
        "many": ["http://host", ("http://host", 1.5)],
    }


PASSWORDS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="\"'<>"), min_size=1)


@given(PASSWORDS, st.sampled_from(["http", "https", "postgresql", "mysql+pymysql"]))
def test_no_password_of_printable_characters_survives(password: str, scheme: str) -> None:
    planted = f"S{password}E"
    assert planted not in without_secrets(f"{scheme}://user:{planted}@host.example:5000/path")
    assert without_secrets(f"{scheme}://user:{planted}@host.example:5000/path").endswith("host.example:5000/path")
