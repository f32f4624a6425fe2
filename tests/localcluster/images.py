"""Images, built by buildah without an engine from the Dockerfiles that users build with docker.

Every tag is a hash of what went in, so nothing is built or pushed twice. Pushing needs no running cluster: a registry
process serves the registry's storage folder for a moment on the loopback.
"""

import contextlib
import hashlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tests.localcluster import binaries, package_index, paths, process, running
from tests.localcluster.failure import ClusterError

HERE = Path(__file__).with_name("images")
SUITE, PACKAGES = "bookworm", "ca-certificates,python3,python3-venv"
CERTIFICATES = "/etc/ssl/certs"
REGISTRY_START_S = 20
PUSH_PORT = 15321


@dataclass(frozen=True)
class Image:
    """A name, the content that its tag hashes, and how to build it."""

    name: str
    tag: str
    build: Callable[["Image"], None]
    rough_seconds: int

    @property
    def local(self) -> str:
        return f"localhost/moeprism/{self.name}:{self.tag}"

    @property
    def reference(self) -> str:
        """What Pods name, for example registry.local:5000/moeprism/runtime:0f3a..."""
        return f"{paths.REGISTRY_NAME}/moeprism/{self.name}:{self.tag}"


def _hash(*parts: bytes | Path) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes):
            digest.update(part)
            continue
        files = [part] if part.is_file() else sorted(p for p in part.rglob("*") if p.is_file())
        for file in files:
            if "__pycache__" in file.parts:
                continue
            digest.update(str(file.relative_to(part.parent)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _buildah(*argv: str) -> list[str]:
    store = paths.cache() / "buildah"
    flags = ["--root", str(store / "store"), "--runroot", str(store / "run"), "--storage-driver", "overlay"]
    return ["buildah", *flags, *argv]


def _from_scratch(image: Image, context: Path, dockerfile: str) -> None:
    (context / "Dockerfile").write_text(dockerfile)
    argv = _buildah("bud", "-q", "--isolation", "chroot", "-t", image.local, str(context))
    process.check(argv, what=f"building image {image.name}")


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="image-", dir=paths.cache()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _build_pause(image: Image) -> None:
    with _scratch() as context:
        argv = ["gcc", "-static", "-Os", "-o", str(context / "pause"), str(HERE / "pause.c")]
        process.check(argv, what="compiling pause.c")
        _from_scratch(image, context, 'FROM scratch\nCOPY pause /pause\nUSER 65535\nENTRYPOINT ["/pause"]\n')


def _build_coredns(image: Image) -> None:
    with _scratch() as context:
        shutil.copy(binaries.path("coredns"), context / "coredns")
        _from_scratch(image, context, 'FROM scratch\nCOPY coredns /coredns\nENTRYPOINT ["/coredns"]\n')


def _debian_mirror() -> str:
    """The machine's own mirror, as its package manager is configured."""
    listed = process.check(["apt-get", "indextargets", "--format", "$(REPO_URI)"], what="asking apt for its mirror")
    mirrors = [uri for uri in listed.split() if uri.rstrip("/").endswith("/debian")]
    if not mirrors:
        raise ClusterError("apt knows no Debian mirror; run: apt-get update")
    return mirrors[0]


def _build_base(image: Image) -> None:
    with _scratch() as context:
        root = context / "rootfs"
        argv = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root), _debian_mirror()]
        process.check(argv, what="debootstrap of the Python base image")
        for waste in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(root / waste, ignore_errors=True)
        process.check(["tar", "-C", str(root), "-cf", str(context / "base.tar"), "."], what="packing the base image")
        shutil.rmtree(root)
        _from_scratch(image, context, 'FROM scratch\nADD base.tar /\nCMD ["python3"]\n')


def _build_from_dockerfile(image: Image) -> None:
    """The project's Dockerfile, over the Debian base that stands in for python:3.11-slim-bookworm."""
    argv = _buildah("bud", "--layers", "--isolation", "chroot", "--network", "host")
    argv += ["-v", f"{CERTIFICATES}:{CERTIFICATES}:ro", "--build-arg", f"BASE={base().local}"]
    with _scratch() as folder:
        if settings := package_index.as_shell():
            (folder / "package-index").write_text(settings)
            argv += ["--secret", f"id=package-index,src={folder / 'package-index'}"]
        argv += ["-f", str(paths.REPOSITORY / image.name / "Dockerfile"), "-t", image.local, str(paths.REPOSITORY)]
        process.check(argv, what=f"building image {image.name}")


def _build_model(image: Image) -> None:
    with _scratch() as context:
        shutil.copytree(paths.REPOSITORY / "examples/model/artifact", context / "artifact")
        _from_scratch(image, context, "FROM scratch\nCOPY artifact/ /\n")


def base() -> Image:
    return Image("python-base", _hash(SUITE.encode(), PACKAGES.encode()), _build_base, 60)


def pause() -> Image:
    return Image("pause", _hash(HERE / "pause.c"), _build_pause, 2)


def coredns() -> Image:
    return Image("coredns", binaries.folder_of(binaries.TOOLS[3]).name.rsplit("-", 1)[1], _build_coredns, 5)


def _project_image(name: str, *sources: str, rough_seconds: int) -> Image:
    root = paths.REPOSITORY
    here = root / name
    shared = [root / "pyproject.toml", root / "crds/prism_api", here / "requirements.lock", here / "Dockerfile"]
    tag = _hash(base().tag.encode(), *shared, *(root / source for source in sources))
    return Image(name, tag, _build_from_dockerfile, rough_seconds)


def operator() -> Image:
    return _project_image("operator", "operator/prism_operator", rough_seconds=40)


def runtime() -> Image:
    return _project_image("runtime", "runtime/prism_runtime", rough_seconds=240)


def model() -> Image:
    artifact = paths.REPOSITORY / "examples/model/artifact"
    return Image("model", _hash(artifact), _build_model, 3)


CLUSTER_IMAGES = (pause, coredns)
PROJECT_IMAGES = (operator, runtime, model)
"""Functions, because a tag needs the sources and the built binaries, which may not be there at import."""


def current_references() -> set[str]:
    """What Pods of this checkout name."""
    return {image().reference for image in (*CLUSTER_IMAGES, *PROJECT_IMAGES)}


def project_image(name: str) -> Image:
    """The image of that name as the checkout's sources make it."""
    for image in PROJECT_IMAGES:
        if image.__name__ == name:
            return image()
    raise ClusterError(f"No image is called '{name}'; there are {', '.join(i.__name__ for i in PROJECT_IMAGES)}.")


def _pushed_file() -> Path:
    return paths.registry_store() / "pushed.json"


def pushed() -> set[str]:
    """References that the registry's storage holds."""
    return set(json.loads(_pushed_file().read_text())) if _pushed_file().exists() else set()


def _note_pushed(image: Image) -> None:
    scratch = _pushed_file().with_suffix(".new")
    scratch.write_text(json.dumps(sorted(pushed() | {image.reference})))
    scratch.rename(_pushed_file())


def _remove_abandoned() -> None:
    """What killed builds left: working containers (a half-installed torch is 6 GB) and scratch folders."""
    process.check(_buildah("rm", "--all"), what="removing abandoned build containers")
    for folder in paths.cache().glob("image-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _exists(image: Image) -> bool:
    argv = _buildah("images", "-q", image.local)
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def ensure(console: Console, images: list[Image]) -> None:
    """Build and push what is missing; safe to interrupt and run again."""
    if all(image.reference in pushed() for image in images):
        return
    with running.exclusive("building images", console):
        _build_and_push([image for image in images if image.reference not in pushed()], console)


def _build_and_push(wanted: list[Image], console: Console) -> None:
    _remove_abandoned()
    needs_base = any(image.build is _build_from_dockerfile and not _exists(image) for image in wanted)
    for image in [*([base()] if needs_base else []), *wanted]:
        if _exists(image):
            continue
        started = time.monotonic()
        with console.status(f"Building image {image.name} (about {image.rough_seconds} s when nothing is cached)"):
            image.build(image)
        console.print(f"  image {image.name}: built in {time.monotonic() - started:.0f} s")
    with _registry() as address:
        for image in wanted:
            started = time.monotonic()
            with console.status(f"Pushing image {image.name}"):
                target = f"docker://{address}/{image.reference.split('/', 1)[1]}"
                argv = _buildah("push", "-q", "--tls-verify=false", image.local, target)
                process.check(argv, what=f"pushing image {image.name}")
            _note_pushed(image)
            console.print(f"  image {image.name}: pushed in {time.monotonic() - started:.0f} s")


def _push_port() -> int:
    """Always the same one if it is free: buildah remembers by address which compressed layers a registry holds.

    At another address it would compress torch's 5.7 GB again, for minutes, to find that nothing has to travel.
    """
    for port in (PUSH_PORT, 0):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)) as probe:
            found: int = probe.getsockname()[1]
            return found
    raise ClusterError("no port is free on 127.0.0.1 for the registry that images are pushed to")


@contextmanager
def _registry() -> Iterator[str]:
    """A registry over the cluster registry's storage, on a loopback port."""
    paths.registry_store().mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{_push_port()}"
    with _scratch() as folder:
        config = folder / "registry.json"
        storage = {"filesystem": {"rootdirectory": str(paths.registry_store())}}
        config.write_text(json.dumps({"version": 0.1, "storage": storage, "http": {"addr": address}}))
        with (folder / "log").open("wb") as log:
            argv = ["docker-registry", "serve", str(config)]
            server = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for(f"http://{address}/v2/", server)
            yield address
        finally:
            server.terminate()
            server.wait(timeout=REGISTRY_START_S)


def _wait_for(url: str, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + REGISTRY_START_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (urllib.error.URLError, OSError) as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise ClusterError(f"docker-registry does not answer at {url}: {error}") from error
            time.sleep(0.05)
