"""A coded file is checked when it is read: what no encoder writes is one line, whatever it is."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from ddpm_jax.coding.container import FORMAT, Coded, Settings
from ddpm_jax.errors import CodingError

MODEL = {"weights": "ema", "step": 7, "sha256": "0" * 16, "computed_by": "jax"}
REMOVED = object()


def lossless(**changes: object) -> bytes:
    """A file of three images in one stack of 4 lanes, or one with another header."""
    settings = asdict(Settings(lanes=4))
    header = {"shape": [3, 8, 8, 1], "settings": settings, "model": MODEL, "borrowed": 0}
    return content(header, [bytes(32), bytes(6)], changes)


def progressive(**changes: object) -> bytes:
    """Three images in groups of two."""
    settings = asdict(Settings(method="progressive", group=2))
    header = {"shape": [3, 8, 8, 1], "settings": settings, "model": MODEL}
    return content(header, [bytes(5), bytes(8), bytes(2)] * 2, changes)


def content(header: dict, sections: list[bytes], changes: dict) -> bytes:
    header = {"format": FORMAT, "sections": [len(section) for section in sections]} | header
    header = {k: v for k, v in (header | changes).items() if v is not REMOVED}
    return json.dumps(header).encode() + b"\n" + b"".join(sections)


@pytest.mark.parametrize("make", [lossless, progressive])
def test_files_of_the_encoder_are_read_and_written_again(make) -> None:
    coded = Coded.from_bytes(make(), "x")
    assert json.loads(coded.to_bytes().split(b"\n")[0]) == json.loads(make().split(b"\n")[0])
    assert [len(section) for section in coded.sections] in ([32, 6], [5, 8, 2] * 2)
    assert coded.payload_bytes == sum(len(section) for section in coded.sections)


@pytest.mark.parametrize("make", [lossless, progressive])
@pytest.mark.parametrize(
    "field, value",
    [
        ("shape", REMOVED),
        ("shape", None),
        ("shape", 3),
        ("shape", [3, 8, 8]),
        ("shape", [0, 8, 8, 1]),
        ("shape", [3, 8, "8", 1]),
        ("shape", [2**40, 64, 64, 1]),
        ("settings", REMOVED),
        ("settings", [1]),
        ("settings", {"metod": "lossless"}),
        ("settings", {"method": "zip"}),
        ("settings", {"method": ["lossless"]}),
        ("settings", {"group": "20"}),
        ("settings", {"group": 0}),
        ("settings", {"group": 2**40}),
        ("settings", {"step_rate": None}),
        ("model", REMOVED),
        ("model", "ema"),
        ("sections", REMOVED),
        ("sections", 38),
        ("sections", []),
        ("sections", ["32", "6"]),
        ("sections", [32, 6, 0]),
        ("sections", [-1, 39]),
        ("sections", [31, 7]),
        ("sections", [24, 14]),
        ("sections", [5, 8, 2, 6, 7, 2]),
        ("sections", [5, 8, 3, 4, 8, 2]),
    ],
    ids=lambda value: "removed" if value is REMOVED else str(value),
)
def test_a_header_that_no_encoder_writes_is_one_line(make, field: str, value: object) -> None:
    with pytest.raises(CodingError, match="^x.ddpm: its header is damaged") as caught:
        Coded.from_bytes(make(**{field: value}), "x.ddpm")
    assert "make it anew with mode=encode" in str(caught.value) and "\n" not in str(caught.value)


def test_what_was_checked_is_what_a_decoder_gets() -> None:
    """JSON of others writes whole numbers as 8.0, which count as 8."""
    settings = asdict(Settings(lanes=4)) | {"lanes": 4.0, "group": 20.0}
    made = lossless(shape=[3.0, 8, 8, 1], settings=settings, borrowed=0.0)
    header = Coded.from_bytes(made, "x").header
    numbers = [
        *header["shape"],
        header["borrowed"],
        *map(header["settings"].get, ("group", "lanes")),
    ]
    assert numbers == [3, 8, 8, 1, 0, 20, 4] and {type(number) for number in numbers} == {int}


@pytest.mark.parametrize("value", [REMOVED, None, -1, "0"])
def test_what_a_stack_borrowed_must_be_there(value: object) -> None:
    with pytest.raises(CodingError, match="header is damaged .borrowed="):
        Coded.from_bytes(lossless(borrowed=value), "x")
    Coded.from_bytes(progressive(borrowed=value), "x")  # which borrows nothing


def test_settings_that_are_left_out_have_their_defaults() -> None:
    assert Settings.of({"lanes": 4, "step_rate": 1}) == Settings(lanes=4, step_rate=1.0)
