"""Certificates and keys of a federation on this machine, made anew: good for a day, and for tests.

For a federation of several machines openssl and ssh-keygen make the same files
(docs/federation.md).
"""

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_PRIVATE = serialization.NoEncryption()


def authority(folder: Path) -> None:
  """Writes ca.crt, server.crt and server.key: an authority, and a server on 127.0.0.1 it signs.

  The authority's own key is written nowhere.
  """
  ours, of_server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
  name, server = _name("qupeD_jax loopback authority"), _name("127.0.0.1")
  usage = x509.KeyUsage(
    digital_signature=True, content_commitment=False, key_encipherment=False,
    data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
    encipher_only=False, decipher_only=False,
  )  # fmt: skip
  whole = _certificate(name, name, ours.public_key())
  whole = whole.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
  whole = whole.add_extension(usage, critical=True)
  ca = whole.sign(ours, hashes.SHA384())
  local = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
  issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(ours.public_key())
  certificate = _certificate(server, name, of_server.public_key())
  certificate = certificate.add_extension(x509.SubjectAlternativeName(local), critical=False)
  certificate = certificate.add_extension(issuer_key, critical=False)
  certificate = certificate.sign(ours, hashes.SHA384())
  (folder / "ca.crt").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
  (folder / "server.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
  _write_key(folder / "server.key", of_server, serialization.PrivateFormat.PKCS8)


def node_key(folder: Path) -> None:
  """Writes node.key and node.key.pub: what a node proves by who it is, as of ssh-keygen."""
  key = ec.generate_private_key(ec.SECP384R1())
  _write_key(folder / "node.key", key, serialization.PrivateFormat.OpenSSH)
  public = key.public_key().public_bytes(
    serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
  )
  (folder / "node.key.pub").write_bytes(public)


def _name(text: str) -> x509.Name:
  return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(subject, issuer, public_key) -> x509.CertificateBuilder:
  now = datetime.datetime.now(datetime.UTC)
  return x509.CertificateBuilder(
    issuer_name=issuer,
    subject_name=subject,
    public_key=public_key,
    serial_number=x509.random_serial_number(),
    not_valid_before=now - datetime.timedelta(minutes=5),
    not_valid_after=now + datetime.timedelta(days=1),
  )


def _write_key(path: Path, key, form: serialization.PrivateFormat) -> None:
  """Writes a private key that nobody else may read."""
  with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
    file.write(key.private_bytes(serialization.Encoding.PEM, form, _PRIVATE))
