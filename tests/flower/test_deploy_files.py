"""The container files say what docs/deploy.md says, whose commands the tests of the deployment run."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from deploy_files import DEPLOY, manifests, services, shell_commands

from fedsmoothlora.config import read
from fedsmoothlora.flower.app_folder import PORT, QUIET
from fedsmoothlora.flower.server_app import check_for_sites

PAGE = (DEPLOY.parent / "docs" / "deploy.md").read_text(encoding="utf-8")
SITES = ["hospital-a", "hospital-b", "hospital-c"]


def arguments(commands: str, program: str) -> list[str]:
    """The arguments of the last command that starts a program."""
    joined = commands.replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if program in line]
    words = shlex.split(lines[-1])
    return words[words.index(program) + 1 :]


def documented(program: str) -> list[str]:
    block = next(
        text
        for text in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
        if re.search(rf"^{program} ", text, re.M)
    )
    return arguments(block, program)


def test_the_coordinator_of_the_containers_is_the_documented_one() -> None:
    right = documented("flower-superlink")
    assert arguments(shell_commands(services()["coordinator"]["command"]), "flower-superlink") == right
    (pod,) = [one for one in manifests("coordinator.yaml") if one["kind"] == "StatefulSet"]
    (container,) = pod["spec"]["template"]["spec"]["containers"]
    found = arguments(shell_commands(container["command"]), "flower-superlink")
    assert [word.replace("/certificates/", "certificates/") for word in found] == right


@pytest.mark.parametrize("site", SITES)
def test_the_sites_of_the_containers_are_the_documented_ones(site: str) -> None:
    service = services()[site]
    commands = shell_commands(service["command"]).replace("$SITE", service["environment"]["SITE"])
    right = [
        word.replace("fl.example.org", "coordinator").replace("hospital-a", site).replace("/data/a", "/data")
        for word in documented("flower-supernode")
    ]
    assert arguments(commands, "flower-supernode") == right
    mounted = {volume.rpartition(":/")[0]: volume for volume in service["volumes"]}
    assert f"${{DATA:-./data}}/{site}:/data:ro" in service["volumes"]
    assert mounted.keys() & set(SITES) == {site}, "a site's container sees the folder of no other site"


def test_the_site_of_kubernetes_is_the_documented_one() -> None:
    (pod,) = [one for one in manifests("site.yaml") if one["kind"] == "StatefulSet"]
    (container,) = pod["spec"]["template"]["spec"]["containers"]
    program, *found = container["command"]
    assert program == "flower-supernode"
    assert [word.replace("/keys/", "") for word in found] == [
        word.replace("/data/a", "/data") for word in documented("flower-supernode")
    ]


def test_the_image_switches_off_what_a_federation_switches_off() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    for key, value in QUIET.items():
        assert re.search(rf"\b{key}={value}\b", text), key


def test_the_image_holds_the_files_that_the_build_copies() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE) for name in line.split()
    }
    kept = {
        line[1:]
        for line in (DEPLOY.parent / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    assert copied == kept
    assert all((DEPLOY.parent / name).exists() for name in copied)


def test_the_configuration_can_be_run_by_sites_and_is_that_of_kubernetes(tmp_path: Path) -> None:
    config = read(DEPLOY / "hospitals.toml")
    check_for_sites(config)
    assert list(config.flower.clients) == SITES
    (there,) = [one["data"]["my.toml"] for one in manifests("coordinator.yaml") if one["kind"] == "ConfigMap"]
    table = tomllib.loads((DEPLOY / "hospitals.toml").read_text(encoding="utf-8"))
    del table["description"]
    assert tomllib.loads(there) == table


def test_the_coordinator_s_containers_see_the_test_set() -> None:
    test = read(DEPLOY / "hospitals.toml").data.test
    assert test is not None
    for name in ("prepare", "coordinator"):
        assert any(volume.split(":")[-2] == test for volume in services()[name]["volumes"]), name
    (pod,) = [one for one in manifests("coordinator.yaml") if one["kind"] == "StatefulSet"]
    (container,) = pod["spec"]["template"]["spec"]["containers"]
    assert any(Path(mount["mountPath"]) in Path(test).parents for mount in container["volumeMounts"])


@pytest.mark.parametrize("name", ["coordinator.yaml", "site.yaml"])
def test_every_volume_that_a_pod_of_kubernetes_mounts_is_defined(name: str) -> None:
    (pod,) = [one["spec"]["template"]["spec"] for one in manifests(name) if one["kind"] == "StatefulSet"]
    defined = {volume["name"] for volume in pod["volumes"]}
    for container in [*pod.get("initContainers", ()), *pod["containers"]]:
        assert {mount["name"] for mount in container["volumeMounts"]} == defined


def test_all_containers_of_kubernetes_use_the_same_image_and_port() -> None:
    everything = manifests("coordinator.yaml") + manifests("site.yaml")
    pods = [one["spec"]["template"]["spec"] for one in everything if one["kind"] == "StatefulSet"]
    containers = [one for pod in pods for key in ("initContainers", "containers") for one in pod.get(key, ())]
    assert len({one["image"] for one in containers}) == 1
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in pods)
    (service,) = [one for one in everything if one["kind"] == "Service"]
    assert service["spec"]["ports"][0]["port"] == PORT
    policies = [one["spec"] for one in everything if one["kind"] == "NetworkPolicy"]
    (egress,) = [one["egress"] for one in policies if "Egress" in one["policyTypes"]]
    assert {port["port"] for rule in egress for port in rule["ports"]} == {PORT, 53}


@pytest.mark.parametrize("name", ["prepare.sh", "register.sh"])
def test_shells_can_read_the_scripts(name: str) -> None:
    subprocess.run(["sh", "-n", str(DEPLOY / name)], check=True, timeout=10)
