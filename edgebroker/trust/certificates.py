"""The certificates of a fleet: one root, issuers that it signs, and a certificate for each node.

    root     30 years; its key signs issuers and is offline otherwise. The pin of the fleet is that of this key.
    issuer   2 years, numbered; its key is at the node that issues
    node     90 days, with the name of the node as URI; for both ends of a connection

X.509 by `cryptography`. A node certificate begins when its issuer's does: a clock that is behind finds it valid.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgebroker.common.errors import TrustError
from edgebroker.trust.keys import PrivateKey, PublicKey
from edgebroker.trust.node_name import NodeName, parse_node_name

Certificate = x509.Certificate
ROOT_DAYS, ISSUER_DAYS, NODE_DAYS = 30 * 365, 730, 90
# Clocks of peers may be behind: a certificate is valid a little before it was made.
EARLIER = timedelta(days=1)
ISSUER_NAME = "issuer "


def make_root(fleet: str, key: PrivateKey, now_ms: int) -> Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, fleet), _common_name("root")])
    begin = _time(now_ms) - EARLIER
    builder = _builder(name, name, key.public_key(), begin, begin + timedelta(days=ROOT_DAYS))
    return _authority(builder, 1).sign(key, hashes.SHA256())


def make_issuer(root: Certificate, root_key: PrivateKey, number: int, key: PublicKey, now_ms: int) -> Certificate:
    name = x509.Name(
        [*root.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME), _common_name(f"{ISSUER_NAME}{number}")]
    )
    begin = _time(now_ms) - EARLIER
    builder = _builder(name, root.subject, key, begin, begin + timedelta(days=ISSUER_DAYS))
    return _authority(builder, 0).sign(root_key, hashes.SHA256())


def make_node(issuer: Certificate, issuer_key: PrivateKey, name: NodeName, key: PublicKey, now_ms: int) -> Certificate:
    subject = x509.Name([_common_name(name.uid)])
    begin = issuer.not_valid_before_utc
    builder = _builder(subject, issuer.subject, key, begin, _time(now_ms) + timedelta(days=NODE_DAYS))
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    return (
        builder.add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(usage, critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(name))]), critical=True)
        .sign(issuer_key, hashes.SHA256())
    )


def make_request(key: PrivateKey) -> bytes:
    """A request for a certificate (CSR, DER): it proves that whoever makes it has the key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def key_of_request(data: bytes) -> PublicKey:
    """The key that a request is for. Raises TrustError for what is not a request, or not signed with that key."""
    try:
        request = x509.load_der_x509_csr(data)
        valid, key = request.is_signature_valid, request.public_key()
    except Exception as error:  # what the parser finds is of many kinds
        raise TrustError("the request for a certificate cannot be read") from error
    if not valid or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TrustError("the request for a certificate is not signed with a key of the right kind")
    return key


def to_pem(*certificates: Certificate) -> bytes:
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)


def from_pem(data: bytes) -> list[Certificate]:
    """Raises TrustError."""
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise TrustError("it does not hold a certificate") from error


def public_key(certificate: Certificate) -> PublicKey:
    """Raises TrustError for a key of another kind."""
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise TrustError("the certificate is for a key of another kind")
    return key


def signed_by(certificate: Certificate, authority: Certificate) -> bool:
    """Did this authority issue it?"""
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # ValueError, TypeError, InvalidSignature: it did not
        return False
    return True


def fleet_of(certificate: Certificate) -> str:
    """The name of the fleet, from its root or an issuer. Raises TrustError."""
    found = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    if not found:
        raise TrustError("the certificate is not one of a fleet")
    return str(found[0].value)


def number_of(issuer: Certificate) -> int:
    """The number of an issuer; 0 for what is not one."""
    text = str(issuer.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    digits = text.removeprefix(ISSUER_NAME)
    return int(digits) if text.startswith(ISSUER_NAME) and digits.isdecimal() else 0


def node_of(certificate: Certificate) -> NodeName:
    """The node that a certificate is for. Raises TrustError."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as error:
        raise TrustError("the certificate is not one of a node") from error
    found = [parse_node_name(text) for text in names.get_values_for_type(x509.UniformResourceIdentifier)]
    if len(found) != 1 or found[0] is None:
        raise TrustError("the certificate is not one of a node")
    return found[0]


def expires_ms(certificate: Certificate) -> int:
    return int(certificate.not_valid_after_utc.timestamp() * 1000)


def issued_ms(certificate: Certificate) -> int:
    return int(certificate.not_valid_before_utc.timestamp() * 1000)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PublicKey, begin: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _authority(builder: x509.CertificateBuilder, length: int) -> x509.CertificateBuilder:
    usage = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return builder.add_extension(x509.BasicConstraints(True, length), critical=True).add_extension(
        x509.KeyUsage(key_cert_sign=True, **{**usage, "digital_signature": True}), critical=True
    )


def _common_name(text: str) -> x509.NameAttribute[str]:
    return x509.NameAttribute(NameOID.COMMON_NAME, text)


def _time(ms: int) -> datetime:
    """Whole seconds, as certificates have them."""
    return datetime.fromtimestamp(ms // 1000, UTC)


def key_of_certificate(data: bytes) -> PublicKey:
    """The key of a certificate in DER. Raises TrustError."""
    try:
        return public_key(x509.load_der_x509_certificate(data))
    except ValueError as error:
        raise TrustError("what the peer showed is not a certificate") from error
