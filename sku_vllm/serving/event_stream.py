"""Server-sent events (WHATWG HTML, section 9.2) as they come from another server: cut into events, and one with other data put together."""

from collections.abc import AsyncIterator, Sequence


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[tuple[list[bytes], bytes]]:
    """The lines of each event, comments included, and what ended it: an empty line, or b"" where the stream did.

    Lines end in LF, CR LF or CR, in any mixture, and may be of any length. An empty line on its own is an event without lines.
    """
    rest, lines = b"", list[bytes]()
    async for chunk in chunks:
        pieces = (rest + chunk).splitlines(keepends=True)
        # A line may go on in the next chunk, and after a CR its LF may come there.
        rest = pieces.pop() if pieces and not pieces[-1].endswith(b"\n") else b""
        for piece in pieces:
            line = piece.rstrip(b"\r\n")
            if line:
                lines.append(line)
            else:
                yield lines, b"\n"
                lines = []
    left = rest.rstrip(b"\r\n")
    if left or lines:
        yield [*lines, *([left] if left else [])], b"" if left else b"\n"


def data_of(lines: Sequence[bytes]) -> bytes:
    """An event's data: that of its lines `data:`, joined as they would be by any reader."""
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))


def with_data(lines: Sequence[bytes], data: bytes) -> list[bytes]:
    """An event's lines with this data, on one line in place of the first."""
    first = next(number for number, line in enumerate(lines) if line.startswith(b"data:"))
    others = [line for line in lines[first + 1 :] if not line.startswith(b"data:")]
    return [*lines[:first], b"data: " + data, *others]


def encoded(lines: Sequence[bytes], end: bytes) -> bytes:
    """An event as it is sent on."""
    return b"".join(line + b"\n" for line in lines) + end
