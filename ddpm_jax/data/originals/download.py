"""Download files from their publishers, and believe them once the published checksum is right."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from ddpm_jax.errors import DataError
from ddpm_jax.progress import Progress

_BLOCK = 2**20

# Where sets are published: address -> checksum.
_CIFAR10 = "https://www.cs.toronto.edu/~kriz/"
CIFAR10_FILES = {
    f"{_CIFAR10}cifar-10-python.tar.gz": "md5:c58f30108f718f92721af3b95e74349a",
}
_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
MNIST_FILES = {
    f"{_MNIST}train-images-idx3-ubyte.gz": (
        "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    f"{_MNIST}train-labels-idx1-ubyte.gz": (
        "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    f"{_MNIST}t10k-images-idx3-ubyte.gz": (
        "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    f"{_MNIST}t10k-labels-idx1-ubyte.gz": (
        "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
}
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_FILES = {
    f"{_FASHION}train-images-idx3-ubyte.gz": (
        "sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
    ),
    f"{_FASHION}train-labels-idx1-ubyte.gz": (
        "sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
    ),
    f"{_FASHION}t10k-images-idx3-ubyte.gz": (
        "sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
    ),
    f"{_FASHION}t10k-labels-idx1-ubyte.gz": (
        "sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
    ),
}


def download(
    url: str, folder: str | Path, checksum: str, timeout: float = 60.0, argument: str = "source"
) -> Path:
    """Fetch the file behind `url` into `folder`, unless it lies there whole.

    It grows under the name NAME.part and is renamed once its checksum is right, so a file NAME is
    always whole.

    Args:
      url: http(s) or ftp; its last part names the file.
      folder: made if need be.
      checksum: "md5:..." or "sha256:...", in hexadecimal; its first digits where no more are
        published.
      timeout: seconds without a byte after which the connection counts as broken.
      argument: the name of what takes the file, for messages, if the user fetches it.

    Raises:
      DataError: no network, a broken connection, or another checksum.
    """
    folder = Path(folder)
    target = folder / url.rsplit("/", 1)[-1]
    algorithm, expected = checksum.split(":")
    if target.is_file() and _digest(target, algorithm).startswith(expected):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".part")
    by_hand = f"fetch {url} by other means and name the file, {argument}=FILE"
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response, open(partial, "wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            with Progress(total or None, unit="byte") as progress:
                while block := response.read(_BLOCK):
                    file.write(block)
                    progress.update(len(block), of=target.name)
            received = file.tell()
    except urllib.error.HTTPError as error:
        error.close()
        raise DataError(
            f"{url} cannot be downloaded ({error.code} {error.reason}): {by_hand}"
        ) from error
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        TimeoutError,
        ConnectionError,
    ) as error:
        reason = getattr(error, "reason", error)
        raise DataError(
            f"{url} cannot be downloaded ({reason}): try again, or {by_hand}"
        ) from error
    if received < total:
        raise DataError(
            f"{url} broke off after {received:,} of {total:,} bytes: try again, or {by_hand}"
        )
    if not _digest(partial, algorithm).startswith(expected):
        partial.unlink()
        raise DataError(
            f"{url} is not the published file (its {algorithm} differs): try again, or {by_hand}"
        )
    os.replace(partial, target)
    return target


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
