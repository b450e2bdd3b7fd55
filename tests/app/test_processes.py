"""Processes of a run, by flags and environments, and what is refused before anything starts."""

from __future__ import annotations

import importlib.util

import jax
import pytest

from jaxpaged.app import processes
from jaxpaged.app.errors import InputError
from jaxpaged.app.processes import ProcessOptions

ALONE: dict[str, dict[str, str]] = {
    "nothing": {},
    "the batch script of a SLURM job, outside srun": {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "0",
    },
    "srun of one task": {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"},
    "mpirun of one": {"OMPI_COMM_WORLD_SIZE": "1"},
    "a TPU VM of one host on GKE": {"TPU_WORKER_HOSTNAMES": "localhost"},
    "TPUs, with JAX kept from them": {"JAX_PLATFORMS": "cpu"},
    "libtpu without chips": {"TPU_SKIP_MDS_QUERY": "1"},
}
TOGETHER: dict[str, dict[str, str]] = {
    "srun": {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "2"},
    "a pod on GKE": {"TPU_WORKER_HOSTNAMES": "t-0.t,t-1.t", "TPU_WORKER_ID": "1"},
    "slices of TPUs": {"TPU_WORKER_HOSTNAMES": "t-0.t", "MEGASCALE_COORDINATOR_ADDRESS": "t-0.t"},
    "a TPU VM, which asks Google Cloud": {},
}


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The calls of ``jax.distributed.initialize``, which does nothing; stdout stays where it is."""
    calls: list[tuple] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *which, **_: calls.append(which))
    monkeypatch.setattr(processes, "_protect_stdout", lambda: None)
    return calls


def with_libtpu(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    own = importlib.util.find_spec

    def find_spec(name: str, *rest: str) -> object:
        return (object() if there else None) if name == "libtpu" else own(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


@pytest.mark.parametrize("case", ALONE)
def test_an_environment_of_one_process_starts_nothing(case, joined, monkeypatch):
    with_libtpu(monkeypatch, case != "nothing" and "TPU" in case + str(ALONE[case]))
    processes.start(ProcessOptions(), ALONE[case])
    assert joined == []


@pytest.mark.parametrize("case", TOGETHER)
def test_an_environment_of_several_is_joined_as_jax_reads_it(case, joined, monkeypatch):
    with_libtpu(monkeypatch, "TPU VM" in case)
    processes.start(ProcessOptions(), TOGETHER[case])
    assert joined == [(None, None, None)]


def test_tpus_of_no_pod_run_alone(joined, monkeypatch):
    """JAX finds no other hosts: Colab, Kaggle, a single machine."""
    with_libtpu(monkeypatch, True)
    for error in (ValueError("coordinator_address should be defined."), OSError("metadata.google.internal")):

        def fail(*_: object, _error: Exception = error, **__: object) -> None:
            raise _error

        monkeypatch.setattr(jax.distributed, "initialize", fail)
        processes.start(ProcessOptions(), {})
        with pytest.raises(InputError, match="did not come together"):
            processes.start(ProcessOptions(), TOGETHER["srun"])
        with pytest.raises(InputError, match="--coordinator host:1: the processes"):
            processes.start(ProcessOptions("host:1", 2, 0), {})


def test_flags_name_the_processes(joined):
    processes.start(ProcessOptions("host0:1234", 2, 1), {})
    assert joined == [("host0:1234", 2, 1)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-processes", "2"], "--num-processes and --process-id belong to --coordinator HOST:PORT"),
        (["--coordinator", "host0"], "--coordinator host0: write HOST:PORT"),
        (["--coordinator", "host0:99999"], "--coordinator host0:99999: write HOST:PORT"),
        (["--coordinator", "h:1", "--num-processes", "2"], "--num-processes and --process-id go together"),
        (
            ["--coordinator", "h:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id 2: there are processes 0 to 1 (--num-processes)",
        ),
    ],
)
@pytest.mark.parametrize("command", [["generate", "-p", "x"], ["bench"], ["serve"]], ids=lambda c: c[0])
def test_flags_that_do_not_go_together_are_named(command, flags, said, refused):
    assert said in refused(*command, *flags)


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("tensor", "--mesh tensor: 'tensor' is not an axis with its size"),
        ("model=2", "--mesh model=2: "),
        ("tensor=0", "--mesh tensor=0: "),
        ("tensor=2,tensor=2", "--mesh tensor=2,tensor=2: "),
        ("tensor=2", "--xla_force_host_platform_device_count=8"),  # one device here
    ],
)
@pytest.mark.parametrize("command", [["generate", "-p", "x"], ["bench"], ["serve"]], ids=lambda c: c[0])
def test_a_mesh_that_cannot_be_is_named(command, mesh, said, refused, model_path):
    assert said in refused(*command, "-m", model_path, "--mesh", mesh)


def test_the_server_says_at_once_that_it_spreads_no_contexts(refused):
    said = refused("serve", "-m", "there/is/none.gguf", "--mesh", "context=2")
    assert "--mesh context=2: the server knows the axes data and tensor" in said
