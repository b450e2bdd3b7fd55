"""Parsing and verdicts of compile_check.mesh, on texts of compiled programs; no compiler is needed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from script_kit import run

from tpu_scripts.compile_check import mesh
from tpu_scripts.compile_check.hlo import Collective, Contents, axes_of, bytes_of, contents_of, groups_of
from tpu_scripts.compile_check.mesh import verdict

ROOT = Path(__file__).parents[2]
AXES = {"data": 2, "context": 1, "tensor": 4}
KERNEL = (
    "%kernel.1 = (f32[8,2]{1,0:T(4,128)S(1)}, f32[8]{0}) custom-call(%sum), "
    'custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/paged_attention_1x16/pallas_call"}'
)
PROGRAM = f"""
HloModule jit_step, is_scheduled=true, entry_computation_layout={{(bf16[8,64]{{1,0:T(8,128)(2,1)}})->bf16[8,64]}}

%add.1 (x: bf16[], y: bf16[]) -> bf16[] {{
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %sum.0 = bf16[] add(%x, %y)
}}

%body.1 (turn: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {{
  %turn = (s32[], bf16[8,64]{{1,0}}) parameter(0)
  %one = bf16[8,64]{{1,0}} get-tuple-element(%turn), index=1
  %all.1 = bf16[8,64]{{1,0}} all-reduce(%one), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add.1
  ROOT %next = (s32[], bf16[8,64]{{1,0}}) tuple(%zero, %all.1)
}}

%condition.1 (turn: (s32[], bf16[8,64])) -> pred[] {{
  ROOT %more = pred[] custom-call(%turn), custom_call_target="more"
}}

%wrapped.1 (x: f32[4]) -> f32[16] {{
  %x.2 = f32[4]{{0}} parameter(0)
  ROOT %gathered = f32[16]{{0}} all-gather(%x.2), channel_id=4, replica_groups={{{{0,4}},{{1,5}},{{2,6}},{{3,7}}}}, dimensions={{0}}
}}

%nobody.1 (x: f32[4]) -> f32[4] {{
  ROOT %unused = f32[4]{{0}} all-reduce(%x), replica_groups={{}}, to_apply=%add.1
}}

ENTRY %main.1 (x: bf16[8,64]) -> bf16[8,64] {{
  %x.1 = bf16[8,64]{{1,0:T(8,128)(2,1)}} parameter(0), metadata={{op_name="x"}}
  %small = f32[4]{{0}} constant({{1, 2, 3, 4}})
  %begun = bf16[8,64]{{1,0:T(8,128)(2,1)S(1)}} all-reduce-start(%x.1), channel_id=1, replica_groups=mesh['data'=2,'context'=1,'tensor'=4] {{'tensor'}}, use_global_device_ids=true, to_apply=%add.1
  %sum = bf16[8,64]{{1,0}} all-reduce-done(%begun)
  %both = (bf16[8,64]{{1,0}}, f32[4]{{0}}) all-reduce(%sum, /*index=1*/%small), replica_groups=[2,4]<=[8], to_apply=%add.1
  %asked = ((f32[4]{{0}}), f32[16]{{0}}, u32[]) async-start(%small), calls=%wrapped.1
  %told = f32[16]{{0}} async-done(%asked), calls=%wrapped.1
  {KERNEL}
  %other = f32[8]{{0}} custom-call(%sum), custom_call_target="tpu_custom_call", metadata={{op_name="jit(step)/matmul"}}
  %loop = (s32[], bf16[8,64]{{1,0}}) while(%start), condition=%condition.1, body=%body.1, backend_config={{"n":"1"}}
  ROOT %out = bf16[8,64]{{1,0}} get-tuple-element(%loop), index=1
}}
"""  # noqa: E501 - as compilers write it


def test_each_collective_counts_once_where_it_runs():
    found = contents_of(PROGRAM, AXES)
    assert Counter(found.collectives) == Counter(
        [
            Collective("all-reduce", "tensor", False, 8 * 64 * 2),  # begun and done
            Collective("all-reduce", "tensor", False, 8 * 64 * 2 + 4 * 4),  # two values in one
            Collective("all-gather", "data", False, 4 * 4),  # in a computation that runs beside others
            Collective("all-reduce", "tensor", True, 8 * 64 * 2),
        ]
    )
    assert found.kernels == 1


def test_what_two_places_call_runs_twice():
    text = PROGRAM.replace(
        "  ROOT %out", "  %again = f32[16]{0} call(%small), to_apply=%wrapped.1\n  ROOT %out"
    )
    kinds = Counter(one.kind for one in contents_of(text, AXES).collectives)
    assert kinds == {"all-reduce": 3, "all-gather": 2}


@pytest.mark.parametrize(
    ("text", "groups", "over"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, x={1}", [[0, 1, 2, 3], [4, 5, 6, 7]], "tensor"),
        ("replica_groups=[2,4]<=[8], use_global_device_ids=true", [[0, 1, 2, 3], [4, 5, 6, 7]], "tensor"),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
        (
            "replica_groups=mesh['data'=2,'context'=1,'tensor'=4] {'data'}",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
            "data",
        ),
        (
            "replica_groups=mesh['data'=2,'context'=1,'tensor'=4] {'data','tensor'}",
            [[0, 1, 2, 3, 4, 5, 6, 7]],
            "data+tensor",
        ),
        ("replica_groups=[8,1]<=[8]", [[n] for n in range(8)], ""),
        ("replica_groups={}, to_apply=%add", [], "data+tensor"),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", [[0, 1], [2, 3], [4, 5], [6, 7]], "?"),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", None, "?"),
        ("channel_id=1, source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]], "?"),
    ],
)
def test_groups_of_devices_lie_along_axes(text: str, groups: list[list[int]] | None, over: str):
    assert groups_of(text) == groups
    assert axes_of(groups, AXES) == over


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[8,4096]{1,0:T(8,128)(2,1)S(1)}", 65536),
        ("(f32[8]{0}, pred[], s4[3]{0}, /*index=3*/f8e4m3fn[10])", 32 + 1 + 2 + 10),
        ("u32[]", 4),
        ("token[]", 0),
    ],
)
def test_bytes_of_shapes(shape: str, size: int):
    assert bytes_of(shape) == size


def sums(count: int, over: str = "tensor", *, in_loop: bool = True) -> list[Collective]:
    return [Collective("all-reduce", over, in_loop, 1024)] * count


def judged(
    program: str,
    axes: dict[str, int],
    found: list[Collective],
    kernels: int,
    unrolled: bool = False,
    **memory: int,
) -> str:
    sizes = {"alias_bytes": 4096, "temp_bytes": 16, "pool_bytes": 4096} | memory
    return verdict(program, axes, 2, Contents(tuple(found), kernels), sizes, unrolled)


def test_two_sums_in_the_loop_over_layers_are_right():
    spread = {"data": 1, "context": 2, "tensor": 4}
    alone = {"data": 8, "context": 1, "tensor": 1}
    assert judged("decode", AXES, sums(2), 1) == "ok"
    assert judged("prompt", AXES, [*sums(2), *sums(3, "")], 2) == "ok"  # those over one device move nothing
    assert judged("decode", alone, [], 1) == "ok"
    assert judged("decode", spread, [*sums(2), *sums(3, "context")], 1) == "ok"
    assert judged("reserve", spread, sums(1, "context"), 0) == "ok"
    gathered = [Collective("all-gather", "data", False, 8)]
    assert judged("generate", AXES, [*sums(4), *gathered], 3) == "ok"
    assert judged("decode", AXES, sums(4, in_loop=False), 2, unrolled=True) == "ok"
    assert judged("generate", AXES, [*sums(8), *gathered], 6, unrolled=True) == "ok"


def test_whatever_else_is_wrong():
    assert judged("decode", AXES, sums(3), 1) == (
        "collectives: 2 all-reduce over tensor in a loop expected, 3 all-reduce over tensor in a loop found"
    )
    assert "2 all-reduce over tensor found" in judged("decode", AXES, sums(2, in_loop=False), 1)
    gathered = [*sums(2), Collective("all-gather", "tensor", False, 8)]
    assert "1 all-gather over tensor" in judged("prompt", AXES, gathered, 1)
    assert "over data in a loop found" in judged("decode", AXES, sums(2, "data"), 1)
    assert "none expected, 1 all-reduce over tensor" in judged("seq_shift", AXES, sums(1), 0)
    assert judged("reserve", AXES, sums(1, "?"), 0).endswith("1 all-reduce over ? in a loop found")
    assert judged("decode", AXES, sums(2), 0) == "no attention kernel"
    assert judged("reserve", AXES, [], 0, alias_bytes=0) == "pool not in place: 0 of 4096 bytes aliased"
    assert "as large as a copy" in judged("reserve", AXES, [], 0, temp_bytes=1024)
    assert judged("seq_length", AXES, [], 0, alias_bytes=0) == "ok"


def test_it_teaches():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tpu_scripts.compile_check.mesh", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr
    assert "python -m tpu_scripts.compile_check.mesh" in done.stdout and "\nNeeds: " in done.stdout


def test_bad_axes_are_one_line(monkeypatch, capsys):
    assert run(monkeypatch, "compile_check.mesh", "--mesh", "rows=2") == 2
    said = capsys.readouterr()
    assert "'rows=2' is not an axis" in said.err and said.err.count("\n") == 1 and not said.out


def test_without_a_compiler_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(monkeypatch, "compile_check.mesh") == 2
    said = capsys.readouterr()
    assert said.err.startswith("needs flax, and libtpu or CUDA's compiler") and not said.out


def test_every_mesh_is_compiled_and_what_is_wrong_counts(monkeypatch, capsys, tmp_path):
    seen = []

    def compiled(task, environment):
        seen.append((task["target"], task["mesh"]))
        yield {"program": "decode", "result": "wrong" if task["mesh"] == "tensor=8" else "ok"}

    monkeypatch.setattr(mesh, "environment_of", lambda platform: {})
    monkeypatch.setattr(mesh, "run_worker", compiled)
    path = tmp_path / "rows.json"
    assert run(monkeypatch, "compile_check.mesh", "--platform", "tpu", "--json", path) == 1
    assert seen == [(target, axes) for target in ("v5e:2x4", "v6e:2x4") for axes in mesh.CHIPS_8]
    assert "6 programs are right, 2 are not" in capsys.readouterr().out
    assert len(json.loads(path.read_text())["rows"]) == 8
    seen.clear()
    assert run(monkeypatch, "compile_check.mesh", "--quick") == 0
    assert seen == [("v5e:2x4", mesh.CHIPS_8[0]), ("H200:1x1x4", mesh.CHIPS_4[0])]


@pytest.mark.parametrize(
    ("status", "found"), [(0, "ok, 2 programs"), (1, "FAILED"), (2, "not checked; it needs")]
)
def test_compile_check_runs_it_when_asked(monkeypatch, capfd, tmp_path, status, found):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$2" in *.mesh) [ "$5 $6" = "--platform tpu" ] || exit 3; code={status};; *) code=2;; esac\n'
        '[ $code = 2 ] || echo \'{"rows": [1, 2]}\' > "$4"\nexit $code\n'
    )
    python.chmod(0o755)
    gpu = tmp_path / "none"
    gpu.write_text("#!/bin/sh\nexit 2\n")
    gpu.chmod(0o755)
    pythons = ["--python-tpu", python, "--python-gpu", gpu]
    rows = tmp_path / "rows.json"
    assert run(monkeypatch, "compile_check", "--meshes", "--json", rows, *pythons) == status
    said = capfd.readouterr().out
    assert (
        f"tpu meshes: {found}" in said and "gpu meshes: not checked; it needs pip install jax-cuda13" in said
    )
    assert json.loads(rows.read_text())["tpu meshes"] == ([] if status == 2 else [1, 2])
