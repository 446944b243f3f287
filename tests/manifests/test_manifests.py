"""What every overlay under k8s/overlays promises, checked on what kustomize renders from it.

No cluster and no Ray is started. The renderer is kubectl, or kustomize where kubectl is missing; without either the
tests are skipped on a laptop and fail in CI.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from banjoray.config.job import JobConfig, load_job

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = sorted(path.parent for path in ROOT.glob("k8s/overlays/*/kustomization.yaml"))
COMPONENTS = sorted(path.parent for path in ROOT.glob("k8s/components/*/kustomization.yaml"))
SERVE_CONFIG = ROOT / "serve_configs" / "quickstart.yaml"
APP = {"app.kubernetes.io/name": "banjoray"}
COMPONENT = "app.kubernetes.io/component"
GPU = "nvidia.com/gpu"

Manifest = dict[str, Any]


@cache
def render(folder: Path) -> tuple[Manifest, ...]:
    """The resources that ``kubectl apply -k folder`` would send."""
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize", str(folder)]
    elif shutil.which("kustomize"):
        command = ["kustomize", "build", str(folder)]
    elif os.environ.get("CI"):
        pytest.fail("neither kubectl nor kustomize is on PATH, and CI has to render the manifests")
    else:
        pytest.skip("neither kubectl nor kustomize is on PATH")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def render_with(component: Path, folder: Path) -> tuple[Manifest, ...]:
    """The CPU overlay plus one component, rendered from a kustomization made in ``folder``."""
    paths = {"resources": ROOT / "k8s" / "overlays" / "cpu", "components": component}
    kustomization = {key: [os.path.relpath(path, folder.resolve())] for key, path in paths.items()}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    return render(folder)


def of_kind(manifests: tuple[Manifest, ...], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def ray(manifests: tuple[Manifest, ...]) -> list[Manifest]:
    return of_kind(manifests, "RayJob", "RayService")


def cluster(manifest: Manifest) -> Manifest:
    """The Ray cluster inside a RayJob or a RayService."""
    found: Manifest = manifest["spec"]["rayClusterSpec" if manifest["kind"] == "RayJob" else "rayClusterConfig"]
    return found


def worker_pods(manifest: Manifest) -> list[Manifest]:
    return [group["template"] for group in cluster(manifest)["workerGroupSpecs"]]


def pods(manifests: tuple[Manifest, ...]) -> Iterator[tuple[str, Manifest]]:
    """Every pod template that Ray runs in, with a name for messages."""
    for manifest in ray(manifests):
        name = manifest["metadata"]["name"]
        yield f"{name} head", cluster(manifest)["headGroupSpec"]["template"]
        yield from ((f"{name} workers", pod) for pod in worker_pods(manifest))


def containers(manifests: tuple[Manifest, ...]) -> Iterator[tuple[str, Manifest]]:
    for name, pod in pods(manifests):
        yield from ((name, container) for container in pod["spec"]["containers"])


def job_of(manifest: Manifest) -> tuple[Path, JobConfig]:
    """The job file that a RayJob's entrypoint names, and the job with the entrypoint's ``--set`` applied."""
    program, verb, file, *options = shlex.split(manifest["spec"]["entrypoint"])
    assert (program, verb) == ("banjoray", manifest["metadata"]["labels"][COMPONENT])
    assert options[::2] == ["--set"] * (len(options) // 2)
    return ROOT / file, load_job(ROOT / file, options[1::2])


def limit(pod: Manifest, resource: str) -> int:
    return int(pod["spec"]["containers"][0]["resources"]["limits"].get(resource, 0))


@pytest.fixture(params=OVERLAYS, ids=lambda path: str(path.name))
def overlay(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@pytest.fixture
def manifests(overlay: Path) -> tuple[Manifest, ...]:
    return render(overlay)


def test_there_is_an_overlay_for_cpus_and_one_for_gpus() -> None:
    assert {path.name for path in OVERLAYS} >= {"cpu", "gpu"}


def test_each_overlay_holds_one_training_one_search_and_one_service(manifests: tuple[Manifest, ...]) -> None:
    kinds = {manifest["metadata"]["labels"][COMPONENT]: manifest["kind"] for manifest in ray(manifests)}
    assert kinds == {"train": "RayJob", "tune": "RayJob", "serve": "RayService"}
    assert len(ray(manifests)) == 3


def test_one_label_selects_one_part_and_storage_is_what_the_parts_share(manifests: tuple[Manifest, ...]) -> None:
    for manifest in manifests:
        assert manifest["metadata"]["labels"].items() >= APP.items()
    shared = [manifest["kind"] for manifest in manifests if manifest["metadata"]["labels"][COMPONENT] == "storage"]
    assert sorted(shared) == ["NetworkPolicy", "PersistentVolumeClaim", "ServiceAccount"]
    assert len(shared) + len(ray(manifests)) == len(manifests)


def test_names_are_fixed_and_nothing_local_reaches_a_cluster(manifests: tuple[Manifest, ...]) -> None:
    for manifest in manifests:
        assert manifest["metadata"]["name"].startswith("banjoray")
        assert "generateName" not in manifest["metadata"]
        assert "config.kubernetes.io/local-config" not in manifest["metadata"].get("annotations", {})


def test_worker_pods_survive_the_patches_whole(manifests: tuple[Manifest, ...]) -> None:
    # A strategic-merge patch on workerGroupSpecs replaces the list and drops the pod template without a word.
    for manifest in ray(manifests):
        head = cluster(manifest)["headGroupSpec"]["template"]
        for pod in worker_pods(manifest):
            assert pod["metadata"] == head["metadata"]
            assert pod["spec"].keys() - {"tolerations"} == head["spec"].keys()
            (container,), (of_head,) = pod["spec"]["containers"], head["spec"]["containers"]
            assert container | {"resources": None} == of_head | {"resources": None}
            assert container["resources"].keys() == {"requests", "limits"}


def test_every_pod_runs_a_pinned_banjoray_image(overlay: Path, manifests: tuple[Manifest, ...]) -> None:
    for name, container in containers(manifests):
        image, _, tag = container["image"].rpartition(":")
        assert image.split("/")[-1] == "banjoray", name
        assert re.match(r"\d+\.\d+\.\d+", tag), f"{name}: {container['image']} is not pinned"
        assert tag.endswith("-gpu") == (overlay.name == "gpu"), name


def test_runs_and_registry_are_one_volume_at_the_paths_that_job_files_name(manifests: tuple[Manifest, ...]) -> None:
    (claim,) = of_kind(manifests, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name, pod in pods(manifests):
        volume, keys = pod["spec"]["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"], name
        # Keys are no part of what runs share, and a cluster without them starts as well.
        assert keys["secret"]["optional"] is True, name
        (container,) = pod["spec"]["containers"]
        shared = [mount for mount in container["volumeMounts"] if mount["name"] == volume["name"]]
        mounts = {mount["mountPath"]: mount["subPath"] for mount in shared}
        assert mounts == {f"{container['workingDir']}/{folder}": folder for folder in ("runs", "registry")}, name
    for manifest in of_kind(manifests, "RayJob"):
        _, job = job_of(manifest)
        assert (job.storage, job.registry.root) == ("./runs", "./registry")


def test_the_service_runs_the_serve_config_as_it_is_written(manifests: tuple[Manifest, ...]) -> None:
    (service,) = of_kind(manifests, "RayService")
    rendered = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert rendered == yaml.safe_load(SERVE_CONFIG.read_text(encoding="utf-8"))


# Ray 2.60's schema module uses a spelling that pydantic has deprecated.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning")
def test_the_serve_config_is_valid_for_ray_serve_and_names_no_host() -> None:
    from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

    written = yaml.safe_load(SERVE_CONFIG.read_text(encoding="utf-8"))
    ServeDeploySchema.model_validate(written)
    for application in written["applications"]:
        # Ray passes over a key that it doesn't know here: a misspelt limit would be no limit.
        assert application.keys() <= ServeApplicationSchema.model_fields.keys()
        for deployment in application["deployments"]:
            assert deployment.keys() <= DeploymentSchema.model_fields.keys()
    # With a host in the file, either a laptop would listen to everybody or a cluster to nobody.
    assert "http_options" not in written


def test_the_service_asks_for_a_model_that_the_training_job_registers(manifests: tuple[Manifest, ...]) -> None:
    registered = {job.model_name for _, job in map(job_of, of_kind(manifests, "RayJob"))}
    for application in yaml.safe_load(SERVE_CONFIG.read_text(encoding="utf-8"))["applications"]:
        assert application["args"]["model"].partition("@")[0] in registered


def test_all_replicas_fit_on_the_workers(manifests: tuple[Manifest, ...]) -> None:
    (service,) = of_kind(manifests, "RayService")
    wanted = 0.0
    for application in yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]:
        for deployment in application["deployments"]:
            replicas = deployment["autoscaling_config"]["max_replicas"]
            assert not deployment["ray_actor_options"].get("num_gpus"), "the service's workers have no GPU"
            wanted += replicas * deployment["ray_actor_options"]["num_cpus"]
    groups = cluster(service)["workerGroupSpecs"]
    assert wanted <= sum(group["replicas"] * limit(group["template"], "cpu") for group in groups)


def test_entrypoints_name_job_files_and_settings_that_exist(manifests: tuple[Manifest, ...]) -> None:
    for manifest in of_kind(manifests, "RayJob"):
        file, job = job_of(manifest)
        assert file.parent == ROOT / "jobs"
        assert file.is_file()
        assert (job.tune is not None) >= (manifest["metadata"]["labels"][COMPONENT] == "tune")


def test_the_workers_hold_what_the_entrypoints_ask_for(manifests: tuple[Manifest, ...]) -> None:
    for manifest in of_kind(manifests, "RayJob"):
        name, scale = manifest["metadata"]["name"], job_of(manifest)[1].scale
        (group,) = cluster(manifest)["workerGroupSpecs"]
        for resource, each in (("cpu", scale.cpus_per_worker), (GPU, scale.gpus_per_worker)):
            room = limit(group["template"], resource)
            assert each <= room, f"{name}: a worker wants {each} {resource}, a pod has {room}"
            slots = group["replicas"] * (room // each) if each else scale.most_workers
            assert scale.most_workers <= slots, f"{name}: {scale.most_workers} workers, room for {slots} by {resource}"


def test_only_the_gpu_overlay_asks_for_gpus_and_only_for_the_workers_of_jobs(
    overlay: Path, manifests: tuple[Manifest, ...]
) -> None:
    with_gpu = {name for name, pod in pods(manifests) if limit(pod, GPU)}
    tolerating = {name for name, pod in pods(manifests) if GPU in str(pod["spec"].get("tolerations"))}
    jobs = {f"{manifest['metadata']['name']} workers" for manifest in of_kind(manifests, "RayJob")}
    assert with_gpu == tolerating == (jobs if overlay.name == "gpu" else set())
    for manifest in of_kind(manifests, "RayJob"):
        assert bool(job_of(manifest)[1].scale.gpus_per_worker) == (overlay.name == "gpu")


def test_the_head_runs_no_workers_and_no_replicas(manifests: tuple[Manifest, ...]) -> None:
    for manifest in ray(manifests):
        assert cluster(manifest)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_token_authentication_is_on_everywhere(manifests: tuple[Manifest, ...]) -> None:
    for manifest in ray(manifests):
        assert cluster(manifest)["authOptions"] == {"mode": "token"}
        # KubeRay refuses token authentication before Ray 2.52.
        assert tuple(map(int, cluster(manifest)["rayVersion"].split("."))) >= (2, 52)
    for name, container in containers(manifests):
        # KubeRay leaves a variable alone that is set already: one here could switch the token off.
        assert not [entry for entry in container["env"] if entry["name"].startswith("RAY_AUTH")], name


def test_no_service_shows_the_dashboard_outside(manifests: tuple[Manifest, ...]) -> None:
    for manifest in ray(manifests):
        head = cluster(manifest)["headGroupSpec"]
        # KubeRay gives this type to the head's and to Serve's service; both lead to the head's pod.
        assert head["serviceType"] == "ClusterIP"
        assert not head.get("enableIngress", False)
    custom = [manifest["spec"].get("serveService") for manifest in of_kind(manifests, "RayService")]
    for service in [*of_kind(manifests, "Service"), *filter(None, custom)]:
        opened = {port["port"] for port in service["spec"].get("ports", [])}
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP" or 8265 not in opened


def test_the_network_policy_covers_every_ray_pod(manifests: tuple[Manifest, ...]) -> None:
    (policy,) = of_kind(manifests, "NetworkPolicy")
    selected = policy["spec"]["podSelector"]["matchLabels"]
    assert selected == APP
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    for name, pod in pods(manifests):
        assert pod["metadata"]["labels"].items() >= selected.items(), name


def test_the_dashboard_is_reached_by_the_app_and_the_operator_only(manifests: tuple[Manifest, ...]) -> None:
    (policy,) = of_kind(manifests, "NetworkPolicy")
    allowed = []
    for rule in policy["spec"]["ingress"]:
        if 8265 in {port["port"] for port in rule.get("ports", [{"port": 8265}])}:
            allowed += [peer["podSelector"]["matchLabels"] for peer in rule["from"]]
    assert allowed == [APP, {COMPONENT: "kuberay-operator"}]


def test_pods_have_no_root_no_capabilities_and_no_kubernetes_token(manifests: tuple[Manifest, ...]) -> None:
    (account,) = of_kind(manifests, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    for name, pod in pods(manifests):
        assert pod["spec"]["serviceAccountName"] == account["metadata"]["name"], name
        assert pod["spec"]["automountServiceAccountToken"] is False, name
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True, name
    for name, container in containers(manifests):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }, name


def test_secrets_are_named_and_never_written_down(manifests: tuple[Manifest, ...]) -> None:
    assert not of_kind(manifests, "Secret")
    for name, container in containers(manifests):
        token = next(entry for entry in container["env"] if entry["name"] == "HF_TOKEN")
        assert token["valueFrom"]["secretKeyRef"] == {"name": "banjoray-hub", "key": "token", "optional": True}, name


def test_training_pods_are_not_evicted_lightly(manifests: tuple[Manifest, ...]) -> None:
    for name, pod in pods(manifests):
        annotations = pod["metadata"]["annotations"]
        assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false", name
        assert annotations["karpenter.sh/do-not-disrupt"] == "true", name
    for name, container in containers(manifests):
        # Kubernetes fills in a missing request for a GPU from its limit.
        limits = {key: value for key, value in container["resources"]["limits"].items() if key != GPU}
        assert container["resources"]["requests"] == limits, name


def test_jobs_give_their_cluster_back(manifests: tuple[Manifest, ...]) -> None:
    for manifest in of_kind(manifests, "RayJob"):
        spec = manifest["spec"]
        assert spec["shutdownAfterJobFinishes"] is True
        assert 0 < spec["ttlSecondsAfterFinished"] <= 3600
        assert 0 <= spec["backoffLimit"] <= 1
        assert spec["submissionMode"] == "HTTPMode"


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda path: str(path.name))
def test_every_component_fits_on_the_cpu_overlay(component: Path, tmp_path: Path) -> None:
    plain, changed = render(ROOT / "k8s" / "overlays" / "cpu"), render_with(component, tmp_path)
    assert [manifest["metadata"]["name"] for manifest in changed] == [item["metadata"]["name"] for item in plain]
    assert changed != plain


def test_a_highly_available_service_keeps_its_state_in_redis_and_its_traffic_off_the_head(tmp_path: Path) -> None:
    (service,) = of_kind(render_with(ROOT / "k8s" / "components" / "ha", tmp_path), "RayService")
    options = cluster(service)["gcsFaultToleranceOptions"]
    assert options["redisAddress"]
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"]["name"]
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True


def test_image_manifests_and_constraints_agree_on_ray() -> None:
    dockerfile = (ROOT / "k8s" / "Dockerfile").read_text(encoding="utf-8")
    (pinned,) = re.findall(r"^ray(?:\[.*\])?==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert set(re.findall(r"rayproject/ray:([\d.]+)-", dockerfile)) == {pinned}
    for overlay in OVERLAYS:
        assert {cluster(manifest)["rayVersion"] for manifest in ray(render(overlay))} == {pinned}


def test_the_image_runs_without_root_in_the_folder_that_the_pods_name() -> None:
    lines = (ROOT / "k8s" / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000"
    (workdir,) = (line.removeprefix("WORKDIR ") for line in lines if line.startswith("WORKDIR "))
    for overlay in OVERLAYS:
        assert {container["workingDir"] for _, container in containers(render(overlay))} == {workdir}
        assert {pod["spec"]["securityContext"]["runAsUser"] for _, pod in pods(render(overlay))} == {1000}
