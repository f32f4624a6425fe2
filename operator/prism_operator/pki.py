"""Certificates of the control channel: what must be issued or renewed, and how. Pure: no I/O, the time is an argument.

One CA of the operator signs two kinds of leaves. A *server leaf* belongs to one service and is shared by its pods; its
key cannot command another service's pods, because it is a server's certificate for one name. The *client leaf* is the
operator's; pods demand its URI besides a valid chain. ECDSA P-256 throughout; a leaf never outlives its CA.
"""

import base64
import enum
import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from prism_api.control import OPERATOR_IDENTITY, server_name

CA_CERTIFICATE, CERTIFICATE, PRIVATE_KEY = "ca.crt", "tls.crt", "tls.key"
"""Keys of the Secrets, the shape that cert-manager writes too."""

BACKDATE = timedelta(minutes=5)
"""Certificates begin in the past, for pods whose clock is a little late."""


@dataclass(frozen=True, slots=True)
class Lifetimes:
    authority: timedelta = timedelta(days=365)
    server: timedelta = timedelta(days=7)
    client: timedelta = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    private_key: bytes

    def __repr__(self) -> str:  # a key must not reach a log through a dataclass repr
        return f"KeyPair({serial_of(self.certificate)})"

    @property
    def not_after(self) -> datetime:
        return x509.load_pem_x509_certificate(self.certificate).not_valid_after_utc


class Reason(enum.Enum):
    """Why a leaf must be issued."""

    MISSING = "Missing"
    MALFORMED = "Malformed"
    WRONG_AUTHORITY = "WrongAuthority"
    WRONG_NAME = "WrongName"
    WRONG_KEY = "WrongKey"
    RENEWAL_DUE = "RenewalDue"


def service_identity(namespace: str, service: str) -> str:
    return f"spiffe://moeprism.io/ns/{namespace}/svc/{service}"


def serial_of(certificate: bytes) -> str:
    return f"{x509.load_pem_x509_certificate(certificate).serial_number:x}"


def new_authority(now: datetime, lifetimes: Lifetimes) -> KeyPair:
    """A new CA. Its name carries a random part, so that two CAs can never be mistaken for one another."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"prism-ca-{uuid.uuid4().hex[:12]}")])
    builder = (
        _builder(name, name, key, now, now + lifetimes.authority)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(certificate_sign=True), critical=True)
    )
    return _pair(builder.sign(key, hashes.SHA256()), key)


def issue_server(authority: KeyPair, namespace: str, service: str, now: datetime, lifetimes: Lifetimes) -> KeyPair:
    """The leaf of a service's pods."""
    names: list[x509.GeneralName] = [
        x509.DNSName(server_name(namespace, service)),
        x509.UniformResourceIdentifier(service_identity(namespace, service)),
    ]
    return _issue(authority, names, ExtendedKeyUsageOID.SERVER_AUTH, now, lifetimes.server)


def issue_client(authority: KeyPair, now: datetime, lifetimes: Lifetimes) -> KeyPair:
    """The operator's leaf."""
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(OPERATOR_IDENTITY)]
    return _issue(authority, names, ExtendedKeyUsageOID.CLIENT_AUTH, now, lifetimes.client)


def renewal_time(certificate: bytes, seed: str) -> datetime:
    """When a leaf is renewed: at two thirds of its life, moved by up to a tenth of it by the seed (a service's uid).

    The move is a hash and not a random number: every look at the same leaf gives the same answer, and services that
    were created together do not renew together.
    """
    parsed = x509.load_pem_x509_certificate(certificate)
    life = parsed.not_valid_after_utc - parsed.not_valid_before_utc
    share = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big") / 0xFFFFFFFF
    return parsed.not_valid_before_utc + life * (2 / 3 + 0.1 * (2 * share - 1))


def server_leaf_reason(
    data: Mapping[str, str] | None, authority: KeyPair, namespace: str, service: str, uid: str, now: datetime
) -> Reason | None:
    """Why the Secret with this `data` (base64 values, None: no Secret) needs a new leaf; None if it is good."""
    if data is None:
        return Reason.MISSING
    try:
        certificate = base64.b64decode(data[CERTIFICATE], validate=True)
        key = serialization.load_pem_private_key(base64.b64decode(data[PRIVATE_KEY], validate=True), None)
        bundle = base64.b64decode(data[CA_CERTIFICATE], validate=True)
        leaf = x509.load_pem_x509_certificate(certificate)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (KeyError, ValueError, TypeError, x509.ExtensionNotFound):
        return Reason.MALFORMED
    try:
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.certificate))
    except (ValueError, TypeError, InvalidSignature):
        return Reason.WRONG_AUTHORITY
    if bundle != authority.certificate:
        return Reason.WRONG_AUTHORITY
    if names.get_values_for_type(x509.DNSName) != [server_name(namespace, service)] or names.get_values_for_type(
        x509.UniformResourceIdentifier
    ) != [service_identity(namespace, service)]:
        return Reason.WRONG_NAME
    if leaf.public_key() != key.public_key():
        return Reason.WRONG_KEY
    return Reason.RENEWAL_DUE if now >= renewal_time(certificate, uid) else None


def authority_problem(authority: KeyPair, now: datetime) -> str | None:
    """Why this CA cannot sign, in words for the log; None if it can."""
    try:
        certificate = x509.load_pem_x509_certificate(authority.certificate)
        key = serialization.load_pem_private_key(authority.private_key, None)
    except (ValueError, TypeError) as error:
        return f"its certificate or key cannot be read ({error})"
    if certificate.public_key() != key.public_key():
        return "its key does not belong to its certificate"
    if now >= certificate.not_valid_after_utc:
        return f"it expired at {certificate.not_valid_after_utc.isoformat()}"
    return None


def _issue(
    authority: KeyPair, names: list[x509.GeneralName], usage: x509.ObjectIdentifier, now: datetime, life: timedelta
) -> KeyPair:
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    issuer_key = serialization.load_pem_private_key(authority.private_key, None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey), "the CA is created by new_authority, always P-256"
    key = ec.generate_private_key(ec.SECP256R1())
    until = min(now + life, issuer.not_valid_after_utc)
    builder = (
        _builder(x509.Name([]), issuer.subject, key, now, until)
        .add_extension(x509.SubjectAlternativeName(names), critical=True)  # critical, because the subject is empty
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(certificate_sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            ),
            critical=False,
        )
    )
    return _pair(builder.sign(issuer_key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(*, certificate_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificate_sign,
        key_cert_sign=certificate_sign,
        crl_sign=certificate_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> KeyPair:
    return KeyPair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
