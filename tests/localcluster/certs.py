"""One certificate authority per cluster, every identity of its components, and their kubeconfigs."""

import base64
import datetime
import ipaddress
import json
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.localcluster import network

Authority = tuple[ec.EllipticCurvePrivateKey, x509.Certificate]
LIFETIME = datetime.timedelta(days=30)
CONFIGURED = ("admin", "kcm", "scheduler", "kube-proxy")


def _pem(key: PrivateKeyTypes) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def issue(
    folder: Path,
    name: str,
    common_name: str,
    organisations: tuple[str, ...] = (),
    alternatives: tuple[str, ...] = (),
    authority: Authority | None = None,
) -> Authority:
    """Write NAME.key (0600) and NAME.crt; without an authority the certificate is one itself."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
            *(x509.NameAttribute(NameOID.ORGANIZATION_NAME, o) for o in organisations),
        ]
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority[1].subject if authority else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.BasicConstraints(authority is None, None), True)
    )
    if authority is None:
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, True)
    else:
        purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(purposes, False)
    if alternatives:
        names = x509.SubjectAlternativeName([_alternative(a) for a in alternatives])
        builder = builder.add_extension(names, False)
    certificate = builder.sign(authority[0] if authority else key, hashes.SHA256())
    _write_private(folder / f"{name}.key", _pem(key))
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return key, certificate


def _write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def kubeconfig(folder: Path, name: str, server: str) -> str:
    """A kubeconfig of identity NAME for the API server at `server`."""

    def embedded(file: str) -> str:
        return base64.b64encode((folder / file).read_bytes()).decode()

    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "localcluster",
            "contexts": [{"name": "localcluster", "context": {"cluster": "localcluster", "user": name}}],
            "clusters": [
                {
                    "name": "localcluster",
                    "cluster": {"server": server, "certificate-authority-data": embedded("ca.crt")},
                }
            ],
            "users": [
                {
                    "name": name,
                    "user": {
                        "client-certificate-data": embedded(f"{name}.crt"),
                        "client-key-data": embedded(f"{name}.key"),
                    },
                }
            ],
        }
    )


def write_all(folder: Path, nodes: int, server: str, outside: str) -> None:
    """Every key, certificate and kubeconfig of a cluster; `outside` is the server as the machine's terminals see it."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = issue(folder, "ca", "localcluster-ca")
    serving = (
        *("localhost", "127.0.0.1", network.HOST, network.KUBERNETES_SERVICE),
        *("kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"),
    )
    issue(folder, "apiserver", "kube-apiserver", (), serving, authority)
    issue(folder, "admin", "admin", ("system:masters",), (), authority)
    issue(folder, "kcm", "system:kube-controller-manager", (), (), authority)
    issue(folder, "scheduler", "system:kube-scheduler", (), (), authority)
    issue(folder, "kube-proxy", "system:kube-proxy", (), (), authority)
    issue(folder, "apiserver-kubelet-client", "apiserver-kubelet-client", ("system:masters",), (), authority)
    issue(folder, "front-proxy-client", "front-proxy-client", (), (), authority)
    kubelets = []
    for index in range(nodes):
        node = network.node_name(index)
        names = (node, network.node_address(index))
        issue(folder, f"kubelet-{index}", f"system:node:{node}", ("system:nodes",), names, authority)
        kubelets.append(f"kubelet-{index}")
    account = rsa.generate_private_key(65537, 2048)
    _write_private(folder / "sa.key", _pem(account))
    public = account.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (folder / "sa.pub").write_bytes(public)
    for name in (*CONFIGURED, *kubelets):
        _write_private(folder / f"{name}.kubeconfig", kubeconfig(folder, name, server).encode())
    _write_private(folder.parent / "kubeconfig", kubeconfig(folder, "admin", outside).encode())
