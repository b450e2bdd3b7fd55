"""``generate --json-schema`` and ``--grammar``: the answer has that form, and what is no schema is refused."""

from __future__ import annotations

import json

import jsonschema
import pytest

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
RUN = ("generate", "-no-cnv", "-p", "x", "-n", "100", "--temp", "1.5", "--seed", "3")


def choices_of(stdout: str) -> list[dict]:
    """The samples of ``--json``."""
    printed = json.loads(stdout)
    return printed.get("choices", [printed])


def test_every_sample_follows_the_schema(here, model_path, tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    for flags in (["-j", json.dumps(SCHEMA), "-np", "3"], ["-jf", str(file), "--lookup", "4"]):
        done = here(*RUN, "-m", model_path, "--json", *flags)
        assert done.exit_code == 0, done.stderr
        choices = choices_of(done.stdout)
        assert all(choice["finish_reason"] == "stop" for choice in choices)
        for choice in choices:
            jsonschema.validate(json.loads(choice["text"]), SCHEMA)


def test_a_grammar_from_the_command_line_and_from_a_file(here, model_path, tmp_path):
    file = tmp_path / "colors.gbnf"
    file.write_text('root ::= "red" | "blue"\n')
    for flags in (["--grammar", 'root ::= "red" | "blue"'], ["--grammar-file", str(file)]):
        done = here(*RUN, "-m", model_path, "--json", *flags)
        assert choices_of(done.stdout)[0]["text"] in ("red", "blue")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-j", "{"], "-j: not JSON"),
        (["-j", '{"type": "strin"}'], "strin"),
        (["--grammar", "root ::= x"], "'x' not found"),
        (["--grammar-file", "missing.gbnf"], "No such file"),
        (["-j", "{}", "--grammar", 'root ::= "x"'], "give one of them"),
        (["-j", "{}", "--beams", "2"], "--beams"),
        (["-j", "{}", "--ignore-eos"], "--ignore-eos"),
        (["-j", "{}", "--mesh", "data=1"], "--mesh"),
    ],
)
def test_what_is_no_format_is_refused(here, model_path, flags, message):
    done = here(*RUN, "-m", model_path, *flags)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr
