"""Kinds of image files: which are read, how each becomes 8 bits of grey or colour, and what is said of it."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from data import made
from vitreous.base.errors import DataError
from vitreous.data import decoding, open_data
from vitreous.data.decoding import AVIF, SUFFIXES, Unreadable, decode, decode_with_notes, is_image

GREYS = np.random.default_rng(0).integers(0, 256, (12, 16), np.uint16)
GREYS[0, :2] = 0, 255


def tiff(values, photometric, **tags):
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    directory[262] = photometric
    return made.encoded(Image.fromarray(values), "TIFF", tiffinfo=directory, **tags)


def bands(count, bits=8, photometric=2, size=4):
    """A TIFF of so many interleaved bands, byte by byte, as tools of remote sensing write it."""
    data = bytes(range(1, 1 + count)) * size * size if bits == 8 else b"\1\0" * count * size * size
    extra = [(338, 3, [0] * max(count - 3, 1))]
    tags = [(256, 3, [size]), (257, 3, [size]), (258, 3, [bits] * count), (259, 3, [1]), (262, 3, [photometric])]
    tags += [(273, 4, [0]), (277, 3, [count]), (278, 3, [size]), (279, 4, [len(data)]), *extra]
    end = 8 + 2 + 12 * len(tags) + 4
    long, entries = b"", b""
    for tag, kind, values in tags:
        raw = b"".join(value.to_bytes(2 if kind == 3 else 4, "little") for value in values)
        if tag == 273:
            at = len(entries) + 8
        if len(raw) > 4:
            long, raw = long + raw, (end + len(long)).to_bytes(4, "little")
        entries += (
            tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + len(values).to_bytes(4, "little") + raw.ljust(4, b"\0")
        )
    entries = entries[:at] + (end + len(long)).to_bytes(4, "little") + entries[at + 4 :]
    return b"II*\0" + (8).to_bytes(4, "little") + len(tags).to_bytes(2, "little") + entries + bytes(4) + long + data


@pytest.mark.parametrize(
    ("name", "raw", "note"),
    [
        ("a.png", made.encoded(Image.fromarray(GREYS * 257)), "16 bits, upper 8 kept"),
        ("a.png", made.encoded(Image.fromarray(GREYS * 16 + 3)), "12 bits in 16, upper 8 of the 12 kept"),
        ("a.png", made.encoded(Image.fromarray(GREYS)), "8 bits in 16, upper 8 empty"),
        ("a.tif", tiff(GREYS * 257, 1), "16 bits, upper 8 kept"),
        ("a.pgm", b"P5\n16 12\n65535\n" + (GREYS * 257).astype(">u2").tobytes(), "16 bits, upper 8 kept"),
        ("a.pgm", b"P5\n16 12\n255\n" + GREYS.astype(np.uint8).tobytes(), None),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_greys_of_any_depth_are_the_same_picture(name, raw, note, channels):
    image, notes = decode_with_notes(raw, name, channels)
    np.testing.assert_array_equal(np.asarray(image if channels == 1 else image.getchannel(1)), GREYS)
    assert notes == ((note,) if note else ())
    assert decode(raw, name, channels).tobytes() == image.tobytes()


@pytest.mark.parametrize(("scale", "top"), [(257, 65535), (16, 4095), (1, 255)])
def test_white_is_zero_is_inverted_at_every_depth(scale, top):
    image, notes = decode_with_notes(tiff(top - GREYS * scale, 0), "a.tif", 1)
    np.testing.assert_array_equal(np.asarray(image), GREYS)
    assert "white is zero, inverted" in notes
    eight = tiff(GREYS.astype(np.uint8), 0)  # Pillow inverts when it writes these, and when it reads
    np.testing.assert_array_equal(np.asarray(decode(eight, "a.tif", 1)), GREYS)


def sixteen_bit_colour(values):
    """A PNG of (H, W, 3) uint16, chunk by chunk: Pillow writes none."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
    ]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in [*chunks, (b"IEND", b"")]]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_sixteen_bits_of_colour_are_said_and_so_is_what_they_hide():
    colours = made.pixels(4).astype(np.uint16)
    image, notes = decode_with_notes(sixteen_bit_colour(colours * 257), "a.png", 3)
    np.testing.assert_array_equal(np.asarray(image), colours)
    assert notes == ("16 bits, upper 8 kept",)
    _, notes = decode_with_notes(sixteen_bit_colour(colours * 16), "a.png", 3)
    assert notes == ("16 bits, upper 8 kept", "nearly black: of 16 bits of colour the upper 4 are empty")


@pytest.mark.parametrize("count", [4, 5, 6])
def test_bands_beyond_colour_are_said(count):
    image, notes = decode_with_notes(bands(count), "a.tif", 3)
    assert np.asarray(image)[0, 0].tolist() == [1, 2, 3]
    assert notes == (f"{count} bands, the first 3 taken",)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (bands(7), "a TIFF of 7 bands of 8 bits, which Pillow does not read"),
        (bands(5, 16), "a TIFF of 5 bands of 16 bits"),
        (bands(4, photometric=1), "a TIFF of 4 bands"),
        (b"II*\0\x08\0\0\0\xff\xff", "a damaged TIFF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "an image of the kind heic, which Pillow does not read here"),
        (b"GIF", "not an image"),
    ],
)
def test_an_image_that_pillow_does_not_read_is_called_what_it_is(raw, reason):
    with pytest.raises(Unreadable) as error:
        decode(raw, "a.tif", 3)
    assert error.value.reason.startswith(reason)


@pytest.mark.parametrize("suffix", [suffix for suffixes in SUFFIXES.values() for suffix in suffixes])
def test_every_suffix_is_read_as_its_format(suffix):
    kind = next(name for name, suffixes in SUFFIXES.items() if suffix in suffixes)
    if kind == "AVIF" and not AVIF:
        pytest.skip("a Pillow without AVIF")
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    options = {"JPEG2000": {"no_jp2": suffix == ".j2k"}}.get(kind, {})
    image, notes = decode_with_notes(made.picture(3, (40, 30), kind=kind, **options), f"X{suffix.upper()}", 3)
    assert (image.mode, image.size, notes) == ("RGB", (40, 30), ("palette, converted",) if kind == "GIF" else ())
    assert is_image(f"photos/x{suffix}")
    assert not is_image(f".x{suffix}")


def test_thirty_two_bits_are_refused():
    with pytest.raises(DataError, match="it has 32 bits per pixel"):
        decode(made.encoded(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), "a.tif", 1)


def test_heic_is_read_by_the_extra_and_turned_as_it_says(tmp_path, monkeypatch):
    pytest.importorskip("pillow_heif").register_heif_opener()
    image = Image.new("RGB", (40, 30), (200, 10, 10))
    image.paste((10, 10, 200), (0, 0, 20, 30))
    found = np.asarray(decode(made.encoded(image, "HEIF", quality=95), "x.heic", 3))
    assert found.shape == (30, 40, 3)
    assert np.abs(found[15, [5, 35]].astype(int) - [[10, 10, 200], [200, 10, 10]]).max() < 12
    assert np.asarray(decode(made.encoded(image, "HEIF"), "x.heic", 1)).shape == (30, 40)


def test_without_the_extra_the_way_to_it_is_said(tmp_path, monkeypatch):
    """As Pillow is without it: files are passed over and counted, and one under another suffix is called what it is."""
    monkeypatch.setattr(decoding, "HEIF", False)
    for suffix in decoding.SUFFIXES["HEIF"]:
        monkeypatch.delitem(decoding.FORMAT_OF, suffix, raising=False)
    with pytest.raises(Unreadable, match=r'kind heic, .* \(HEIC is read with pip install "vitreous\[heic\]"\)'):
        decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "x.jpg", 3)
    root = made.write(tmp_path, made.tree() | {"train/cat/x.HEIC": b"x"})
    assert '1 .heic. HEIC is read with pip install "vitreous[heic]".' in " ".join(open_data(str(root)).remarks)
