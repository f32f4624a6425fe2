"""python -m tests.localcluster: a real Kubernetes on this machine."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.localcluster import binaries, doctor, images, paths
from tests.localcluster.cluster import DEFAULT_NAME, DEFAULT_PORT, Cluster
from tests.localcluster.failure import CannotRunContainersError, ClusterError
from tests.localcluster.running import leftovers, stop

EXIT_CANNOT_RUN = 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.localcluster",
        description="A real Kubernetes (kubelet, containerd, runc, kube-proxy, CoreDNS) on this machine, in namespaces "
        "of its own. Needs root, Go and Debian packages; `doctor` tells what is missing.",
        epilog=f"Built once into {paths.cache()} (set PRISM_CACHE to move it); nothing else of the machine is changed.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    check = command("doctor", "Check packages, disk, root, namespaces and cgroups; each finding names its cure.")
    check.add_argument("--install", action="store_true", help="apt-get the missing Debian packages")
    build = command("build", "Build binaries and images into the cache; again after Ctrl-C goes on where it was.")
    build.add_argument("--only", nargs="*", default=(), metavar="MODULE", help="binaries of these modules, no images")
    up = command("up", "Start a cluster and print the KUBECONFIG to export.")
    up.add_argument("--nodes", type=int, default=2, help="number of nodes (default 2)")
    up.add_argument("--gpus-per-node", type=int, default=8, help="declared nvidia.com/gpu a node (default 8)")
    up.add_argument("--port", type=int, help=f"API server on 127.0.0.1 (default {DEFAULT_PORT}, or a free one)")
    up.add_argument(
        "--crd", type=Path, action="append", default=[], help="CRD file to install before controllers start"
    )
    down = command("down", "Stop a cluster; no process, namespace, mount or cgroup stays.")
    status = command("status", "Tell what runs.")
    shell = command("shell", "A shell with kubectl and helm on the PATH, in the network of a node.")
    shell.add_argument("--node", default="node-0", help="whose network (default node-0)")
    env = command("env", 'Print the exports for a terminal: eval "$(python -m tests.localcluster env)"')
    which = command("which", "Print the path of a built binary, for example helm.")
    which.add_argument("binary")
    command("clean", "Remove built binaries, images and node stores from the cache.")
    for sub in (up, down, status, shell, env):
        sub.add_argument("--name", default=DEFAULT_NAME, help=f"name of the cluster (default {DEFAULT_NAME})")
    return parser


def _doctor(arguments: argparse.Namespace, console: Console) -> int:
    findings = doctor.check()
    if arguments.install and not any(f.fatal and not f.ok for f in findings):
        doctor.install_packages()
        findings = doctor.check()
    table = Table("", "what", "found", "to do", box=None)
    for finding in findings:
        mark, cure = ("ok", "") if finding.ok else ("MISSING", finding.cure)
        table.add_row(mark, finding.what, finding.found, cure)
    console.print(table)
    if any(f.fatal and not f.ok for f in findings):
        console.print(doctor.WAYS_ON)
        return EXIT_CANNOT_RUN
    return 0 if all(f.ok for f in findings) else 1


def _run(arguments: argparse.Namespace, console: Console) -> int:
    match arguments.command:
        case "doctor":
            return _doctor(arguments, console)
        case "build":
            binaries.build(console, tuple(arguments.only))
            if not arguments.only:
                doctor.require()
                images.ensure(console, [image() for image in (*images.CLUSTER_IMAGES, *images.PROJECT_IMAGES)])
        case "up":
            cluster = Cluster.up(
                arguments.name,
                nodes=arguments.nodes,
                gpus_per_node=arguments.gpus_per_node,
                port=arguments.port,
                crds=tuple(arguments.crd),
                console=console,
            )
            print(f"export KUBECONFIG={cluster.kubeconfig}")
        case "down":
            stop(arguments.name)
            if left := leftovers(arguments.name):
                raise ClusterError(f"left behind: {', '.join(left)}")
        case "status":
            cluster = Cluster.attach(arguments.name)
            print(cluster.describe())
            print(cluster.kubectl("get", "nodes,pods", "-A", "-o", "wide"))
            print(
                "Simulated or absent: GPUs (numbers only), many machines, NetworkPolicy, CSI, LoadBalancers, Ingress."
            )
        case "shell":
            cluster = Cluster.attach(arguments.name)
            shell = [os.environ.get("SHELL", "/bin/bash")]
            return cluster.inside(shell, node=arguments.node, env=cluster.environment()).wait()
        case "env":
            cluster = Cluster.attach(arguments.name)
            for variable, value in cluster.exports().items():
                print(f"export {variable}={value}")
            print(f"export PATH={binaries.tool_folders()}:$PATH")
        case "which":
            print(binaries.path(arguments.binary))
        case "clean":
            for folder in ("bin", "buildah", "registry", "nodes"):
                subprocess.run(["umount", "-R", str(paths.cache() / folder)], capture_output=True, check=False)
                shutil.rmtree(paths.cache() / folder, ignore_errors=True)
    return 0


def main() -> int:
    arguments, console = _parser().parse_args(), Console(stderr=True)
    try:
        return _run(arguments, console)
    except ClusterError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return EXIT_CANNOT_RUN if isinstance(error, CannotRunContainersError) else 1
    except KeyboardInterrupt:
        console.print("Interrupted; run the same command again to go on.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
