"""llama.cpp's own tests of llama-server (``tools/server/tests``), run against ``jaxpaged serve``.

    make peers-llama-server LLAMA_CPP=/path/to/llama.cpp

A pytest plugin, and the program that runs pytest with it on a copy of the tests, which are not part of this
repository. Changes: the server is ``llama_server_shim.py`` with a random model, expected words of answers are not
checked, numbers of tokens that depend on the vocabulary (``NUMBERS``) may have any value, the same everywhere in a
test, and some words are replaced (``CHANGED``). ``FILES`` and ``LEFT_OUT`` have the excluded tests and the reasons.
"""

from __future__ import annotations

import ast
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

HERE = Path(__file__).resolve().parent

_TOOLS = "tools are not offered"
_MODEL = "needs a model that is not here"
_KNOWS = "needs a model that knows when to call a tool; no grammar makes it"

FILES: dict[str, str] = {
    "test_compat_gcp.py": "Google's API (/predict) is not offered",
    "test_kv_keep_only_active.py": "reads llama-server's log; slots have no cells of their own here",
    "test_lora.py": "LoRA is not offered",
    "test_mcp_servers.py": _TOOLS,
    "test_proxy.py": "a proxy for the page in the browser is not offered",
    "test_speculative.py": "the server drafts no tokens",
    "test_stream.py": "resuming a stream (through the router of models) is not offered",
    "test_tools_builtin.py": _TOOLS,
    "test_vision_api.py": "images are not offered",
}
"""Excluded files, with the reason."""

_AFTER_SAMPLING = "probabilities after sampling are not offered"
_PROGRESS = "progress of a prompt is not offered"
_IMAGES = "images are not offered"
_PRESET = "files of models' flags (--models-preset) are not offered"
_DOWNLOAD = "models are not downloaded or deleted through HTTP"
_CORS = "decided otherwise: other sites' pages may use the server only where --cors-origins names them"

LEFT_OUT: dict[str, str] = {
    "test_basic.py::test_load_split_model": _MODEL,
    "test_basic.py::test_server_model_aliases_and_tags": (
        "decided otherwise: a model's id is the first --alias as given, not the first of the alphabet; no tags"
    ),
    "test_completion.py::test_completion_stream_with_openai_library_stops": _MODEL,
    "test_completion.py::test_n_probs_post_sampling": _AFTER_SAMPLING,
    "test_completion.py::test_n_probs_post_backend_sampling": _AFTER_SAMPLING,
    "test_chat_completion.py::test_chat_completion[None-Book-What is the best book-8-^ blue": (
        "decided otherwise: a --chat-template that is neither a name nor Jinja source is a mistake"
    ),
    "test_chat_completion.py::test_chat_template_assistant_prefill[prefill1": (
        "decided otherwise: parts of a text are joined with one line break, also those of the assistant"
    ),
    "test_chat_completion.py::test_return_progress": _PROGRESS,
    "test_compat_anthropic.py::test_anthropic_empty_messages": "decided otherwise: nothing to answer is a mistake",
    "test_compat_anthropic.py::test_anthropic_thinking_with_reasoning_model": _MODEL,
    "test_compat_anthropic.py::test_anthropic_vision_base64_with_multimodal_model": _IMAGES,
    "test_compat_oai_responses.py::test_responses_stream_with_llama_telemetry": _PROGRESS,
    "test_infill.py::test_with_qwen_model": _MODEL,
    "test_rerank.py::test_rerank": _MODEL,
    "test_rerank.py::test_rerank_tei_format": _MODEL,
    "test_tool_call.py::test_completion_with_required_tool_real_model[DeepSeek-R1": (
        "needs a model whose thoughts end"
    ),
    "test_tool_call.py::test_weather": _KNOWS,
    "test_tool_call.py::test_calc_result": _KNOWS,
    "test_tool_call.py::test_thoughts": _KNOWS,
    "test_tool_call.py::test_hello_world": _KNOWS,
    "test_metrics.py::test_metrics_timings_on_prompt_progress": _PROGRESS,
    "test_router.py::test_router_queue_client_disconnect_keeps_model": "needs a build whose requests take seconds",
    "test_router.py::test_router_reload_models": _PRESET,
    "test_router.py::test_router_dedup_cache_models": _PRESET,
    "test_router.py::test_router_remote_preset": _PRESET,
    "test_router.py::test_router_download_model": _DOWNLOAD,
    "test_router.py::test_router_delete_model": _DOWNLOAD,
    "test_security.py::test_cors_options": _CORS,
    "test_security.py::test_cors_origins_defaults_to_localhost_with_tools_enabled": _TOOLS,
    "test_security.py::test_cors_proxy_only_forwards_explicit_proxy_headers": (
        "a proxy for the page in the browser is not offered"
    ),
    "test_security.py::test_local_media_file[../../../tools-file://mtmd/test-1.jpeg": _IMAGES,
    "test_security.py::test_local_media_file[../../../tools-file:////mtmd//test-1.jpeg": _IMAGES,
    "test_slot_save.py::test_slot_restore_legacy_token_list": "the files are not llama.cpp's",
    "test_slot_save.py::test_slot_save_restore_text_only_on_multimodal": _MODEL,
    "test_slot_save.py::test_slot_save_restore_with_image": _IMAGES,
    "test_slot_save.py::test_slot_save_restore_with_two_images": _IMAGES,
    "test_slot_save.py::test_slot_save_restore_with_image_across_restart": _IMAGES,
    "test_slot_save.py::test_slot_save_restore_image_payload_larger_than_context": _IMAGES,
    "test_slot_save.py::test_slot_restore_media_file_without_mmproj": _IMAGES,
    "test_sleep.py::test_server_sleep_metrics_buckets": (
        "decided otherwise: rates in /metrics are averages since the start; no scrape changes what the next one sees"
    ),
    "test_template.py::test_date_inside_prompt": (
        "decided otherwise: a template is told the date where it asks for it (strftime_now), as in transformers"
    ),
}
"""Excluded tests, or ``test[part of its parameters``, with the reason."""

NUMBERS: dict[str, tuple[int, ...]] = {
    "test_embedding_pooling_none": (5,),
    "test_embedding_usage_single": (9, 6),
    "test_rerank_usage": (19, 26),
    "test_completion": (18, 46),
    "test_completion_stream": (18, 46),
    "test_chat_completion": (69, 77, 23, 104, 79),
    "test_chat_completion_stream": (77, 104),
    "test_chat_completion_cached_tokens": (77, 76, 51, 47),
    "test_ctx_shift_enabled": (226,),
    "test_ctx_shift_disabled_short_prompt": (248,),
    "test_slot_save_restore": (21, 84),
    "test_slot_erase": (21,),
}
"""Numbers of tokens of the suite's model, by test."""

FALLING: dict[str, tuple[int, ...]] = {
    "test_slot_save_restore": (6,),  # the slots share one cache: a prompt is found that another slot had
}
"""Numbers of tokens that may decrease during a test."""

_METRIC = "llamacpp:n_decode_total"
CHANGED: dict[str, dict[int | str, int | str]] = {
    # An image is the client's mistake, for a model that reads text.
    "test_anthropic_tool_result_with_image": {500: 400},
    "test_anthropic_vision_format_accepted": {500: 400},
    "test_embedding_error_prompt_too_long": {"too large": "exceeds"},
    "test_embedding_usage_multiple": {9: 18},  # tokens of the text
    "test_no_ui": {"<!doctype html>": "<!DOCTYPE html>"},
    "test_completion_prompt_cache": {5: 8},  # tokens of " Hello 1"
    "test_access_static_assets_without_api_key": {  # the page has files of its own
        "/sw.js": "/",
        "/manifest.webmanifest": "/",
        "/_app/version.json": "/",
    },
    "test_cors_origins_localhost_rejects": {200: 400},  # a browser heeds the header alone
    "test_metrics_prometheus_format": dict.fromkeys(  # of what is not offered, or not counted
        (
            "llamacpp:n_tokens_max",
            "llamacpp:spec_decode_num_draft_tokens_total",
            "llamacpp:spec_decode_num_accepted_tokens_total",
            "llamacpp:spec_decode_num_drafts_total",
        ),
        _METRIC,
    )
    | {"llamacpp:n_busy_slots_per_decode": "llamacpp:requests_processing"},
}
_HUB = {
    "ggml-org/tinygemma3-GGUF:Q8_0": "tinygemma3",
    "ggml-org/test-model-stories260K:F32": "stories260K",
    "ggml-org/test-model-stories260K-infill:F32": "stories260K-infill",
}
CHANGED |= {  # names of models in the hub, and of those in the folder that is served
    "": _HUB,  # constants of test_router.py
    "test_router_models_max_evicts_lru": _HUB,
    **{
        test: {"ggml-org/tinygemma3-GGUF:Q8_0": "tinygemma3"}
        for test in (
            "test_router_chat_completion_stream",
            "test_router_unload_model",
            "test_router_no_models_autoload",
            "test_router_api_key_required",
        )
    },
}
"""Other values that are replaced, by test."""


class Same(int):
    """A number of tokens: any positive value, but the same in all comparisons of a test."""

    bound: ClassVar[dict[int, int]] = {}

    def __eq__(self, other: object) -> bool:
        number = int(self)
        return isinstance(other, int) and other > 0 and self.bound.setdefault(number, int(other)) == other

    def __hash__(self) -> int:
        return int.__hash__(self)


class Falling(Same):
    """A number that is the same as before in a test, or smaller."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, int) or not 0 < other <= self.bound.get(int(self), other):
            return False
        self.bound[int(self)] = other
        return True

    def __hash__(self) -> int:
        return int.__hash__(self)


class _Rewrite(ast.NodeTransformer):
    """Replaces numbers by ``Same(number)`` (``NUMBERS``) or ``Falling``, and other values as in ``CHANGED``."""

    def __init__(self) -> None:
        self._test = ""
        tables: tuple[Mapping[str, Iterable[int | str]], ...] = (NUMBERS, FALLING, CHANGED)
        self.left = {(test, old) for table in tables for test in table for old in table[test]}
        """Entries that were not found yet."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        outer, self._test = self._test, self._test or node.name
        self.generic_visit(node)
        self._test = outer
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        value = node.value
        for kind, table in ((Same, NUMBERS), (Falling, FALLING)):
            if type(value) is int and value in table.get(self._test, ()):
                self.left.discard((self._test, value))
                return ast.Call(ast.Name(kind.__name__, ast.Load()), [node], [])
        if type(value) in (int, str) and value in CHANGED.get(self._test, {}):
            self.left.discard((self._test, value))
            return ast.Constant(CHANGED[self._test][value])
        return node


def run(llama_cpp: Path, arguments: list[str]) -> int:
    """Runs the suite of a folder of llama.cpp's sources; returns pytest's exit status."""
    source = llama_cpp / "tools" / "server" / "tests"
    if not (source / "utils.py").is_file():
        print(
            f"{llama_cpp}: no tools/server/tests in it; LLAMA_CPP=... names a folder of llama.cpp's sources"
        )
        return 2
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tests = root / "tools" / "server" / "tests"
        shutil.copytree(source, tests)
        (tests / "tmp").mkdir(exist_ok=True)
        if (llama_cpp / "models").is_dir():
            (root / "models").symlink_to((llama_cpp / "models").resolve())
        rewrite = _Rewrite()
        for file in (tests / "unit").glob("test_*.py"):
            if file.name not in FILES:
                tree = ast.fix_missing_locations(rewrite.visit(ast.parse(file.read_text())))
                file.write_text(ast.unparse(tree))
        if rewrite.left:
            print(f"the suite has changed; these are not in it any more: {sorted(map(str, rewrite.left))}")
            return 1
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "llama_server_suite",
                "-p",
                "no:cacheprovider",
                *arguments,
            ],
            cwd=tests,
            env=_environment(root),
        ).returncode


def _environment(root: Path) -> dict[str, str]:
    sys.path.insert(0, str(HERE))
    from llama_server_shim import RANDOM_MODEL, ROUTED, write_random_model

    model = write_random_model(root / "random.gguf", (HERE.parents[1] / "LICENSE").read_text())
    (root / "router").mkdir()
    for name in ROUTED:
        (root / "router" / f"{name}.gguf").hardlink_to(model)
    shim = root / "llama-server"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "llama_server_shim.py"}" "$@"\n')
    shim.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        **os.environ,
        "LLAMA_SERVER_BIN_PATH": str(shim),
        "PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        RANDOM_MODEL: str(model),
    }


# --- The pytest plugin ---


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Before the suite's conftest is read."""
    import builtins

    vars(builtins).update(Same=Same, Falling=Falling)
    sys.path.insert(0, str(Path.cwd()))
    sys.modules.setdefault("wget", types.ModuleType("wget"))  # nothing is downloaded
    import utils
    from requests.structures import CaseInsensitiveDict

    ask = utils.ServerProcess.make_request

    def make_request(server: Any, method: str, path: str, data: Any = None, *rest: Any, **more: Any) -> Any:
        if server.debug and path == "/chat/completions":  # llama-server's --verbose, for each request
            data = data | {"verbose": True}
        if (
            server.reasoning and path == "/apply-template"
        ):  # its --reasoning, likewise; it says "on" by default
            data = data | {"chat_template_kwargs": {"enable_thinking": server.reasoning != "off"}}
        answer = ask(server, method, path, data, *rest, **more)
        answer.headers = CaseInsensitiveDict(answer.headers)  # as HTTP has it
        return answer

    utils.ServerProcess.make_request = make_request
    utils.match_regex = lambda regex, text: isinstance(text, str)
    utils.ServerPreset.load_all = staticmethod(lambda: None)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Ignores excluded files."""
    return True if collection_path.name in FILES else None


def pytest_runtest_setup(item: Any) -> None:
    """Resets the numbers for each test."""
    Same.bound.clear()


_reasons: Counter[str] = Counter()


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Deselects the tests of ``LEFT_OUT``; every entry must match a test."""
    unused = set(LEFT_OUT)
    out = []
    for item in items:
        name, _, parameters = f"{item.path.name}::{item.name}".partition("[")
        for key, reason in LEFT_OUT.items():
            test, _, part = key.partition("[")
            if name == test and part in parameters:
                unused.discard(key)
                _reasons[reason] += 1
                out.append(item)
                break
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
    if unused and not config.args_source.name == "ARGS":
        raise SystemExit(f"the suite has changed; LEFT_OUT names what is not there: {sorted(unused)}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Lists excluded tests with the reasons."""
    terminalreporter.section("left out")
    for reason, count in _reasons.most_common():
        terminalreporter.line(f"{count:4} tests: {reason}")
    for file, reason in sorted(FILES.items()):
        terminalreporter.line(f"{file}: {reason}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: llama_server_suite.py LLAMA_CPP [pytest's arguments]")
    raise SystemExit(run(Path(sys.argv[1]), sys.argv[2:]))
