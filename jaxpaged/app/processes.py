"""The processes of a run on several hosts, and its mesh.

Every process runs the whole command; process 0 reads input and writes output. Values that may differ between
processes, such as a random seed or a time, are broadcast from it (``sharding.multihost.broadcast_object``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxpaged.app.errors import InputError, say
from jaxpaged.app.flags import AT_LEAST_0, AT_LEAST_1, flag

_devices = partial(flag, "Devices")
_STARTUP_SECONDS = 120
"""Time that processes wait for each other at the start."""
_HEARTBEAT_SECONDS = 20
"""Time without a heartbeat after which a process counts as lost."""
LOST = 3
"""Exit status of a run that lost one of its processes."""


@dataclass(frozen=True)
class ProcessOptions:
    """Flags of a run in several processes; None = as the environment says."""

    coordinator: str | None = _devices(
        "--coordinator",
        "Run in several processes, each started with the same flags: address of the first of them.  "
        "[default: that of SLURM, Open MPI, a TPU pod or GKE]",
        envvar="JAX_COORDINATOR_ADDRESS",
        metavar="HOST:PORT",
    )
    num_processes: int | None = _devices(
        "--num-processes", "With --coordinator: number of processes.", type=AT_LEAST_1
    )
    process_id: int | None = _devices(
        "--process-id",
        "With --coordinator: number of this process, from 0; process 0 reads and writes.",
        type=AT_LEAST_0,
        metavar="I",
    )


def start(options: ProcessOptions, environment: Mapping[str, str] = os.environ) -> None:
    """Connects to the other processes, if there are any; call it before JAX looks for devices.

    ``--coordinator`` names process 0, by its host and a free port. Without it, ``jax.distributed.initialize`` reads the
    environment of SLURM, Open MPI, GKE and Cloud TPU pods.

    Raises:
      InputError: flags that contradict each other, processes that do not connect, or that have other flags.
    """
    o = options
    if o.coordinator is None and (o.num_processes, o.process_id) != (None, None):
        raise InputError(
            "--num-processes and --process-id belong to --coordinator HOST:PORT, where process 0 listens"
        )
    in_cluster = _in_cluster(environment)
    if o.coordinator is None and not in_cluster and not _beside_tpus(environment):
        return
    if o.coordinator is not None:
        _check(o)
    import jax

    try:
        jax.distributed.initialize(
            o.coordinator,
            o.num_processes,
            o.process_id,
            initialization_timeout=_STARTUP_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:  # JaxRuntimeError, no cluster, no answer
        if o.coordinator is None and not in_cluster and not isinstance(error, RuntimeError):
            return  # TPUs outside of a pod
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = "the cluster's environment" if o.coordinator is None else f"--coordinator {o.coordinator}"
        raise InputError(f"{where}: the processes of this run did not come together: {reason}") from error
    # Before JAX looks for devices; Gloo needs several processes.
    _protect_stdout()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    _check_alike(sys.argv[1:])


def _check_alike(arguments: Sequence[str]) -> None:
    """Refuses processes with different flags, which would run different programs and fail in the middle."""
    from jaxpaged.sharding.multihost import allgather_objects

    words = [word for word in arguments if not word.startswith("--process-id=")]
    if "--process-id" in words:
        at = words.index("--process-id")
        del words[at : at + 2]
    given = allgather_objects(words)
    for number, other in enumerate(given):
        if other != given[0]:
            raise InputError(
                f"process {number} was started with other flags than process 0, and only --process-id may differ: "
                f"{shlex.join(other)!r}, not {shlex.join(given[0])!r}"
            )


def _protect_stdout() -> None:
    """Discards what libraries print to stdout, as Gloo does for each connection; results alone belong there."""
    sys.stdout.flush()
    own = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115


def _check(o: ProcessOptions) -> None:
    host, _, port = (o.coordinator or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise InputError(f"--coordinator {o.coordinator}: write HOST:PORT, where process 0 listens")
    if (o.num_processes is None) != (o.process_id is None):
        raise InputError("--num-processes and --process-id go together")
    if o.num_processes is not None and o.process_id is not None and o.process_id >= o.num_processes:
        raise InputError(
            f"--process-id {o.process_id}: there are processes 0 to {o.num_processes - 1} (--num-processes)"
        )


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """True if a scheduler has started several processes, including this one."""

    def number(name: str) -> int:
        value = environment.get(name, "")
        return int(value) if value.isdecimal() else 1

    several = max(number("SLURM_STEP_NUM_TASKS"), number("OMPI_COMM_WORLD_SIZE")) > 1
    hosts = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    return several or len(hosts) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in environment


def _beside_tpus(environment: Mapping[str, str]) -> bool:
    """True if this host has TPU chips, and JAX asks Google Cloud for other hosts of a pod.

    On GKE the environment has them.
    """
    if "TPU_WORKER_HOSTNAMES" in environment or importlib.util.find_spec("libtpu") is None:
        return False
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return False
    import jax  # noqa: F401  # sets the variable if there are no chips

    return "TPU_SKIP_MDS_QUERY" not in environment


def count() -> int:
    """Number of processes of this run."""
    import jax

    return jax.process_count()


def is_main() -> bool:
    """True in the process that reads input and writes output."""
    import jax

    return jax.process_index() == 0


@contextlib.contextmanager
def exit_with_others() -> Iterator[None]:
    """Ends this process with one line if another one is lost; for all that computes."""
    import jax

    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        exit_if_lost(error)
        raise


def exit_if_lost(error: BaseException) -> None:
    """Ends this process if an error was caused by the loss of another one."""
    if is_loss(error):
        exit_lost(error)


def exit_lost(error: BaseException) -> None:
    """Ends this process at once; an ordinary exit would wait for the lost process."""
    reason = " ".join(str(error).split())
    say(
        f"error: process {_own_number()} of {count()} ends: another process of the run is gone "
        f"({reason[:160]}{'...' if len(reason) > 160 else ''})"
    )
    sys.stderr.flush()
    os._exit(LOST)


def _own_number() -> int:
    import jax

    return jax.process_index()


def is_loss(error: BaseException) -> bool:
    """True if an error was caused by the loss of another process."""
    text = str(error)
    words = (
        "Gloo",
        "gloo",
        "onnection",
        "UNAVAILABLE",
        "DEADLINE_EXCEEDED",
        "heartbeat",
        "coordination",
        "NCCL",
    )
    return count() > 1 and any(word in text for word in words)


def mesh_sizes(text: str) -> dict[str, Any]:
    """Parses ``--mesh`` to sizes by axis.

    Raises:
      InputError: it has another form.
    """
    from jaxpaged.sharding.mesh import MeshError, parse_mesh

    try:
        return parse_mesh(text)
    except MeshError as error:
        raise InputError(f"--{error}") from error


def open_mesh(text: str | None) -> Any:
    """Creates the mesh of ``--mesh``; None without it and without other processes.

    Without the flag, several processes split the model over all their devices.

    Raises:
      InputError: it has another form, or does not fit the devices.
    """
    if text is None and count() == 1:
        return None
    import jax

    from jaxpaged.sharding.mesh import MeshError, make_mesh

    sizes = {"tensor": len(jax.devices())} if text is None else mesh_sizes(text)
    try:
        return make_mesh(**sizes)
    except MeshError as error:
        hint = ""
        if "there are" in str(error) and jax.default_backend() == "cpu" and count() == 1:
            hint = "; to try it on a CPU: XLA_FLAGS=--xla_force_host_platform_device_count=8"
        raise InputError(f"--{error}{hint}") from error


def describe_mesh(mesh: Any) -> str:
    """One line of text."""
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1) or "1 device"
    devices = f"{mesh.size} of {mesh.devices.flat[0].device_kind}"
    return f"{sizes}: {devices}" + (f" in {count()} processes" if count() > 1 else "")
