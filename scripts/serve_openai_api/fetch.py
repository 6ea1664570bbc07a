"""Fetch a picture that a request names, from public addresses only.

A client must not reach through this server what it cannot reach itself: the machine's own services,
its network, a cloud's metadata. So each address of the name is checked, and the connection goes to
an address that was checked, whatever the name means a moment later.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
from contextlib import suppress
from urllib.parse import urlsplit

from common.errors import BadSampleError
from common.files import check_size

SECONDS = 10  # that a picture may take, in all
# Where the public addresses of IPv6 are (RFC 4291). Beyond are private ones of earlier days, and
# several kinds that lead to an address of IPv4, which may be any.
PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
CHUNK = 2**16


def fetch(url: str, max_bytes: int) -> bytes:
    """The file at an http or https URL.

    BadSampleError with the reason where its address is not public, it redirects to another, it is
    too large, or too slow.
    """
    # where it is
    name = f"{url:.80}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise BadSampleError("image URL is wrong", f"{name} ({error})") from None
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise BadSampleError("image URL is wrong", f"{name}: it has to be https://NAME/...")
    address = find_address(host, port or {"http": 80, "https": 443}[parts.scheme])

    # fetch
    connection = CheckedConnection(host, address, parts.scheme == "https")
    timer = threading.Timer(SECONDS, connection.cut)
    timer.daemon = True
    timer.start()
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"User-Agent": "minimind-v"})
        response = connection.getresponse()
        if 300 <= response.status < 400:
            raise BadSampleError("image URL redirects", f"{name}: name the place itself")
        if response.status != 200:
            raise BadSampleError("image cannot be fetched", f"{name}: status {response.status}")
        body = read_body(response, max_bytes)
        # The end of a connection that was cut looks like that of the file.
        if connection.is_cut:
            raise TimeoutError
        return body
    except BadSampleError:
        raise
    # A name with odd characters, a server that breaks off: many kinds of errors.
    except (OSError, ValueError, http.client.HTTPException) as error:
        slow = f"not there within {SECONDS} s"
        reason = slow if connection.is_cut else f"{error!s:.100}" or type(error).__name__
        raise BadSampleError("image cannot be fetched", f"{name} ({reason})") from None
    finally:
        timer.cancel()
        connection.close()


def find_address(host: str, port: int) -> tuple:
    """(family, socket address) of a name; BadSampleError where any of its addresses is private."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise BadSampleError("image cannot be fetched", f"{host:.80} ({error!s:.100})") from None
    for *_, address in found:
        if not is_public(address[0]):
            raise BadSampleError(
                "image URL is not public", f"{host:.80} leads to a private or local address"
            )
    family, *_, address = found[0]
    return family, address


def is_public(address: str) -> bool:
    """Whether it is one of the internet, and stands for no other one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and (ip not in PUBLIC_IPV6 or ip.sixtofour or ip.teredo):
        return False
    return ip.is_global and not ip.is_multicast


class CheckedConnection(http.client.HTTPConnection):
    """A connection to one address, whatever the host's name means now.

    Args:
        host: name, for the server and its certificate.
        address: (family, socket address), see `find_address`.
        is_https: encrypt.
    """

    def __init__(self, host: str, address: tuple, is_https: bool):
        port = address[1][1]
        super().__init__(host, port, timeout=SECONDS)
        self.default_port = 443 if is_https else 80
        self.address, self.is_https, self.is_cut = address, is_https, False

    def connect(self) -> None:
        """Called by `request`."""
        family, address = self.address
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.settimeout(SECONDS)
        self.sock.connect(address)
        if self.is_https:
            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=self.host)
        # `cut` finds no socket to end while it is being made
        if self.is_cut:
            raise TimeoutError

    def cut(self) -> None:
        """End it, from another thread, whatever it waits for."""
        self.is_cut = True
        if self.sock is not None:
            # it may not be connected yet, or no longer
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


def read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """At most so many bytes."""
    body = bytearray()
    while chunk := response.read1(CHUNK):
        body += chunk
        check_size(len(body), "image", max_bytes)
    return bytes(body)
