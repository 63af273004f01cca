"""Keys of a deployment: a certificate for the server, and a pair of keys for each client.

The server's certificate is signed by its own key, so no authority can sign another one. A client is known by
its private key: who has it can take part.
"""

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fmfl.errors import UserError


def make(folder: Path, hosts: list[str], clients: int, days: int = 365) -> None:
    """Make a folder of keys for the server and one for each client, to be handed over.

    `server/` holds `server.pem` and `server.key` for TLS and the clients' public keys `client-K.pub`;
    `client-K/` holds `server.pem` and the client's private `client.key`.

    Args:
        folder: made new.
        hosts: names or addresses under which clients reach the server; this machine's own are added.
        clients: number of clients.
        days: validity of the certificate.

    Raises:
        UserError: the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds something already: name a new folder, old keys are not written over")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _certificate(key, [*hosts, "localhost", "127.0.0.1"], days).public_bytes(Encoding.PEM)
    _write(folder / "server" / "server.pem", certificate)
    _write(folder / "server" / "server.key", _private(key, PrivateFormat.PKCS8))
    for k in range(clients):
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        _write(folder / f"client-{k}" / "server.pem", certificate)
        _write(folder / f"client-{k}" / "client.key", _private(key, PrivateFormat.OpenSSH))
        _write(folder / "server" / f"client-{k}.pub", public + b"\n")


def read(folder: Path, *names: str) -> list[Path]:
    """Return the paths of some files of keys.

    Raises:
        UserError: one is missing.
    """
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is not there: make all keys with `fmfl flower keys FOLDER`")
    return [folder / name for name in names]


def _certificate(key: ec.EllipticCurvePrivateKey, hosts: list[str], days: int) -> x509.Certificate:
    """Sign a certificate for a server with its own key."""
    hosts = list(dict.fromkeys(hosts))
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, hosts[0])])
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # a client's clock may be late
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(map(_general_name, hosts)), critical=False)
        .sign(key, SHA256())
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey, kind: PrivateFormat) -> bytes:
    return key.private_bytes(Encoding.PEM, kind, NoEncryption())


def _write(file: Path, content: bytes) -> None:
    """Write a new file that its owner alone can read."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(content)
