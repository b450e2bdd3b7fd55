"""The manifests of docs/scaling start what there is: flags, ports, paths and fields, read off the files themselves."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path

import pytest
import yaml

from jaxpaged.app.commands import serve

FOLDER = Path(__file__).parents[2] / "docs" / "examples"


def documents(name: str) -> dict[str, dict]:
    """Documents of a file, by kind."""
    return {one["kind"]: one for one in yaml.safe_load_all((FOLDER / name).read_text())}


def given(flags: list[str]) -> dict:
    """Flags parsed by ``jaxpaged serve``, which refuses unknown ones."""
    return serve.make_context("jaxpaged serve", [f for f in flags if "/models/" not in f]).params


def test_the_deployment_starts_a_server_that_its_probes_find():
    found = documents("kubernetes.yaml")
    spec = found["Deployment"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["jaxpaged", "serve"]
    options = given(container["args"])
    (port,) = container["ports"]
    assert port["containerPort"] == options["port"]
    assert pod["terminationGracePeriodSeconds"] > options["drain_seconds"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    labels = spec["template"]["metadata"]["labels"].items()
    for selector in (
        spec["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_the_ray_service_names_the_function_and_fields_that_there_are():
    spec = documents("rayservice.yaml")["RayService"]["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    module, name = application["import_path"].split(":")
    tree = ast.parse((FOLDER / f"{module}.py").read_text())  # Ray is not installed here
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    (arguments,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Arguments")
    fields = {node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign)}
    assert set(application["args"]) <= fields
    given(shlex.split(application["args"]["flags"]))
    workers = spec["rayClusterConfig"]["workerGroupSpecs"][0]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == application["args"]["gpus"]
    assert workers["replicas"] == application["args"]["replicas"]


def test_a_flag_that_does_not_exist_is_noticed():
    import click

    with pytest.raises(click.UsageError):
        given(["--no-such-flag"])
