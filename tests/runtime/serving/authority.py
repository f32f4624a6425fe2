"""A certificate authority for tests, and the folders and clients that use it."""

import datetime
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from prism_api.control import OPERATOR_IDENTITY, server_name

SERVER_NAME = server_name("team-a", "chat")
SERVER_URI = "spiffe://moeprism.io/ns/team-a/svc/chat"


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class Authority:
    """Issues leaves with URI and DNS names."""

    def __init__(self, name: str = "test authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = (
            self._builder(self._name, self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.pem = certificate.public_bytes(serialization.Encoding.PEM)

    def _builder(self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
        )

    def issue(self, *names: x509.GeneralName, client: bool) -> tuple[bytes, bytes]:
        """(certificate, key) in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        certificate = (
            self._builder(x509.Name([]), key.public_key())
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM), _pem(key)

    def write_server(self, folder: Path, *, trust: bytes | None = None) -> str:
        """Fill a pod's certificate folder as a Secret mount would; returns the leaf's serial in hex."""
        names = x509.DNSName(SERVER_NAME), x509.UniformResourceIdentifier(SERVER_URI)
        certificate, key = self.issue(*names, client=False)
        folder.mkdir(exist_ok=True)
        for name, content in (("ca.crt", trust or self.pem), ("tls.crt", certificate), ("tls.key", key)):
            (folder / name).write_bytes(content)
        return f"{x509.load_pem_x509_certificate(certificate).serial_number:x}"

    def client(self, folder: Path, *uris: str, trust: bytes | None = None) -> ssl.SSLContext:
        """Context of a client with these URI names; the operator's if none is given."""
        names = [x509.UniformResourceIdentifier(uri) for uri in (uris or (OPERATOR_IDENTITY,))]
        certificate, key = self.issue(*names, client=True)
        folder.mkdir(exist_ok=True)
        (folder / "client.crt").write_bytes(certificate)
        (folder / "client.key").write_bytes(key)
        context = anonymous(trust or self.pem)
        context.load_cert_chain(folder / "client.crt", folder / "client.key")
        return context


def anonymous(trust: bytes) -> ssl.SSLContext:
    """A client that shows no certificate."""
    return ssl.create_default_context(cadata=trust.decode())
