"""k8s/: the overlays render and match the schemas, and every command, name and number in them is correct."""

import copy
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from conftest import ROOT, TINY
from ports import free_port
from ranks import descendants, newest_step

from pipeline.cli import parse_train
from pipeline.config import TrainConfig

Doc = dict[str, Any]
BIN = Path(sys.executable).parent
OVERLAYS = ("demo", "gpu")
KUBERNETES = "1.33"
COMPONENT = "app.kubernetes.io/component"
KUBECTL = shutil.which("kubectl")
CONTAINERFILE = ROOT / "k8s" / "Containerfile"

# ------------------------------------------------------------------------------------------ rendering


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Doc]]:
    """Render each overlay as `kubectl apply -k` would send it, with the example's secrets."""
    version = subprocess.run(["kubectl", "version", "--client"], capture_output=True, text=True) if KUBECTL else None
    if version is None or not re.search(r"Kustomize Version: v[5-9]", version.stdout):
        pytest.skip("needs kubectl 1.27 or newer (kustomize 5): Debian 13's kubernetes-client, not Debian 12's")
    tree = tmp_path_factory.mktemp("k8s") / "k8s"
    shutil.copytree(ROOT / "k8s", tree)
    documents = {}
    for name in OVERLAYS:
        folder = tree / "overlays" / name
        shutil.copy(folder / "secrets.env.example", folder / "secrets.env")
        result = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "Warning" not in result.stderr, result.stderr
        documents[name] = [doc for doc in yaml.safe_load_all(result.stdout) if doc]
    return documents


@pytest.fixture(params=OVERLAYS)
def docs(request: pytest.FixtureRequest, rendered: dict[str, list[Doc]]) -> list[Doc]:
    return rendered[request.param]


def the(docs: list[Doc], kind: str, name: str | None = None) -> Doc:
    """Return the only document of this kind (and name)."""
    (found,) = [doc for doc in docs if doc["kind"] == kind and name in (None, doc["metadata"]["name"])]
    return found


def templates(node: Any, where: str = "") -> Iterator[tuple[str, Doc]]:
    """Yield every pod template in a document, with its path."""
    if isinstance(node, dict):
        for key, value in node.items():
            if isinstance(value, dict) and "containers" in value.get("spec", {}):
                yield f"{where}/{key}", value
            yield from templates(value, f"{where}/{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from templates(value, f"{where}/{i}")


def pods(docs: list[Doc]) -> Iterator[tuple[Doc, str, Doc]]:
    """Document, path and pod spec."""
    for doc in docs:
        for where, template in templates(doc):
            yield doc, f"{doc['kind']} {doc['metadata']['name']}{where}", template["spec"]


def containers(docs: list[Doc]) -> Iterator[tuple[str, Doc, Doc]]:
    """Path, pod spec and container."""
    for _, where, spec in pods(docs):
        for container in spec["containers"] + spec.get("initContainers", []):
            yield f"{where}/{container['name']}", spec, container


# ------------------------------------------------------------------------------------------ schemas

SCHEMAS: Doc = {}
for _file in sorted((ROOT / "tests" / "schemas").glob("*.yaml")):
    SCHEMAS |= yaml.safe_load(_file.read_text())
VERSIONS = {"RayCluster": "ray.io/v1", "RayJob": "ray.io/v1", "MPIJob": "kubeflow.org/v2beta1"}


def closed(schema: Any) -> Any:
    """Make the schema strict: refuse fields that it does not name, including those that were cut from it."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-cut", "core/v1 PodTemplateSpec") != "core/v1 PodTemplateSpec":
        return False
    tight = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        tight["additionalProperties"] = False
        # The API server fills in defaults before it checks for required fields.
        tight["required"] = [n for n in schema.get("required", []) if "default" not in schema["properties"][n]]
    return tight


def problems(doc: Doc) -> list[str]:
    """Return a line for each schema violation of a document."""
    kind = doc["kind"]
    try:
        if kind not in SCHEMAS:
            kubernetes_validate.validate(doc, KUBERNETES, strict=True)
            return []
        found = [e.message for e in jsonschema.Draft202012Validator(closed(SCHEMAS[kind])).iter_errors(doc["spec"])]
        found += [f"{key}: no such field" for key in doc.keys() - {"apiVersion", "kind", "metadata", "spec"}]
        for where, template in places(doc):
            wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
            try:
                kubernetes_validate.validate(wrapped, KUBERNETES, strict=True)
            except jsonschema.ValidationError as error:
                found.append(f"{where}: {error.message}")
        return found or traps(doc)
    except jsonschema.ValidationError as error:
        return [error.message]


def places(doc: Doc) -> Iterator[tuple[str, Any]]:
    """Yield the contents of a custom resource's pod template fields."""
    spec = doc["spec"]
    cluster = spec.get("rayClusterSpec", spec) if doc["kind"].startswith("Ray") else {}
    groups = {"head": cluster.get("headGroupSpec")} | {
        str(i): group for i, group in enumerate(cluster.get("workerGroupSpecs", []))
    }
    groups |= spec.get("mpiReplicaSpecs", {})
    for name, group in groups.items():
        if group:
            yield name, group.get("template")
    if "submitterPodTemplate" in spec:
        yield "submitter", spec["submitterPodTemplate"]


def traps(doc: Doc) -> list[str]:
    """Return what the schemas allow in a document but the operators refuse or treat unexpectedly."""
    spec, found = doc["spec"], []

    def must(true: bool, message: str) -> None:
        if not true:
            found.append(message)

    must(doc["apiVersion"] == VERSIONS[doc["kind"]], "apiVersion")
    if doc["kind"] == "RayJob":
        must(spec.get("submissionMode", "K8sJobMode") in ("K8sJobMode", "HTTPMode"), "submissionMode starts nothing")
        must(bool(spec.get("shutdownAfterJobFinishes")), "the cluster, and its price, outlive the job")
        must(spec.get("ttlSecondsAfterFinished", 0) > 0, "the cluster's logs go with the job")
        must(("rayClusterSpec" in spec) != ("clusterSelector" in spec), "one of rayClusterSpec and clusterSelector")
        restart = spec.get("submitterPodTemplate", {"spec": {}})["spec"].get("restartPolicy", "Never")
        must(restart in ("Never", "OnFailure"), "submitter's restartPolicy")
    if doc["kind"] == "MPIJob":
        replicas = spec.get("mpiReplicaSpecs", {})
        must(set(replicas) == {"Launcher", "Worker"}, "mpiReplicaSpecs has Launcher and Worker, so spelt")
        must(replicas.get("Launcher", {}).get("replicas", 1) == 1, "one launcher")
        must(spec.get("launcherCreationPolicy", "AtStartup") in ("AtStartup", "WaitForWorkersReady"), "creation policy")
        must(spec.get("runPolicy", {}).get("cleanPodPolicy", "None") in ("None", "Running", "All"), "cleanPodPolicy")
        for name, replica in replicas.items():
            must(replica.get("restartPolicy", "Never") in ("Never", "OnFailure"), f"{name}: restartPolicy")
            must("restartPolicy" not in (replica.get("template") or {}).get("spec", {}), f"{name}: overridden")
    return found


def test_every_object_fits_its_schema(docs: list[Doc]) -> None:
    assert {doc["kind"] for doc in docs} >= {"RayCluster", "RayJob", "MPIJob", "Deployment", "StatefulSet", "Secret"}
    for doc in docs:
        assert problems(doc) == [], f"{doc['kind']} {doc['metadata']['name']}"
        assert doc["metadata"][("namespace", "name")[doc["kind"] == "Namespace"]] == "iddpm"


GONE = type("Gone", (), {"__repr__": lambda _: "gone"})()  # equal names in every test process
POD = "template.spec.containers.0"
WRONG = [
    ("Deployment", "spec.replicas", "two"),
    ("Deployment", "spec.template.spec.containers", GONE),
    ("Deployment", f"spec.{POD}.readinesProbe", {}),
    ("StatefulSet", f"spec.{POD}.ports.0.containerPort", "http"),
    ("ConfigMap", "data.NUMBER", 1),
    ("RayCluster", "spec.headGroupSpecs", {}),
    ("RayCluster", "spec.headGroupSpec", GONE),
    ("RayCluster", "spec.headGroupSpec.headService", {}),  # cut from the schema, so not checked, so not allowed
    ("RayCluster", "spec.headGroupSpec.rayStartParams.num-cpus", 0),
    ("RayCluster", "spec.headGroupSpec.template.spec.containers", GONE),
    ("RayCluster", "spec.workerGroupSpecs.0.replicas", "2"),
    ("RayCluster", f"spec.workerGroupSpecs.0.{POD}.resource", {}),
    ("RayCluster", "apiVersion", "ray.io/v1alpha1"),
    ("RayJob", "spec.entrypoint", GONE),
    ("RayJob", "spec.submissionMode", "K8SJobMode"),
    ("RayJob", "spec.shutdownAfterJobFinishes", GONE),
    ("RayJob", "spec.ttlSecondsAfterFinished", "600"),
    ("RayJob", "spec.rayClusterSpec.workerGroupSpecs.0.groupname", "workers"),
    ("RayJob", "spec.submitterPodTemplate.spec.containers.0.imagePullPolice", "Always"),
    ("MPIJob", "spec.mpiImplementation", "OpenMPI5"),
    ("MPIJob", "spec.launcherCreationPolicy", "WaitForWorkers"),
    ("MPIJob", "spec.runPolicy.cleanPodPolicy", "running"),
    ("MPIJob", "spec.slotsPerWorker", "1"),
    ("MPIJob", "spec.mpiReplicaSpecs.worker", {"replicas": 1}),
    ("MPIJob", "spec.mpiReplicaSpecs.Worker.restartPolicy", "Sometimes"),
    ("MPIJob", "spec.mpiReplicaSpecs.Worker.template.spec.containers", GONE),
    ("MPIJob", f"spec.mpiReplicaSpecs.Worker.{POD}.volumeMount", []),
]


@pytest.mark.parametrize(("kind", "path", "value"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_manifest_is_refused(rendered: dict[str, list[Doc]], kind: str, path: str, value: Any) -> None:
    doc = copy.deepcopy(next(doc for doc in rendered["demo"] if doc["kind"] == kind))
    node, *rest = doc, *path.split(".")
    for key in rest[:-1]:
        node = node[int(key)] if isinstance(node, list) else node[key]
    if value is GONE:
        del node[rest[-1]]
    else:
        node[rest[-1]] = value
    assert problems(doc)


# ------------------------------------------------------------------------------------------ commands


def command(container: Doc) -> list[str]:
    return container.get("command", []) + container.get("args", [])


def test_every_command_is_one_that_its_program_takes(docs: list[Doc], monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.prepare

    prepared: list[Any] = []
    monkeypatch.setattr(pipeline.prepare, "prepare", prepared.append)
    commands = {where: command(container) for where, _, container in containers(docs)}
    commands["RayJob"] = shlex.split(the(docs, "RayJob")["spec"]["entrypoint"])
    unchecked = set()
    for where, words in commands.items():
        if words[:2] == ["tini", "--"]:
            words = words[2:]
        if words[:2] == ["sh", "-c"]:
            # Without a hostfile Open MPI 5 starts all ranks on the launcher; by default it binds each to few cores.
            assert words[2].endswith(' exec mpirun --hostfile /etc/mpi/hostfile --bind-to none "$@"'), where
            assert words[3:5] + words[6:9] == ["mpirun", "-n", "python", "-m", "mpi4py"], where
            words = ["python", *words[9:]]
        match words:
            case ["python", "-m", "pipeline.train", *flags]:
                check_training(parse_train(flags)[0])
            case ["python", "-m", "pipeline.prepare", *flags]:
                assert pipeline.prepare.main(flags) == 0, where
                assert prepared.pop().out.startswith("s3://"), where
            case ["mlflow", "server", *flags]:
                from mlflow.cli import server

                assert server.make_context("mlflow server", flags).params["artifacts_destination"].startswith("s3://")
            case ["weed", "-logtostderr=true", "mini", *flags]:
                known = subprocess.run([BIN / "weed", "help", "mini"], capture_output=True, text=True).stderr
                for flag in flags:
                    assert re.search(rf"^\s+{re.escape(flag.split('=')[0])}\b", known, re.M), flag
            case ["/usr/sbin/sshd", "-De"]:
                pass
            case []:
                unchecked.add(where.rpartition("/")[2])  # an operator's command, or the image's
            case _:
                raise AssertionError(f"{where}: {words}")
    assert unchecked == {"ray-head", "ray-worker", "submitter", "postgres"}


def check_training(config: TrainConfig) -> None:
    """A pod's disk is deleted with it, so a run's inputs and outputs must be elsewhere."""
    assert config.out.startswith("s3://")
    assert config.data.url.startswith("s3://")
    assert config.tracking.uri is None  # the environment's


def test_a_run_has_as_many_ranks_as_its_cluster_has_room_for(docs: list[Doc]) -> None:
    def slots(container: Doc) -> int:
        limits = container["resources"]["limits"]
        return int(limits.get("nvidia.com/gpu", limits["cpu"]))

    job, ray = the(docs, "MPIJob")["spec"], the(docs, "RayJob")["spec"]
    worker = job["mpiReplicaSpecs"]["Worker"]
    args = job["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]["args"]
    assert args[:2] == ["-n", str(worker["replicas"] * job["slotsPerWorker"])]
    assert slots(worker["template"]["spec"]["containers"][0]) == job["slotsPerWorker"]

    (group,) = ray["rayClusterSpec"]["workerGroupSpecs"]
    workers = parse_train(shlex.split(ray["entrypoint"])[3:])[0].launch.workers
    assert workers == group["replicas"] * slots(group["template"]["spec"]["containers"][0])
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    assert ray["rayClusterSpec"] == the(docs, "RayCluster")["spec"]


def test_only_the_overlays_device_is_trained_on(rendered: dict[str, list[Doc]]) -> None:
    """With --device cuda, a missing driver stops the run instead of slowing it down."""
    for name, device in (("demo", "auto"), ("gpu", "cuda")):
        args = the(rendered[name], "MPIJob")["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]
        for flags in (args["args"][7:], shlex.split(the(rendered[name], "RayJob")["spec"]["entrypoint"])[3:]):
            assert parse_train(flags)[0].launch.device == device


# ------------------------------------------------------------------------------------------ names

# Read by programs that cannot be queried: OpenMP and NCCL, torch's gloo, the PostgreSQL image.
DOCUMENTED = {"OMP_NUM_THREADS", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"}
DOCUMENTED |= {"POSTGRES_USER", "POSTGRES_PASSWORD", "PGDATA"}


def test_every_variable_is_one_that_a_program_reads(docs: list[Doc]) -> None:
    site = Path(yaml.__file__).parent.parent
    readers = {
        "AWS_": [*(ROOT / "pipeline").rglob("*.py"), *(site / "botocore").glob("*.py")],
        "MLFLOW_": [site / "mlflow" / "environment_variables.py", site / "mlflow" / "cli" / "__init__.py"],
        "RAY_": [*(site / "ray" / "_common").rglob("*.py"), *(site / "ray" / "dashboard" / "modules").rglob("*.py")],
    }
    names = {name for doc in docs if doc["kind"] == "ConfigMap" for name in doc["data"]}
    names |= {variable["name"] for _, _, container in containers(docs) for variable in container.get("env", [])}
    for name in names - DOCUMENTED:
        files = readers[name[: name.index("_") + 1]]
        word = re.compile(rf"\b{name}\b")
        assert any(word.search(file.read_text()) for file in files), name


def test_every_reference_leads_to_something(docs: list[Doc]) -> None:
    maps = {doc["metadata"]["name"] for doc in docs if doc["kind"] == "ConfigMap"}
    secrets = {doc["metadata"]["name"]: doc["data"] for doc in docs if doc["kind"] == "Secret"}
    for where, _, container in containers(docs):
        for source in container.get("envFrom", []):
            assert source["configMapRef"]["name"] in maps, where
        defined = set()
        for variable in container.get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                assert reference["key"] in secrets[reference["name"]], where
            for used in re.findall(r"\$\((\w+)\)", variable.get("value", "")):
                assert used in defined, f"{where}: {used} must come before {variable['name']}"
            defined.add(variable["name"])
        ports = {port["name"] for port in container.get("ports", [])}
        probes = [container.get(name, {}) for name in ("startupProbe", "readinessProbe", "livenessProbe")]
        assert {check[how]["port"] for check in probes for how in ("httpGet", "tcpSocket") if how in check} <= ports
    for doc, where, spec in pods(docs):
        claims = [claim["metadata"]["name"] for claim in doc["spec"].get("volumeClaimTemplates", [])]
        volumes = [volume["name"] for volume in spec.get("volumes", [])] + claims
        mounted = {mount["name"] for c in spec["containers"] for mount in c.get("volumeMounts", [])}
        assert sorted(mounted) == sorted(volumes), where
    for service in (doc for doc in docs if doc["kind"] in ("Service", "NetworkPolicy")):
        selector = service["spec"].get("selector") or service["spec"]["podSelector"]["matchLabels"]
        labelled = [t for doc in docs for _, t in templates(doc) if "metadata" in t]
        (target,) = [t for t in labelled if selector.items() <= t["metadata"]["labels"].items()]
        offered = {port["containerPort"] for c in target["spec"]["containers"] for port in c["ports"]}
        wanted = service["spec"].get("ports") or service["spec"]["ingress"][0]["ports"]
        assert {port["port"] for port in wanted} <= offered
    services = {d["metadata"]["name"]: {p["port"] for p in d["spec"]["ports"]} for d in docs if d["kind"] == "Service"}
    text = yaml.safe_dump_all(doc for doc in docs if doc["kind"] != "Service")
    addresses = re.findall(r"(?:http://|@|=|,)([a-z]+)(?:\.iddpm(?:\.svc\.cluster\.local)?)?:(\d+)", text)
    assert {host for host, _ in addresses if host != "localhost"} == set(services)
    for host, port in addresses:
        assert host == "localhost" or int(port) in services[host]


def test_every_object_belongs_to_a_part_that_the_documentation_applies(docs: list[Doc]) -> None:
    parts = {doc["metadata"]["labels"][COMPONENT] for doc in docs}
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    assert set(re.findall(rf"{re.escape(COMPONENT)}=([a-z]+)", text)) == parts
    for overlay in re.findall(r"k8s/overlays/(\w+)", text):
        assert overlay in OVERLAYS


# ------------------------------------------------------------------------------------------ safety


def test_pods_are_restricted_and_bounded(docs: list[Doc]) -> None:
    user = re.findall(r"^USER (\d+):\d+$", CONTAINERFILE.read_text(), re.M)
    for doc, where, spec in pods(docs):
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, where
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert spec["automountServiceAccountToken"] is False, where
        for container in spec["containers"]:
            image, _, tag = container["image"].rpartition(":")
            assert image, f"{where}: {tag}"
            assert tag != "latest", where
            ours = image.rpartition("/")[2] == "iddpm"
            assert str(security["runAsUser"]) in (user if ours else ["999"]), where
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, where
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), where
            assert "memory" in container["resources"]["limits"], where
            places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert "/tmp" in places, where
            assert not ours or "/home/iddpm" in places, where
            if doc["kind"] in ("Deployment", "StatefulSet"):
                assert {"readinessProbe", "livenessProbe"} <= container.keys(), where
            if "orker" in where or container["name"] == "ray-head":
                (shm,) = [volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == places["/dev/shm"]]
                assert shm["medium"] == "Memory", where
                assert size(shm["sizeLimit"]) <= size(container["resources"]["limits"]["memory"]) / 4, where


def size(text: str) -> int:
    """Convert `512Mi` to bytes."""
    number, unit = re.fullmatch(r"(\d+)([KMG])i", text).groups()  # type: ignore[union-attr]
    return int(number) << 10 * ("KMG".index(unit) + 1)


def test_no_secret_is_in_the_tree() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs git's own view of the tree, and this is no checkout")
    git = ["git", "-C", str(ROOT)]
    files = subprocess.run([*git, "ls-files", "k8s"], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in files if name.endswith("secrets.env")]
    for overlay in OVERLAYS:
        path = f"k8s/overlays/{overlay}/secrets.env"
        assert subprocess.run([*git, "check-ignore", "-q", path]).returncode == 0, path
        example = (ROOT / f"{path}.example").read_text()
        values = dict(line.split("=", 1) for line in example.splitlines() if not line.startswith("#"))
        assert set(values.values()) <= {"change-me", "iddpm"}


# ------------------------------------------------------------------------------------------ the image


def steps() -> list[tuple[str, str]]:
    """Yield the Containerfile's instructions, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", CONTAINERFILE.read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split()[0], " ".join(line.split()[1:])) for line in text.splitlines() if line.strip()]


def test_the_containerfile_is_clean() -> None:
    result = subprocess.run([BIN / "hadolint", CONTAINERFILE], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_image_is_built_from_what_is_here_as_make_builds_its_environment() -> None:
    run = " ".join(text for kind, text in steps() if kind == "RUN")
    copied = [source for kind, text in steps() if kind == "COPY" for source in text.split()[:-1]]
    sent = [line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(Path(source).is_relative_to(folder) for folder in sent), f"{source} is not sent to the build"
    for folder in sent:
        assert any(Path(source).is_relative_to(folder) for source in copied), f"{folder} is sent for nothing"
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {pattern.rstrip("*") for pattern in packages["find"]["include"]} <= set(copied)
    # Packages before sources, so that a change of the sources does not rebuild their layer.
    kinds = [text.split()[0] if kind == "COPY" else kind for kind, text in steps()]
    assert (
        kinds.index("requirements.lock") < kinds.index("RUN", kinds.index("requirements.lock")) < kinds.index("iddpm")
    )
    recipe = (ROOT / "Makefile").read_text().split("$(INSTALLED): requirements.lock")[1].split("\n\n")[0]
    installs = [line for line in recipe.splitlines() if " install " in line]
    assert len(installs) == 3
    for line in installs:
        arguments = re.sub(r"^.* install |--python \S+|--quiet", "", line).split()
        assert any(set(arguments) <= set(part.split()) for part in re.split("&&|;", run)), line.strip()
    assert f'"{importlib.metadata.version("ray")}"' in (ROOT / "k8s/base/raycluster.yaml").read_text()


def test_the_image_has_the_programs_that_the_manifests_start(docs: list[Doc]) -> None:
    installed = " ".join(text for kind, text in steps() if kind == "RUN" and "apt-get" in text).split()
    packages = {"tini": "tini", "sh": None, "pkill": "procps", "pgrep": "procps", "/usr/sbin/sshd": "openssh-server"}
    used = set()
    for _, _, container in containers(docs):
        if container["image"].startswith("postgres"):
            continue
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        used |= {word for words in (command(container), hook) for line in words for word in line.split()}
        used |= set(command(container)[:1])
    for program in used & packages.keys():
        assert packages[program] is None or packages[program] in installed, program
    for program in ("python", "mpirun", "mlflow", "ray"):  # of the environment that requirements.lock describes
        assert (BIN / program).exists()
    assert {"wget", "openssh-client"} <= set(installed)  # KubeRay's probes, mpirun


def pod() -> list[str]:
    """Return a command that runs another as process 1, with its own view of processes and mounts."""
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if os.geteuid() != 0 or subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs root with the right to make namespaces (unshare)")
    return unshare


POD_WITH_SSHD = """
set -e
mount -t tmpfs tmpfs /home
cp k8s/ssh/* /home
mkdir -p /home/iddpm/.ssh
cd /home/iddpm/.ssh
ssh-keygen -q -t ecdsa -b 521 -m PEM -N '' -f id_rsa
cp id_rsa.pub authorized_keys
chmod 644 *
(cat /etc/passwd; echo iddpm:x:4711:4711::/home/iddpm:/bin/sh) > /home/passwd
mount --bind /home/passwd /etc/passwd
mount --bind /home/ssh_config /etc/ssh/ssh_config
exec setpriv --reuid 4711 --regid 4711 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \\
  env -i SECRET='of the pod' sh -c '
    /usr/sbin/sshd -De -f /home/sshd_config -o ListenAddress=127.0.0.1 -p PORT &
    ssh -p PORT 127.0.0.1 "echo \\$SECRET; id -u"'
"""


@pytest.mark.slow
def test_a_worker_pods_sshd_lets_the_launcher_in_and_gives_it_the_pods_environment() -> None:
    """Run as an ordinary user without privileges, with the operator's keys, owned by another user and world-readable.

    The shell that starts sshd is process 1 here, as tini is in the pod.
    """
    if not Path("/usr/sbin/sshd").exists():
        pytest.skip("needs sshd: apt-get install openssh-server")
    script = POD_WITH_SSHD.replace("PORT", str(free_port()))
    result = subprocess.run([*pod(), "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines() == ["of the pod", "4711"], result.stdout + result.stderr


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A folder whose path is short enough for MPI's sockets in it."""
    with tempfile.TemporaryDirectory(prefix="mpi-", dir="/tmp") as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.mpi
def test_the_hooks_of_a_pod_that_stops_make_the_run_checkpoint(
    rendered: dict[str, list[Doc]], digits: str, tmp_path: Path, short_folder: str
) -> None:
    """The launcher's command and both preStop hooks, in a separate process namespace as in a pod."""
    unshare = pod()
    replicas = the(rendered["demo"], "MPIJob")["spec"]["mpiReplicaSpecs"]
    words = command(replicas["Launcher"]["template"]["spec"]["containers"][0])
    start = words[words.index("sh") : words.index("pipeline.train") + 1]  # as process 1, in tini's place
    start[2] = start[2].replace("--hostfile /etc/mpi/hostfile", "--allow-run-as-root --oversubscribe")
    start += [*TINY, "--horizon", "4000steps", "--checkpoint-every", "10"]
    start += ["--data.url", digits, "--out", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI"))}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    environment["TMPDIR"] = short_folder
    step = 10
    for role in ("Worker", "Launcher"):
        hook = replicas[role]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        with (tmp_path / role).open("w") as log:
            run = subprocess.Popen([*unshare, *start], cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            wait_for(lambda step=step: newest_step(tmp_path / "out") >= step, run, tmp_path / role)
            inside = ("nsenter", "-t", str(descendants(run.pid)[0]), "-p", "-m")
            subprocess.run([*inside, *hook], timeout=60, capture_output=True)
            assert run.wait(120) == 75, (tmp_path / role).read_text()
        finally:
            run.kill()
        said = (tmp_path / role).read_text()
        assert "checkpointed; the same command resumes" in said
        step = newest_step(tmp_path / "out") + 10


def wait_for(true: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline, log.read_text()
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
