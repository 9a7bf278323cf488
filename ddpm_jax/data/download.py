"""Files from their publishers, never believed before their published checksum is right."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from ddpm_jax.data.errors import DataError
from ddpm_jax.progress import Progress

_BLOCK = 2**20


def download(url: str, folder: str | Path, checksum: str, timeout: float = 60.0, option: str = "--source") -> Path:
    """The file behind `url`, in `folder`; nothing is fetched if it lies there whole.

    It grows under the name NAME.part and is renamed once its checksum is right, so a file NAME is always whole.

    Args:
      url: http(s) or ftp; its last part names the file.
      folder: made if need be.
      checksum: "md5:..." or "sha256:...", in hexadecimal; its first digits where no more are published.
      timeout: seconds without a byte after which the connection counts as broken.
      option: the flag that takes the file if the user fetches it.

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
    by_hand = f"fetch {url} by other means and pass {option}"
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
        raise DataError(f"{url} cannot be downloaded ({error.code} {error.reason}): {by_hand}") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise DataError(f"{url} cannot be downloaded ({reason}): try again, or {by_hand}") from error
    if received < total:
        raise DataError(f"{url} broke off after {received:,} of {total:,} bytes: try again, or {by_hand}")
    if not _digest(partial, algorithm).startswith(expected):
        partial.unlink()
        raise DataError(f"{url} is not the published file (its {algorithm} differs): try again, or {by_hand}")
    os.replace(partial, target)
    return target


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
