"""Certificates of the control port: waited for, checked by content, reloaded into the live context.

The folder is a mounted Secret (`ca.crt`, `tls.crt`, `tls.key`). A kubelet updates it by swapping a symbolic link, and
file notifications on such mounts are unreliable, so its content is hashed every few seconds. New handshakes use the new
files, open connections stay. A certificate authority cannot be taken out of a context: one that was rotated away stays
accepted until the process ends, which is why the operator drops it from the bundle last.
"""

import asyncio
import hashlib
import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from prism_api.control import TlsState

log = logging.getLogger(__name__)

FILES = ("ca.crt", "tls.crt", "tls.key")
WAIT_POLL_S = 1.0
"""While files are missing the pod takes no directive at all, so it looks more often than once they are there."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """The folder's content at one time."""

    ca: bytes
    certificate: bytes
    key: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(b"\0".join((self.ca, self.certificate, self.key))).hexdigest()


class Certificates:
    """A server context that follows a folder. `trustHash` is the sha256 of ca.crt, `leafSerial` lower-case hex."""

    def __init__(self, folder: Path, *, poll_s: float = 10.0) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.context.num_tickets = 0  # a resumed session would skip the check of a rotated certificate
        self.state: TlsState | None = None
        self.not_after_s: dict[str, float] = {}
        self._folder = folder
        self._poll_s = poll_s
        self._loaded = ""

    async def wait(self) -> None:
        """Returns once the folder holds a usable set."""
        while not self.load():
            log.warning("waiting for certificates", extra={"folder": str(self._folder), "files": list(FILES)})
            await asyncio.sleep(min(WAIT_POLL_S, self._poll_s))

    async def follow(self) -> None:
        """Reload on every change, for ever."""
        while True:
            await asyncio.sleep(self._poll_s)
            self.load()

    def load(self) -> bool:
        """Take the folder's content into the context if it changed; False if it is incomplete or unusable.

        An unusable set (a key without its certificate, seen in the middle of an update) leaves the old one serving and
        is tried again at the next poll.
        """
        try:
            bundle = Bundle(*((self._folder / name).read_bytes() for name in FILES))
        except OSError:
            return False
        if bundle.digest == self._loaded:
            return True
        try:
            self._take(bundle)
        except (ssl.SSLError, ValueError) as error:
            log.error("certificates refused", extra={"folder": str(self._folder), "error": str(error)})
            return False
        self._loaded = bundle.digest
        log.info("certificates loaded", extra={"leaf_serial": self.state.leaf_serial if self.state else None})
        return True

    def _take(self, bundle: Bundle) -> None:
        authorities = x509.load_pem_x509_certificates(bundle.ca)
        leaf = x509.load_pem_x509_certificates(bundle.certificate)[0]
        self.context.load_cert_chain(self._folder / "tls.crt", self._folder / "tls.key")
        self.context.load_verify_locations(cadata=bundle.ca.decode("ascii"))
        self.state = TlsState(
            trust_hash=hashlib.sha256(bundle.ca).hexdigest(), leaf_serial=format(leaf.serial_number, "x")
        )
        self.not_after_s = {
            "server": leaf.not_valid_after_utc.timestamp(),
            "ca": min(authority.not_valid_after_utc.timestamp() for authority in authorities),
        }
