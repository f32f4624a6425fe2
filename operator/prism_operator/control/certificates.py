"""Certificates in the cluster: the CA Secret, a service's Secret, and the TLS context of the operator itself.

What must be issued is decided by `pki`; this module reads and writes Secrets and turns key pairs into contexts.
"""

import base64
import logging
import os
import ssl
from collections.abc import Callable
from datetime import UTC, datetime

from prism_operator import metrics, pki
from prism_operator.control.kube import Conflict, Kube, NotFound
from prism_operator.control.ownership import controller_uid
from prism_operator.control.resources import SECRETS, Object
from prism_operator.plan.children import control_secret_name

CA_SECRET = "prism-ca"

logger = logging.getLogger(__name__)


class NotOurs(Exception):
    """An object of a name that we need exists and is not controlled by the service; it is left untouched."""


class AuthorityUnusable(Exception):
    """The CA in the cluster cannot sign."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class Certificates:
    """Certificates of the control channel, one keeper per process; `load_authority` runs before anything is signed."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        lifetimes: pki.Lifetimes | None = None,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._kube, self._namespace, self._now = kube, namespace, now
        self._lifetimes = lifetimes or pki.Lifetimes()
        self._authority: pki.KeyPair | None = None
        self._client: pki.KeyPair | None = None
        self._server_expiry: dict[tuple[str, str], datetime] = {}

    async def load_authority(self) -> None:
        """Read the CA, or create it: whoever comes first wins, everybody else reads the winner's.

        Raises AuthorityUnusable for one that cannot sign; it is never replaced silently, because every pod trusts it.
        """
        try:
            secret = await self._kube.get(SECRETS, self._namespace, CA_SECRET)
        except NotFound:
            pair = pki.new_authority(self._now(), self._lifetimes)
            try:
                secret = await self._kube.create_or_conflict(self._authority_secret(pair))
                logger.info("created the control channel's CA in Secret '%s/%s'", self._namespace, CA_SECRET)
            except Conflict:
                secret = await self._kube.get(SECRETS, self._namespace, CA_SECRET)
        data = secret.get("data") or {}
        authority = pki.KeyPair(
            base64.b64decode(data.get(pki.CERTIFICATE, "")), base64.b64decode(data.get(pki.PRIVATE_KEY, ""))
        )
        if problem := pki.authority_problem(authority, self._now()):
            raise AuthorityUnusable(
                f"The CA in Secret '{self._namespace}/{CA_SECRET}' cannot sign: {problem}. Delete the Secret and "
                "restart the operator; running pods accept a new CA as soon as their control Secret is replaced."
            )
        self._authority = authority
        metrics.CERT_EXPIRY.labels("ca").set_function(lambda: self._left_s(authority.not_after))

    def client_context(self) -> ssl.SSLContext | None:
        """A context with a fresh client leaf if the last one is due for renewal; None if that one is still good."""
        authority = self._signer()
        if self._client and self._now() < pki.renewal_time(self._client.certificate, "client"):
            return None
        self._client = leaf = pki.issue_client(authority, self._now(), self._lifetimes)
        metrics.CERT_EXPIRY.labels("client").set_function(lambda: self._left_s(leaf.not_after))
        return client_context(authority.certificate, leaf)

    async def ensure_server_leaf(self, namespace: str, service: str, owner: Object, labels: dict[str, str]) -> bool:
        """Make the service's Secret hold a good leaf; True if a new one was issued.

        `owner` is the ownerReference of the PrismService. Raises NotOurs, and KubeError as the port does.
        """
        authority = self._signer()
        name = control_secret_name(service)
        try:
            secret: Object | None = await self._kube.get(SECRETS, namespace, name)
        except NotFound:
            secret = None
        if secret is not None and controller_uid(secret) != owner["uid"]:
            raise NotOurs(
                f"Secret '{name}' exists and is not controlled by PrismService '{service}'; "
                "delete or rename it, the operator does not overwrite it"
            )
        data = (secret.get("data") or {}) if secret is not None else None
        reason = pki.server_leaf_reason(data, authority, namespace, service, owner["uid"], self._now())
        if reason is None:
            assert data is not None
            leaf_pem = base64.b64decode(data[pki.CERTIFICATE])
            self._note_expiry(namespace, service, leaf_pem)
            return False
        leaf = pki.issue_server(authority, namespace, service, self._now(), self._lifetimes)
        await self._kube.apply(self._server_secret(namespace, name, owner, labels, authority, leaf), force=True)
        logger.info("issued the control certificate of %s/%s: %s", namespace, service, reason.value)
        self._note_expiry(namespace, service, leaf.certificate)
        return True

    def forget(self, namespace: str, service: str) -> None:
        self._server_expiry.pop((namespace, service), None)

    def _signer(self) -> pki.KeyPair:
        assert self._authority is not None, "load_authority runs before anything is signed"
        return self._authority

    def _left_s(self, until: datetime) -> float:
        return (until - self._now()).total_seconds()

    def _note_expiry(self, namespace: str, service: str, certificate: bytes) -> None:
        self._server_expiry[namespace, service] = pki.KeyPair(certificate, b"").not_after
        metrics.CERT_EXPIRY.labels("server").set_function(
            lambda: min((self._left_s(until) for until in self._server_expiry.values()), default=float("inf"))
        )

    def _authority_secret(self, pair: pki.KeyPair) -> Object:
        metadata = {
            "name": CA_SECRET,
            "namespace": self._namespace,
            "labels": {"app.kubernetes.io/part-of": "moe-prism", "app.kubernetes.io/managed-by": "prism-operator"},
        }
        data = {pki.CERTIFICATE: _base64(pair.certificate), pki.PRIVATE_KEY: _base64(pair.private_key)}
        return _secret(metadata, data)

    @staticmethod
    def _server_secret(
        namespace: str, name: str, owner: Object, labels: dict[str, str], authority: pki.KeyPair, leaf: pki.KeyPair
    ) -> Object:
        metadata = {"name": name, "namespace": namespace, "labels": labels, "ownerReferences": [owner]}
        data = {
            pki.CA_CERTIFICATE: _base64(authority.certificate),
            pki.CERTIFICATE: _base64(leaf.certificate),
            pki.PRIVATE_KEY: _base64(leaf.private_key),
        }
        return _secret(metadata, data)


def client_context(authority_pem: bytes, leaf: pki.KeyPair) -> ssl.SSLContext:
    """TLS 1.3 client context that trusts the CA alone and presents the leaf."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=authority_pem.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # load_cert_chain takes a path only; a memory file keeps the key off every disk
    descriptor = os.memfd_create("client-leaf", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(leaf.certificate + leaf.private_key)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return context


def _secret(metadata: Object, data: dict[str, str]) -> Object:
    return {
        "apiVersion": SECRETS.api_version,
        "kind": SECRETS.kind,
        "metadata": metadata,
        "type": "Opaque",
        "data": data,
    }


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
