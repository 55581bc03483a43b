"""`polymath.yaml`: what is wrong with it, all at once, each with its line and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from polymath.errors import ConfigError
from polymath.gateway import ConfigFile, load_config, read_config

GOOD = """\
server:
  port: 8081
base_models:
  tiny:
    model: package:tiny
experts:
  math:
    base_model: tiny
    adapter: adapters/math
  general:
    kind: base
    base_model: tiny
    domains: [general, science]
router:
  path: router
  fallback: general
  min_confidence: 0.5
engine:
  max_tokens: 64
"""

KINDS = "lora, base, ensemble, proxy_tuned, upstream, guided, cascade"
NO_ENVIRONMENT: dict[str, str] = {}


def write(folder: Path, text: str | bytes) -> Path:
    """The config in a folder, with the adapters `math` and `law` and a router next to it."""
    for name in ("adapters/math", "adapters/law", "router"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    file = folder / "polymath.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def load(
    folder: Path, text: str | bytes, environ: Mapping[str, str] = NO_ENVIRONMENT
) -> ConfigFile:
    return load_config(write(folder, text), environ)


def problems(
    folder: Path, text: str | bytes, environ: Mapping[str, str] = NO_ENVIRONMENT
) -> list[str]:
    """The lines of the error, without the path that each must start with."""
    with pytest.raises(ConfigError) as refused:
        load(folder, text, environ)
    file = f"{folder / 'polymath.yaml'}:"
    assert all(line.startswith(file) and "\n" not in line for line in refused.value.problems)
    return [line.removeprefix(file) for line in refused.value.problems]


def changed(*changes: tuple[str, str]) -> str:
    """`GOOD` with each first text replaced by the second."""
    text = GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return text


def test_a_good_config_is_read_as_it_says(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD).settings
    assert (loaded.server.port, loaded.engine.max_tokens) == (8081, 64)
    assert loaded.base_models["tiny"].model == "package:tiny"
    assert list(loaded.experts) == ["math", "general"]
    assert loaded.domains() == {"math": "math", "general": "general", "science": "general"}


def test_the_whole_error_line_is_file_line_key_message(tmp_path: Path) -> None:
    file = write(tmp_path, changed(("port", "prt")))
    with pytest.raises(ConfigError) as refused:
        load_config(file, NO_ENVIRONMENT)
    line = f"{file}:2: server.prt: unknown key; did you mean port?"
    assert refused.value.problems == (line,)
    assert refused.value.message == line


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("engine:", "engin:", "18: engin: unknown key; did you mean engine?"),
        ("port:", "prot:", "2: server.prot: unknown key; did you mean port?"),
        (
            "domains:",
            "domain:",
            "13: experts.general.domain: unknown key; did you mean domains?",
        ),
        (
            "    kind: base",
            "    sampling: {temprature: 0}\n    kind: base",
            "11: experts.general.sampling.temprature: unknown key; did you mean temperature?",
        ),
        (
            "    kind: base",
            "    price:\n      inptu: 1\n    kind: base",
            "12: experts.general.price.inptu: unknown key; did you mean input?",
        ),
        (
            "min_confidence",
            "confidence",
            "17: router.confidence: unknown key; did you mean min_confidence?",
        ),
        (
            "port:",
            "zzz:",
            "2: server.zzz: unknown key; "
            "valid here: admin_key, allow_runtime_lora_updating, cors_origins, host, log_format, "
            "log_level, log_prompts, max_body_bytes, port, shutdown_grace, watch_config, workers",
        ),
        (
            "    model: package:tiny",
            "    model: package:tiny\n    max_len: 3",
            "6: base_models.tiny.max_len: unknown key; did you mean max_model_len?",
        ),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest_one(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    assert problems(tmp_path, changed((old, new))) == [expected]


def test_a_misspelt_key_in_a_list_is_named_with_its_index(tmp_path: Path) -> None:
    examples = (
        "    few_shot:\n"
        "    - {role: user, content: a}\n"
        "    - {role: assistant, contents: b}\n"
        "    kind: base"
    )
    assert problems(tmp_path, changed(("    kind: base", examples))) == [
        "13: experts.general.few_shot.1.content: missing; this key is required",
        "13: experts.general.few_shot.1.contents: unknown key; did you mean content?",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("8081", "[1]", "2: server.port: input should be a valid integer, found [1]"),
        (
            "8081",
            "eighty",
            "2: server.port: input should be a valid integer, "
            "unable to parse string as an integer, found 'eighty'",
        ),
        (
            "8081",
            "70000",
            "2: server.port: input should be less than or equal to 65535, found 70000",
        ),
        (
            "8081",
            "-1",
            "2: server.port: input should be greater than or equal to 0, found -1",
        ),
        (
            "[general, science]",
            "general",
            "13: experts.general.domains: input should be a valid tuple, found 'general'",
        ),
        (
            "[general, science]",
            "[general, 3]",
            "13: experts.general.domains.1: input should be a valid string, found 3",
        ),
        (
            "0.5",
            "1.5",
            "17: router.min_confidence: input should be less than or equal to 1, found 1.5",
        ),
        (
            "package:tiny",
            "{a: b}",
            "5: base_models.tiny.model: input should be a valid string, found {'a': 'b'}",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_what_was_found(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    assert problems(tmp_path, changed((old, new))) == [expected]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "kind: base",
            "kind: bse",
            f"11: experts.general.kind: 'bse' is not one of {KINDS}; did you mean base?",
        ),
        (
            "kind: base",
            "kind: proxy-tuned",
            f"11: experts.general.kind: 'proxy-tuned' is not one of {KINDS}; "
            "did you mean proxy_tuned?",
        ),
        (
            "kind: base",
            "kind: 7",
            f"11: experts.general.kind: 7 is not one of {KINDS}; valid here: {KINDS}",
        ),
        (
            "max_tokens: 64",
            "dtype: bfloat",
            "19: engine.dtype: 'bfloat' is not one of auto, float32, bfloat16, float16; "
            "did you mean bfloat16?",
        ),
    ],
)
def test_a_bad_choice_is_named_with_the_nearest_one(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    assert problems(tmp_path, changed((old, new))) == [expected]


def test_an_unknown_base_model_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    assert problems(tmp_path, changed(("base_model: tiny", "base_model: tinny"))) == [
        "8: experts.math.base_model: no base model 'tinny'; did you mean tiny?"
    ]


def test_a_missing_adapter_is_named_with_its_nearest_sibling(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    assert problems(tmp_path, changed(("adapters/math", "adapters/maths"))) == [
        f"9: experts.math.adapter: {folder / 'maths'} does not exist; "
        f"did you mean {folder / 'math'}?"
    ]


def test_a_missing_folder_without_siblings_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "nowhere" / "math"
    assert problems(tmp_path, changed(("adapters/math", "nowhere/math"))) == [
        f"9: experts.math.adapter: {folder} does not exist"
    ]


def test_a_missing_router_is_named_with_its_nearest_sibling(tmp_path: Path) -> None:
    assert problems(tmp_path, changed(("path: router", "path: ruoter"))) == [
        f"15: router.path: {tmp_path / 'ruoter'} does not exist; "
        f"did you mean {tmp_path / 'router'}?"
    ]


@pytest.mark.parametrize("name", ["polymath", "auto"])
def test_the_names_of_the_router_are_reserved(tmp_path: Path, name: str) -> None:
    assert problems(tmp_path, changed(("  math:", f"  {name}:"))) == [
        f"7: experts.{name}: this name is reserved for the router; choose another"
    ]


def test_a_base_model_may_not_have_the_name_of_the_router(tmp_path: Path) -> None:
    text = changed(("  tiny:", "  auto:")).replace("base_model: tiny", "base_model: auto")
    assert problems(tmp_path, text) == [
        "4: base_models.auto: this name is reserved for the router; choose another"
    ]


def test_an_expert_may_not_be_named_as_a_base_model(tmp_path: Path) -> None:
    assert problems(tmp_path, changed(("  math:", "  tiny:"))) == [
        "7: experts.tiny: a base model has this name already; choose another"
    ]


def test_two_experts_may_not_answer_one_domain(tmp_path: Path) -> None:
    assert problems(tmp_path, changed(("science]", "math]"))) == [
        "13: experts.general.domains: domain 'math' belongs to expert 'math' already"
    ]


def test_an_unknown_fallback_is_named_with_the_nearest_expert(tmp_path: Path) -> None:
    assert problems(tmp_path, changed(("fallback: general", "fallback: generel"))) == [
        "16: router.fallback: no expert 'generel'; did you mean general?"
    ]


def test_a_base_model_may_be_the_fallback(tmp_path: Path) -> None:
    assert load(tmp_path, changed(("fallback: general", "fallback: tiny"))).settings


def test_required_keys_are_named(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("router:")] + "router:\n  path: router\n"
    assert problems(tmp_path, text) == ["14: router.fallback: missing; this key is required"]


@pytest.mark.parametrize("text", ["", "# nothing here\n"])
def test_an_empty_file_lacks_the_required_sections(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text) == [
        "1: experts: missing; this key is required",
        "1: router: missing; this key is required",
    ]


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "hello\n", "3\n", "---\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    (problem,) = problems(tmp_path, text)
    assert problem.startswith("1: must hold keys: auth, base_models, cache, engine, experts")


def test_a_config_needs_an_expert(tmp_path: Path) -> None:
    start, end = GOOD.index("experts:"), GOOD.index("router:")
    (problem,) = problems(tmp_path, f"{GOOD[:start]}experts: {{}}\n{GOOD[end:]}")
    assert problem.startswith("6: experts: ")


def test_a_name_that_cannot_be_a_model_is_refused(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, changed(("  math:", "  'ma th':")))
    assert problem.startswith("7: experts.ma th: ")


def test_an_adapter_is_asked_for_at_the_expert(tmp_path: Path) -> None:
    assert problems(tmp_path, changed(("    adapter: adapters/math\n", ""))) == [
        "7: experts.math: an expert of kind lora needs `adapter`; or say `kind: base`"
    ]


def with_expert(*lines: str) -> str:
    """`GOOD` with an expert `x` whose name stands in line 14 and its keys in those below."""
    expert = "".join(f"{line}\n" for line in ("  x:", *(f"    {line}" for line in lines)))
    return changed(("router:\n", f"{expert}router:\n"))


STEERED = ("kind: proxy_tuned", "large: tiny", "tuned: math", "untuned: tiny")
MEMBERS = "members: {math: 1, general: 2}"


@pytest.mark.parametrize(
    "lines",
    [
        ("kind: ensemble", MEMBERS),
        ("kind: ensemble", "members: [math, general, tiny]"),
        ("kind: ensemble", "members: [math]", "combine: logits"),
        ("kind: ensemble", MEMBERS, "combine: posterior", "top_k: 2", "floor: 0"),
        STEERED,
        (*STEERED, "alpha: -0.5", "sampling: {temperature: 0}"),
    ],
    ids=", ".join,
)
def test_experts_that_combine_others_are_read(tmp_path: Path, lines: tuple[str, ...]) -> None:
    assert load(tmp_path, with_expert(*lines)).settings.experts["x"].parts()


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("kind: ensemble",), "14: experts.x: an expert of kind ensemble needs `members`"),
        (STEERED[:2], "14: experts.x: an expert of kind proxy_tuned needs `tuned`"),
        (
            ("kind: ensemble", MEMBERS, "base_model: tiny"),
            "14: experts.x: an expert of kind ensemble has no `base_model`; it belongs to lora",
        ),
        (
            ("kind: ensemble", MEMBERS, "alpha: 0.5"),
            "14: experts.x: an expert of kind ensemble has no `alpha`; it belongs to proxy_tuned",
        ),
        (
            (*STEERED, "members: [math]"),
            "14: experts.x: an expert of kind proxy_tuned has no `members`; it belongs to ensemble",
        ),
        (
            ("kind: base", "base_model: tiny", "top_k: 40"),
            "14: experts.x: an expert of kind base has no `top_k`; it belongs to ensemble",
        ),
        (
            ("kind: ensemble", MEMBERS, "floor: 0.5"),
            "14: experts.x: `floor` goes with `combine: posterior`, and only with it",
        ),
        (
            ("kind: ensemble", MEMBERS, "system_prompt: Be brief."),
            "14: experts.x: an expert of kind ensemble has no `system_prompt`; "
            "its experts have their own",
        ),
        (
            ("kind: ensemble", "members: {math: 0, general: 0.0}"),
            "14: experts.x: the weights of `members` add up to 0; "
            "give at least one of them a positive weight, and none a huge one",
        ),
        (
            ("kind: ensemble", MEMBERS, "combine: logit"),
            "17: experts.x.combine: 'logit' is not one of logits, probabilities, posterior, "
            "comblm; did you mean logits?",
        ),
        (
            (*STEERED, "alpha: .inf"),
            "19: experts.x.alpha: input should be a finite number, found inf",
        ),
        (
            ("kind: ensemble", "membres: [math]"),
            "16: experts.x.membres: unknown key; did you mean members?",
        ),
    ],
)
def test_keys_that_do_not_fit_the_kind_are_named_with_the_way_out(
    tmp_path: Path, lines: tuple[str, ...], expected: str
) -> None:
    assert problems(tmp_path, with_expert(*lines)) == [expected]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ("3", "16: experts.x.members: must be a mapping or a list, found 3"),
        ("math", "16: experts.x.members: must be a mapping or a list, found 'math'"),
        (
            "[math, 3]",
            "16: experts.x.members.1: input should be a valid string, found 3",
        ),
        (
            "{math: 1, general: -1}",
            "16: experts.x.members.general: input should be greater than or equal to 0, found -1",
        ),
        (
            "\n      math: 1\n      general: much",
            "18: experts.x.members.general: input should be a valid number, "
            "unable to parse string as a number, found 'much'",
        ),
        (
            "[]",
            "16: experts.x.members: "
            "value should have at least 1 item after validation, not 0, found []",
        ),
    ],
)
def test_members_of_another_form_are_one_problem(
    tmp_path: Path, members: str, expected: str
) -> None:
    text = with_expert("kind: ensemble", f"members: {members}")
    assert problems(tmp_path, text) == [expected]


def test_unknown_members_are_named_with_the_nearest_expert(tmp_path: Path) -> None:
    text = with_expert("kind: ensemble", "members: [maht, generel]")
    assert problems(tmp_path, text) == [
        "16: experts.x.members: no expert 'maht'; did you mean math?",
        "16: experts.x.members: no expert 'generel'; did you mean general?",
    ]


def test_an_unknown_part_of_a_proxy_is_named_at_its_key(tmp_path: Path) -> None:
    text = with_expert("kind: proxy_tuned", "large: tiny", "tuned: maths", "untuned: tinny")
    assert problems(tmp_path, text) == [
        "17: experts.x.tuned: no expert 'maths'; did you mean math?",
        "18: experts.x.untuned: no expert 'tinny'; did you mean tiny?",
    ]


@pytest.mark.parametrize("lines", [("kind: ensemble", "members: [math, {}]"), STEERED])
@pytest.mark.parametrize("inner", ["x", "y"])
def test_an_expert_that_combines_others_cannot_be_combined(
    tmp_path: Path, lines: tuple[str, ...], inner: str
) -> None:
    """Neither itself nor another one."""
    named = [line.format(inner).replace("tuned: math", f"tuned: {inner}") for line in lines]
    text = with_expert(*named).replace("router:", "  y: {kind: ensemble, members: [math]}\nrouter:")
    (problem,) = problems(tmp_path, text)
    assert problem.split(": ")[1] in ("experts.x.members", "experts.x.tuned")
    assert problem.endswith(f"{inner!r} combines experts itself; name those")


def test_a_key_given_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    assert problems(tmp_path, changed(("  port: 8081", "  port: 8081\n  port: 1"))) == [
        "3: server.port: given twice, first in line 2"
    ]


def test_an_expert_given_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    assert problems(tmp_path, changed(("  general:\n", "  math:\n"))) == [
        "10: experts.math: given twice, first in line 7"
    ]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("8081", "[8081", 3),
        ("  port", "\tport", 2),
        ("8081", "*nowhere", 2),
        ("8081", "'8081", 20),
        ("engine:", "---\nengine:", 18),
    ],
)
def test_invalid_yaml_is_named_with_its_line(tmp_path: Path, old: str, new: str, line: int) -> None:
    (problem,) = problems(tmp_path, changed((old, new)))
    assert problem.startswith(f"{line}: not valid YAML: ")


@pytest.mark.parametrize(
    "value", ["!!python/object:os.system x", "!tag 3", "!!int abc", "2024-13-45", "9" * 5000]
)
def test_a_value_that_yaml_cannot_make_is_named_with_its_line(tmp_path: Path, value: str) -> None:
    (problem,) = problems(tmp_path, changed(("8081", value)))
    assert problem.startswith("2: ")


@pytest.mark.parametrize("value", ["&a [*a]", "&a {port: *a}"])
def test_a_value_that_holds_itself_is_refused(tmp_path: Path, value: str) -> None:
    assert problems(tmp_path, changed(("8081", value)))[0].startswith("2: ")


def test_a_merge_of_something_else_is_named_with_its_line(tmp_path: Path) -> None:
    assert problems(tmp_path, changed(("port: 8081", "<<: 3")))[0].startswith("2: ")


def test_a_control_character_is_one_line(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, changed(("8081", "\x00")))
    assert "not valid YAML" in problem


@pytest.mark.parametrize("data", [b"\xff\xfe", "# Gr\xfc\xdfe\n".encode("latin-1") + GOOD.encode()])
def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path, data: bytes) -> None:
    assert problems(tmp_path, data) == [" not UTF-8 text"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "no.yaml", NO_ENVIRONMENT)
    assert refused.value.problems == (
        f"{tmp_path / 'no.yaml'}: cannot be read (No such file or directory)",
    )


@given(st.text(st.sampled_from("ab:-[]{}&*!|>'\"#%@`,? \n\t0<$"), max_size=40))
@example("? [a]\n: 1")
@example("&a\n- *a")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_file_whatsoever_gives_anything_but_problems(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load(tmp_path, text)


def test_all_problems_of_the_sections_come_at_once(tmp_path: Path) -> None:
    text = changed(
        ("port: 8081", "prt: 8081"),
        ("kind: base", "kind: bse"),
        ("max_tokens: 64", "max_tokens: 0"),
    )
    assert problems(tmp_path, text) == [
        "2: server.prt: unknown key; did you mean port?",
        f"11: experts.general.kind: 'bse' is not one of {KINDS}; did you mean base?",
        "19: engine.max_tokens: input should be greater than or equal to 1, found 0",
    ]


def test_all_contradictions_between_sections_come_at_once(tmp_path: Path) -> None:
    text = changed(
        ("base_model: tiny", "base_model: tinny"),
        ("science]", "math]"),
        ("path: router", "path: routers"),
        ("fallback: general", "fallback: generel"),
    )
    assert [line.split(":")[:2] for line in problems(tmp_path, text)] == [
        ["8", " experts.math.base_model"],
        ["13", " experts.general.domains"],
        ["16", " router.fallback"],
        ["15", " router.path"],
    ]


def test_a_variable_is_taken_from_the_environment(tmp_path: Path) -> None:
    text = changed(("port: 8081", "host: ${HOST}"))
    assert load(tmp_path, text, {"HOST": "10.0.0.1"}).settings.server.host == "10.0.0.1"


@pytest.mark.parametrize(
    ("environ", "host"), [({}, "localhost"), ({"HOST": ""}, "localhost"), ({"HOST": "h"}, "h")]
)
def test_a_default_stands_in_for_an_unset_or_empty_variable(
    tmp_path: Path, environ: dict[str, str], host: str
) -> None:
    text = changed(("port: 8081", "host: ${HOST:-localhost}"))
    assert load(tmp_path, text, environ).settings.server.host == host


def test_a_default_may_be_empty(tmp_path: Path) -> None:
    text = changed(("port: 8081", "host: 'x${HOST:-}'"))
    assert load(tmp_path, text).settings.server.host == "x"


def test_variables_are_expanded_inside_of_a_text(tmp_path: Path) -> None:
    text = changed(("adapters/math", "${ROOT}/ma${END:-th}"))
    loaded = load(tmp_path, text, {"ROOT": "adapters"}).settings
    assert loaded.experts["math"].adapter == tmp_path / "adapters" / "math"


def test_two_dollars_write_a_variable_out(tmp_path: Path) -> None:
    text = changed(("    kind: base", "    system_prompt: $${HOME} $5 $$ {x}\n    kind: base"))
    prompt = load(tmp_path, text, {"HOME": "/root"}).settings.experts["general"].system_prompt
    assert prompt == "${HOME} $5 $$ {x}"


def test_an_unset_variable_is_named_with_the_way_out(tmp_path: Path) -> None:
    assert problems(tmp_path, changed(("8081", "${PORT}"))) == [
        "2: server.port: the environment variable PORT is not set; set it or write ${PORT:-default}"
    ]


def test_all_unset_variables_come_at_once(tmp_path: Path) -> None:
    text = changed(("8081", "${PORT}"), ("path: router", "path: ${ROUTER}"))
    assert [line.split(":")[0] for line in problems(tmp_path, text)] == ["2", "15"]


@pytest.mark.parametrize(
    "value", ["x\nport: 1", "[a, b]", "{a: b}", "*alias", "# comment", "!!python/x", "${HOME}", "'"]
)
def test_a_value_of_the_environment_is_only_ever_a_text(tmp_path: Path, value: str) -> None:
    text = changed(("port: 8081", "host: ${HOST}"))
    loaded = load(tmp_path, text, {"HOST": value, "HOME": "/root"}).settings.server
    assert (loaded.host, loaded.port) == (value, 8080)


def test_variables_are_not_expanded_in_keys_and_comments(tmp_path: Path) -> None:
    text = changed(("  port: 8081", "  # ${COMMENT}\n  ${KEY}: 1"))
    (problem,) = problems(tmp_path, text, {"KEY": "port"})
    assert problem.startswith("3: server.${KEY}: unknown key")


def test_a_number_may_come_from_the_environment(tmp_path: Path) -> None:
    text = changed(("8081", "${PORT}"), ("0.5", "${SURE:-0.25}"))
    loaded = load(tmp_path, text, {"PORT": "9000"}).settings
    assert (loaded.server.port, loaded.router.min_confidence) == (9000, 0.25)


def test_a_bad_number_from_the_environment_is_named(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, changed(("8081", "${PORT}")), {"PORT": "http"})
    assert problem.startswith("2: server.port: ")
    assert problem.endswith("found 'http'")


def test_an_anchor_repeats_a_value(tmp_path: Path) -> None:
    adapter = "    adapter: adapters/math"
    text = changed(
        (adapter, f"{adapter}\n    sampling: &exact {{top_k: 3}}"),
        ("    kind: base", "    sampling: *exact\n    kind: base"),
    )
    experts = load(tmp_path, text).settings.experts
    assert experts["math"].sampling == experts["general"].sampling
    assert experts["math"].sampling.top_k == 3


LAW = """\
  math: &expert
    base_model: tiny
    adapter: adapters/math
    description: sums
  law:
    <<: *expert
"""
MATH = "  math:\n    base_model: tiny\n    adapter: adapters/math\n"


def test_a_merge_key_takes_over_a_mapping(tmp_path: Path) -> None:
    experts = load(tmp_path, changed((MATH, LAW))).settings.experts
    assert experts["law"] == experts["math"]


@pytest.mark.parametrize("before", [True, False])
def test_a_key_of_its_own_stands_against_a_merged_one(tmp_path: Path, before: bool) -> None:
    own, merge = "    adapter: adapters/law\n", "    <<: *expert\n"
    text = changed((MATH, LAW), (merge, own + merge if before else merge + own))
    law = load(tmp_path, text).settings.experts["law"]
    assert (law.adapter, law.description) == (tmp_path / "adapters" / "law", "sums")


def test_a_key_given_twice_beside_a_merge_is_still_an_error(tmp_path: Path) -> None:
    own = "    description: a\n    description: b\n"
    text = changed((MATH, LAW), ("    <<: *expert\n", f"    <<: *expert\n{own}"))
    assert problems(tmp_path, text) == [
        "14: experts.law.description: given twice, first in line 13"
    ]


def test_paths_are_relative_to_the_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / "weights").mkdir()
    loaded = load(tmp_path, changed(("package:tiny", "weights"))).settings
    assert loaded.experts["math"].adapter == tmp_path / "adapters" / "math"
    assert loaded.router.path == tmp_path / "router"
    assert loaded.base_models["tiny"].model == str(tmp_path / "weights")


def test_a_config_may_be_named_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    loaded = load_config(Path("polymath.yaml"), NO_ENVIRONMENT).settings
    assert loaded.router.path == Path("router")


def test_absolute_paths_stay_as_they_are(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    loaded = load(tmp_path, changed(("path: router", f"path: {other}"))).settings
    assert loaded.router.path == other


def test_a_hugging_face_id_becomes_a_base_model(tmp_path: Path) -> None:
    loaded = load(tmp_path, changed(("base_model: tiny", "base_model: org/model-1B"))).settings
    assert loaded.experts["math"].base_model == "org/model-1B"
    assert {name: base.model for name, base in loaded.base_models.items()} == {
        "org/model-1B": "org/model-1B",
        "tiny": "package:tiny",
    }


def test_a_base_model_named_like_a_hugging_face_id_keeps_its_source(tmp_path: Path) -> None:
    text = changed(("  tiny:", "  org/tiny:")).replace("base_model: tiny", "base_model: org/tiny")
    assert load(tmp_path, text).settings.base_models["org/tiny"].model == "package:tiny"


def test_reading_alone_does_not_look_at_other_files(tmp_path: Path) -> None:
    file = write(tmp_path, changed(("adapters/math", "adapters/maths")))
    assert read_config(file, NO_ENVIRONMENT).settings.experts["math"].adapter is not None


def test_lines_are_known_for_later_problems(tmp_path: Path) -> None:
    file = load(tmp_path, GOOD)
    key = ("experts", "math", "adapter")
    assert file.problem(key, "corrupt") == f"{file.path}:9: experts.math.adapter: corrupt"


def test_a_key_that_was_left_out_has_the_line_of_its_section(tmp_path: Path) -> None:
    file = load(tmp_path, GOOD)
    line = file.problem(("router", "rules"), "missing")
    assert line == f"{file.path}:14: router.rules: missing"


def with_rule(rule: str) -> str:
    return changed(("  path: router\n", f"  path: router\n  rules: [{rule}]\n"))


def test_a_rule_names_an_expert_that_exists(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, with_rule("{expert: mth, keyword: tenant}"))
    assert problem == "16: router.rules.0.expert: no expert 'mth'; did you mean math?"


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("{expert: math}", "a rule needs one of keyword, regex, header, system_prompt"),
        ("{expert: math, regex: '('}", "not a regular expression: missing )"),
    ],
)
def test_a_rule_that_could_not_match_is_an_error(tmp_path: Path, rule: str, reason: str) -> None:
    (problem,) = problems(tmp_path, with_rule(rule))
    assert "router.rules.0" in problem
    assert reason in problem


def test_examples_belong_to_the_first_domain_of_their_expert(tmp_path: Path) -> None:
    keys = ("kind: base", "base_model: tiny", "domains: [cooking, baking]", "examples: ['rice?']")
    text = with_expert(*keys)
    assert load(tmp_path, text).settings.examples() == {"cooking": ("rice?",)}


# --- experts behind HTTP -------------------------------------------------------------------------

UPSTREAM = ("kind: upstream", "api_base: http://gpu/v1", "model: m")
GUIDED = ("kind: guided", "guide: math", "upstream: general")
CASCADE = ("kind: cascade", "cheap: math", "strong: general")
JUDGE = "judge: {kind: logprob, threshold: -1}"
SECRET = "sk-secret"


@pytest.mark.parametrize(
    "lines",
    [
        UPSTREAM,
        (*UPSTREAM, "api_key: sk-1", "headers: {X-Team: blue}", "fallbacks: [math, tiny]"),
        (*UPSTREAM, "system_prompt: Be brief.", "sampling: {temperature: 0}"),
        ("kind: upstream", "model: m", "deployments: [{api_base: 'https://[::1]:8443/v1'}]"),
        GUIDED,
        (*CASCADE, JUDGE),
        (*CASCADE, "judge: {kind: difficulty, threshold: 0.5}"),
    ],
    ids=", ".join,
)
def test_experts_that_ask_others_are_read(tmp_path: Path, lines: tuple[str, ...]) -> None:
    assert not load(tmp_path, with_expert(*lines)).settings.experts["x"].has_row


def test_a_config_needs_no_base_model(tmp_path: Path) -> None:
    text = """\
experts:
  big: {kind: upstream, api_base: http://gpu/v1, model: m}
router: {path: router, fallback: big}
"""
    assert load(tmp_path, text).settings.base_models == {}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (UPSTREAM[:2], "14: experts.x: an expert of kind upstream needs `model`"),
        (GUIDED[:2], "14: experts.x: an expert of kind guided needs `upstream`"),
        (CASCADE, "14: experts.x: an expert of kind cascade needs `judge`"),
        (
            ("kind: upstream", "model: m"),
            "14: experts.x: an expert of kind upstream needs `api_base` or `deployments`",
        ),
        (
            (*UPSTREAM, "deployments: [{api_base: http://gpu-2/v1}]"),
            "14: experts.x: an expert of kind upstream needs `api_base` or `deployments`",
        ),
        (
            ("kind: upstream", "model: m", "api_key: k", "deployments: [{api_base: http://a}]"),
            "14: experts.x: with `deployments` each of them has its own `api_key`",
        ),
        (
            (*UPSTREAM, "base_model: tiny"),
            "14: experts.x: an expert of kind upstream has no `base_model`; it belongs to lora",
        ),
        (
            (*GUIDED, "api_base: http://gpu/v1"),
            "14: experts.x: an expert of kind guided has no `api_base`; it belongs to upstream",
        ),
        (
            (*GUIDED, "system_prompt: Be brief."),
            "14: experts.x: an expert of kind guided has no `system_prompt`; "
            "its experts have their own",
        ),
        (
            (*GUIDED, "template: Read this."),
            "14: experts.x: `template` must hold {background}",
        ),
        (
            (*GUIDED, "guide_prompt: Tell me."),
            "14: experts.x: `guide_prompt` must hold {question}",
        ),
        (
            (*UPSTREAM, "fallbacks: [maht]"),
            "18: experts.x.fallbacks: no expert 'maht'; did you mean math?",
        ),
        (
            ("kind: guided", "guide: mth", "upstream: general"),
            "16: experts.x.guide: no expert 'mth'; did you mean math?",
        ),
        (
            (*CASCADE, "judge: {kind: meta_ranking, threshold: 0}"),
            "18: experts.x.judge: `references` goes with `kind: meta_ranking`, and only with it",
        ),
        (
            (*CASCADE, "judge: {kind: logprob, threshold: -1, expert: mth}"),
            "18: experts.x.judge.expert: no expert 'mth'; did you mean math?",
        ),
        (
            (*CASCADE, "judge: {kind: logprob}"),
            "18: experts.x.judge.threshold: missing; this key is required",
        ),
        (
            (*UPSTREAM, "timeout: 0"),
            "18: experts.x.timeout: input should be greater than 0, found 0",
        ),
        (
            (*UPSTREAM, "num_retry: 1"),
            "18: experts.x.num_retry: unknown key; did you mean num_retries?",
        ),
        (
            ("kind: upstream", "model: m", "deployments: [{api_bse: http://a}]"),
            "17: experts.x.deployments.0.api_base: missing; this key is required",
        ),
    ],
)
def test_what_is_wrong_with_an_expert_that_asks_others_is_named(
    tmp_path: Path, lines: tuple[str, ...], expected: str
) -> None:
    assert problems(tmp_path, with_expert(*lines))[0] == expected


def test_references_that_are_not_there_are_named(tmp_path: Path) -> None:
    judge = "judge: {kind: meta_ranking, threshold: 0, references: lost.jsonl}"
    assert problems(tmp_path, with_expert(*CASCADE, judge)) == [
        f"18: experts.x.judge.references: {tmp_path / 'lost.jsonl'} does not exist"
    ]


@pytest.mark.parametrize("lines", [UPSTREAM, GUIDED, (*CASCADE, JUDGE)])
def test_an_expert_without_logits_here_cannot_be_combined(
    tmp_path: Path, lines: tuple[str, ...]
) -> None:
    members = "  y: {kind: ensemble, members: [math, x]}\nrouter:"
    kind = lines[0].removeprefix("kind: ")
    (problem,) = problems(tmp_path, with_expert(*lines).replace("router:", members))
    assert problem.endswith(
        f": experts.y.members: 'x' is of kind {kind}, and has no logits to combine"
    )


@pytest.mark.parametrize(
    ("x", "others", "way"),
    [
        ((*UPSTREAM, "fallbacks: [x]"), "", "x -> x"),
        (
            ("kind: guided", "guide: math", "upstream: y"),
            "  y: {kind: guided, guide: x, upstream: math}\n",
            "x -> y -> x",
        ),
        (
            (*UPSTREAM, "fallbacks: [math, y]"),
            "  y:\n"
            "    {kind: cascade, cheap: general, strong: z, judge: {kind: logprob, threshold: 0}}\n"
            "  z: {kind: guided, guide: math, upstream: x}\n",
            "x -> y -> z -> x",
        ),
    ],
)
def test_experts_that_ask_each_other_in_a_circle_are_named(
    tmp_path: Path, x: tuple[str, ...], others: str, way: str
) -> None:
    found = problems(tmp_path, with_expert(*x).replace("router:", f"{others}router:"))
    assert any(problem.endswith(f": asks itself in the end: {way}") for problem in found)
    assert len(found) == len(way.split(" -> ")) - 1  # each of them is in it


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("gpu:8000/v1", "pattern"),
        ("ftp://gpu/v1", "pattern"),
        ("http://gpu/v1?key=1", "pattern"),
        ("http://", "pattern"),
        ("http://gpu:99999/v1", "ort"),
        ("http://gpu:0/v1", "port 0"),
        ("http://gpu:eighty/v1", "ort"),
        ("http://[::1/v1", "IPv6"),
    ],
)
def test_an_address_that_cannot_be_asked_is_refused(tmp_path: Path, url: str, reason: str) -> None:
    (problem,) = problems(tmp_path, with_expert("kind: upstream", f"api_base: '{url}'", "model: m"))
    assert problem.startswith("16: experts.x.api_base: ")
    assert reason in problem


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (f'api_key: "{SECRET}\\nx"', "api_key"),
        (f'api_key: "{SECRET}ü"', "api_key"),
        (f"api_key: [{SECRET}]", "api_key"),
        (f"api_key: {{a: {SECRET}}}", "api_key"),
        (f'headers: {{x: "{SECRET}\\x00"}}', "headers.x"),
        (f"headers: {{x: [{SECRET}]}}", "headers.x"),
        (f"headers: {SECRET}", "headers"),
        (f"headers: {{'a b': {SECRET}}}", "headers.a b"),
        ('api_key: ""', "api_key"),
        (f"api_kye: {SECRET}", "api_kye"),
    ],
)
def test_a_secret_that_cannot_be_used_is_named_and_not_shown(
    tmp_path: Path, line: str, key: str
) -> None:
    (problem,) = problems(tmp_path, with_expert(*UPSTREAM, line))
    assert problem.startswith(f"18: experts.x.{key}: ")
    assert SECRET not in problem


@pytest.mark.parametrize("deployed", [False, True])
def test_a_password_in_an_address_is_refused_and_not_shown(tmp_path: Path, deployed: bool) -> None:
    """The address stands in logs and metrics."""
    address = f"api_base: http://user:{SECRET}@gpu/v1"
    lines = f"deployments: [{{{address}}}]" if deployed else address
    (problem,) = problems(tmp_path, with_expert("kind: upstream", "model: m", lines))
    assert "must hold no user and password; use `api_key` or `headers`" in problem
    assert SECRET not in problem


def test_a_line_end_around_a_key_is_a_slip(tmp_path: Path) -> None:
    text = with_expert(*UPSTREAM, "api_key: ${KEY}")
    key = load(tmp_path, text, {"KEY": f"{SECRET}\n"}).settings.experts["x"].api_key
    assert key is not None
    assert key.get_secret_value() == SECRET
    assert SECRET not in repr(key)


# --- changes -------------------------------------------------------------------------------------

PORT = {("server", "port"): 8099}
WITHOUT_SERVER = GOOD.removeprefix("server:\n  port: 8081\n")


@pytest.mark.parametrize("section", ["", "server:\n", "server: {port: 8081}\n"])
def test_a_change_is_put_in_place_of_what_the_file_says(tmp_path: Path, section: str) -> None:
    file = load_config(write(tmp_path, section + WITHOUT_SERVER), {}, PORT)
    assert (file.settings.server.port, file.changes) == (8099, PORT)


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [("server: 3\n", PORT, "server"), ("", {("server", "port"): 99999}, "server.port")],
)
def test_a_change_is_checked_like_the_file(
    tmp_path: Path, section: str, changes: dict[tuple[str, ...], int], said: str
) -> None:
    with pytest.raises(ConfigError, match=f": {said}: "):
        load_config(write(tmp_path, section + WITHOUT_SERVER), {}, changes)
