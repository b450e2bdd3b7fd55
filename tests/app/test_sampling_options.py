"""llama.cpp's flags of samplers and of speculative decoding, as ``generate`` and ``serve`` read them."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from jaxpaged.app.errors import InputError
from jaxpaged.app.flags import flags_of
from jaxpaged.app.llama_flags import LlamaCommand
from jaxpaged.app.methods import check_methods
from jaxpaged.app.options import GenerateOptions
from jaxpaged.app.sampling_options import DEFAULT_BREAKERS
from jaxpaged.app.server.options import ServeOptions
from jaxpaged.generation.sampling_params import RANGES, SamplingParams


def parse(cls, *args: str):
    """``(options, what was printed)`` of a command line; the options are None if it was refused."""
    found = []

    @click.command(cls=LlamaCommand)
    @flags_of(cls)
    def command(**flags) -> None:
        found.append(cls(**flags))

    result = CliRunner().invoke(command, list(args))
    assert (result.exit_code == 0) == bool(found), result.output
    assert found or result.exit_code == 2
    return found[0] if found else None, result.output


FLAGS = {
    "--typical": ("typical_p", 0.5),
    "--typical-p": ("typical_p", 2.0),
    "--top-nsigma": ("top_n_sigma", 1.5),
    "--top-n-sigma": ("top_n_sigma", -1.0),
    "--xtc-probability": ("xtc_probability", 0.5),
    "--xtc-threshold": ("xtc_threshold", 0.2),
    "--dynatemp-range": ("dynatemp_range", 0.5),
    "--dynatemp-exp": ("dynatemp_exponent", 2.0),
    "--dry-multiplier": ("dry_multiplier", 0.75),
    "--dry-base": ("dry_base", 2.0),
    "--dry-allowed-length": ("dry_allowed_length", 3),
    "--dry-penalty-last-n": ("dry_penalty_last_n", -1),
    "--mirostat": ("mirostat", 2),
    "--mirostat-lr": ("mirostat_eta", 0.5),
    "--mirostat-ent": ("mirostat_tau", 3.0),
}


@pytest.mark.parametrize("cls", [GenerateOptions, ServeOptions])
@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_sets_its_parameter(cls, flag: str) -> None:
    name, value = FLAGS[flag]
    options, _ = parse(cls, flag, str(value))
    assert options.sampling_values()[name] == value


@pytest.mark.parametrize("cls", [GenerateOptions, ServeOptions])
def test_flags_and_parameters_have_the_same_defaults(cls) -> None:
    options, _ = parse(cls)
    defaults = SamplingParams.create(1)
    values = options.sampling_values()
    assert set(values) == set(RANGES)
    assert values == pytest.approx({name: float(getattr(defaults, name)[0]) for name in RANGES})
    assert options == cls(**vars(options)) and options.dry_sequence_breakers == DEFAULT_BREAKERS


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["x", "y"], ("x", "y")),
        (["none"], ()),
        (["x", "none", "y"], ("y",)),
    ],
)
def test_breakers_take_the_place_of_the_default_ones(args: list[str], expected: tuple[str, ...]) -> None:
    options, _ = parse(GenerateOptions, *(word for text in args for word in ("--dry-sequence-breaker", text)))
    assert options.dry_sequence_breakers == expected


@pytest.mark.parametrize(
    "args",
    [
        ["--typical", "-1"],
        ["--xtc-probability", "1.5"],
        ["--dynatemp-range", "nan"],
        ["--dry-base", "0.5"],
        ["--dry-allowed-length", "-1"],
        ["--mirostat", "3"],
        ["--mirostat-ent", "inf"],
    ],
)
def test_values_that_mean_nothing_are_refused(args: list[str]) -> None:
    options, output = parse(ServeOptions, *args)
    assert options is None and args[0] in output


@pytest.mark.parametrize(
    ("args", "num_draft"),
    [
        ([], 0),
        (["--lookup", "5"], 5),
        (["--spec-draft-n-max", "6"], 6),
        (["--spec-ngram-mod-n-max", "7"], 7),
        (["--spec-type", "ngram-simple"], 8),
        (["--spec-type", "none"], 0),
        (["--spec-type", "ngram-mod,ngram-cache", "--spec-draft-n-max", "3"], 3),
        (["--spec-default"], 8),
    ],
)
def test_llama_cpps_names_turn_drafts_on(args: list[str], num_draft: int) -> None:
    assert parse(GenerateOptions, *args)[0].num_draft == num_draft
    if "--lookup" in args:
        return
    options, output = parse(ServeOptions, *args)
    assert options is not None
    assert output.count("has no effect") == sum(word.startswith("--spec") for word in args)


@pytest.mark.parametrize("cls", [GenerateOptions, ServeOptions])
@pytest.mark.parametrize("flag", ["--draft", "--draft-n", "--draft-max", "--draft-min", "--draft-n-min"])
def test_flags_that_llama_cpp_removed_name_their_successors(cls, flag: str) -> None:
    options, output = parse(cls, flag, "8")
    assert options is None
    assert f"{flag} was removed, as in llama.cpp: use --spec-draft-n-" in output


def test_drafts_of_a_second_model_are_refused_by_name() -> None:
    options, output = parse(GenerateOptions, "--spec-type", "draft-mtp")
    assert options is None and "'draft-mtp' is not one of" in output and "ngram-mod" in output


def test_mirostat_and_drafts_exclude_each_other() -> None:
    with pytest.raises(InputError, match="--mirostat and --lookup exclude each other"):
        check_methods(GenerateOptions(mirostat=1, lookup=4), prompted=True)
