import base64
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from prism_operator import pki
from prism_operator.pki import Lifetimes, Reason

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
LIVES = Lifetimes()


@pytest.fixture(scope="module")
def authority():
    return pki.new_authority(NOW, LIVES)


def secret_data(authority, leaf):
    pairs = {"ca.crt": authority.certificate, "tls.crt": leaf.certificate, "tls.key": leaf.private_key}
    return {name: base64.b64encode(content).decode() for name, content in pairs.items()}


def reason(data, authority, now=NOW, service="chat"):
    return pki.server_leaf_reason(data, authority, "team-a", service, "uid-1", now)


def test_a_fresh_leaf_is_good_and_a_missing_one_is_issued(authority):
    leaf = pki.issue_server(authority, "team-a", "chat", NOW, LIVES)
    assert reason(secret_data(authority, leaf), authority) is None
    assert reason(None, authority) is Reason.MISSING


def test_a_leaf_carries_the_service_and_no_other_right(authority):
    leaf = x509.load_pem_x509_certificate(pki.issue_server(authority, "team-a", "chat", NOW, LIVES).certificate)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["chat.team-a.moeprism.internal"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://moeprism.io/ns/team-a/svc/chat"]
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]
    assert leaf.subject.rfc4514_string() == ""
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_leaf_is_renewed_between_56_and_77_percent_of_its_life_and_services_spread(authority):
    leaf = pki.issue_server(authority, "team-a", "chat", NOW, LIVES)
    begin = NOW - pki.BACKDATE
    life = leaf.not_after - begin
    shares = [(pki.renewal_time(leaf.certificate, f"uid-{i}") - begin) / life for i in range(200)]
    assert 0.56 < min(shares) < 0.60
    assert 0.73 < max(shares) < 0.77
    assert reason(secret_data(authority, leaf), authority, NOW + timedelta(days=3.5)) is None
    assert reason(secret_data(authority, leaf), authority, NOW + timedelta(days=5.5)) is Reason.RENEWAL_DUE


@pytest.mark.parametrize("key", ["ca.crt", "tls.crt", "tls.key"])
def test_a_damaged_or_missing_entry_is_repaired(authority, key):
    leaf = pki.issue_server(authority, "team-a", "chat", NOW, LIVES)
    data = secret_data(authority, leaf)
    assert reason({**data, key: "bm90IGEgcGVt"}, authority) in (Reason.MALFORMED, Reason.WRONG_AUTHORITY)
    del data[key]
    assert reason(data, authority) is Reason.MALFORMED


def test_a_leaf_of_another_service_authority_or_key_is_replaced(authority):
    leaf, stranger = (pki.issue_server(authority, "team-a", name, NOW, LIVES) for name in ("chat", "mail"))
    assert reason(secret_data(authority, stranger), authority) is Reason.WRONG_NAME
    other = pki.new_authority(NOW, LIVES)
    assert reason(secret_data(other, pki.issue_server(other, "team-a", "chat", NOW, LIVES)), authority) is (
        Reason.WRONG_AUTHORITY
    )
    mixed = pki.KeyPair(leaf.certificate, stranger.private_key)
    assert reason(secret_data(authority, mixed), authority) is Reason.WRONG_KEY


def test_a_leaf_never_outlives_its_authority(authority):
    late = NOW + timedelta(days=363)
    assert pki.issue_server(authority, "team-a", "chat", late, LIVES).not_after == authority.not_after


def test_an_expired_or_mismatched_authority_is_named_as_a_problem(authority):
    assert pki.authority_problem(authority, NOW) is None
    assert "expired" in pki.authority_problem(authority, NOW + timedelta(days=366))
    mixed = pki.KeyPair(authority.certificate, pki.new_authority(NOW, LIVES).private_key)
    assert "does not belong" in pki.authority_problem(mixed, NOW)
    assert "cannot be read" in pki.authority_problem(pki.KeyPair(b"", b""), NOW)


def test_a_private_key_does_not_appear_in_a_repr(authority):
    assert "PRIVATE KEY" not in repr(authority)
