"""Reduce KubeRay's CRDs to what the tests validate with: one small JSON file per version of KubeRay.

    python tests/cluster/reduce_crd.py KUBERAY-CHECKOUT v1.7.0 > tests/cluster/schemas/kuberay-v1.7.0.json

KUBERAY-CHECKOUT is a clone of https://github.com/ray-project/kuberay (Apache-2.0). Taken out are descriptions, status,
and the parts that repeat Kubernetes' own types (pod templates and the like, 95 % of a CRD), which the tests check with
the types of the package `kubernetes`: such a part becomes {"kubernetes": NAME OF THE TYPE}.
"""

import json
import subprocess
import sys

import yaml

KINDS = ("rayclusters", "rayjobs")
# field -> type of the package kubernetes; a list of such is given in brackets
KUBERNETES_TYPES = {
    "template": "V1PodTemplateSpec",
    "submitterPodTemplate": "V1PodTemplateSpec",
    "headService": "V1Service",
    "resources": "V1ResourceRequirements",
    "env": "list[V1EnvVar]",
    "envFrom": "list[V1EnvFromSource]",
    "volumeMounts": "list[V1VolumeMount]",
    "securityContext": "V1SecurityContext",
}


def reduced(schema: dict, field: str = "") -> dict:
    """A schema without descriptions, in which Kubernetes' own types are named only."""
    kind = KUBERNETES_TYPES.get(field)
    if kind and (schema.get("properties") or schema.get("items", {}).get("properties")):
        return {"kubernetes": kind}
    kept = {k: v for k, v in schema.items() if k not in ("description", "x-kubernetes-map-type")}
    if "properties" in kept:
        kept["properties"] = {name: reduced(s, name) for name, s in kept["properties"].items() if name != "status"}
    for key in ("items", "additionalProperties"):
        if isinstance(kept.get(key), dict):
            kept[key] = reduced(kept[key])
    return kept


def main(checkout: str, version: str) -> None:
    commit = subprocess.run(
        ["git", "-C", checkout, "rev-list", "-n1", version], capture_output=True, text=True, check=True
    ).stdout.strip()
    kinds = {}
    for name in KINDS:
        file = f"ray-operator/config/crd/bases/ray.io_{name}.yaml"
        text = subprocess.run(
            ["git", "-C", checkout, "show", f"{version}:{file}"], capture_output=True, text=True, check=True
        ).stdout
        crd = yaml.load(text, Loader=yaml.CSafeLoader)
        (v1,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
        kinds[crd["spec"]["names"]["kind"]] = reduced(v1["schema"]["openAPIV3Schema"])
    source = f"https://github.com/ray-project/kuberay {version} ({commit}), ray-operator/config/crd/bases"
    json.dump({"source": source, "licence": "Apache-2.0", "kinds": kinds}, sys.stdout, separators=(",", ":"))
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
