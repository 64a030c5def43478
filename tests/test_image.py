"""Pictures of every mode become the RGB that a person would see, and bad ones become one line."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps

from mmadapter import image as image_module
from mmadapter.image import IMAGE_SUFFIXES, check_image, load_image

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def near(pixel: tuple, expected: tuple, tolerance: int = 0) -> bool:
    return max(abs(got - wanted) for got, wanted in zip(pixel, expected, strict=True)) <= tolerance


def from_bytes(mode: str, data: bytes) -> Image.Image:
    return Image.frombytes(mode, (1, 1), data)


def palette(*colours: tuple, mode: str = "P") -> Image.Image:
    image = Image.new(mode, (2, 2))
    image.putpalette([channel for colour in colours for channel in colour])
    return image


MODES = {
    "1": (Image.new("1", (2, 2), 1), WHITE, 0),
    "L": (Image.new("L", (2, 2), 77), (77, 77, 77), 0),
    "LA": (Image.new("LA", (2, 2), (0, 128)), (127, 127, 127), 0),
    "La": (Image.new("LA", (2, 2), (0, 128)).convert("La"), (127, 127, 127), 0),
    "P": (palette(RED, BLUE), RED, 0),
    "RGB": (Image.new("RGB", (2, 2), RED), RED, 0),
    "RGBA": (Image.new("RGBA", (2, 2), (255, 0, 0, 128)), (255, 127, 127), 0),
    "RGBa": (Image.new("RGBA", (2, 2), (255, 0, 0, 128)).convert("RGBa"), (255, 127, 127), 1),
    "RGBX": (Image.new("RGBX", (2, 2), (255, 0, 0, 9)), RED, 0),
    "PA": (Image.new("RGBA", (2, 2), (255, 0, 0, 0)).convert("PA"), WHITE, 0),
    "CMYK": (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), RED, 0),
    "YCbCr": (Image.new("YCbCr", (2, 2), (76, 85, 255)), RED, 1),
    "HSV": (Image.new("HSV", (2, 2), (0, 255, 255)), RED, 0),
    "LAB": (Image.new("LAB", (2, 2), (138, 209, 198)), RED, 1),
    "I;16": (from_bytes("I;16", struct.pack("<H", 32768)), (128, 128, 128), 0),
    "I;16B": (from_bytes("I;16B", struct.pack(">H", 32768)), (128, 128, 128), 0),
    "I 16 bit": (Image.new("I", (2, 2), 65535), WHITE, 0),
    "I 8 bit": (Image.new("I", (2, 2), 200), (200, 200, 200), 0),
    "F 0..1": (Image.new("F", (2, 2), 0.5), (128, 128, 128), 0),
    "F 0..255": (Image.new("F", (2, 2), 200.0), (200, 200, 200), 0),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_shows_its_colour(name: str) -> None:
    source, expected, tolerance = MODES[name]
    loaded = load_image(source)
    assert loaded.mode == "RGB"
    assert loaded.size == source.size
    assert near(loaded.getpixel((0, 0)), expected, tolerance), loaded.getpixel((0, 0))


def test_lab_is_the_inverse_of_the_colour_conversion() -> None:
    """Pillow's own convert() refuses LAB; the pixel above must be what littlecms makes of red."""
    red = Image.new("RGB", (1, 1), RED)
    lab = ImageCms.profileToProfile(
        red, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert near(load_image(lab).getpixel((0, 0)), RED, 1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0, 257, 65535]], [0, 1, 255]),
        ([[0, 128, 255]], [0, 128, 255]),
        ([[0, 100000, 200000]], [0, 128, 255]),
        ([[-100, 0, 100]], [0, 128, 255]),
    ],
)
def test_integer_pixels_are_scaled_not_clipped(values: list, expected: list) -> None:
    """Pillow clips mode I at 255, which turns most 16-bit pictures white."""
    image = Image.fromarray(np.array(values, dtype=np.int32))
    assert image.mode == "I"
    assert np.asarray(load_image(image))[0, :, 0].tolist() == expected


def test_float_pixels_that_are_not_finite_are_black() -> None:
    image = Image.fromarray(np.array([[np.nan, np.inf, 1.0]], dtype=np.float32))
    assert np.asarray(load_image(image))[0, :, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_files(form: str) -> None:
    ramp = np.array([[0, 32768, 65535]], dtype=np.uint16)
    loaded = load_image(encoded(Image.fromarray(ramp), form))
    assert np.asarray(loaded)[0, :, 1].tolist() == [0, 128, 255]


def test_sixteen_bit_transparent_value_is_white() -> None:
    image = Image.fromarray(np.array([[0, 32768]], dtype=np.uint16))
    image.info["transparency"] = 0
    assert np.asarray(load_image(image))[0, :, 0].tolist() == [255, 128]


def test_palette_with_transparency() -> None:
    image = palette(RED, BLUE, GREEN)
    image.putpixel((1, 0), 1)
    for file in (encoded(image, transparency=0), encoded(image, "GIF", transparency=0)):
        loaded = load_image(file)
        assert loaded.getpixel((0, 0)) == WHITE  # red, were the transparency lost; black in many converters
        assert loaded.getpixel((1, 0)) == BLUE


def test_palette_with_partial_transparency() -> None:
    loaded = load_image(encoded(palette(RED, BLUE), transparency=bytes([128, 255])))
    assert near(loaded.getpixel((0, 0)), (255, 127, 127))


@pytest.mark.parametrize(("mode", "colour"), [("RGB", RED), ("L", 10), ("1", 0)])
def test_one_transparent_colour(mode: str, colour: object) -> None:
    """A tRNS chunk names one colour of a PNG without alpha."""
    loaded = load_image(encoded(Image.new(mode, (2, 2), colour), transparency=colour))
    assert loaded.getpixel((0, 0)) == WHITE


def test_cmyk_jpeg_is_not_inverted() -> None:
    """CMYK JPEGs of Adobe's programs store inverted values and say so in a marker."""
    file = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in file
    assert near(load_image(file).getpixel((8, 8)), RED, 3)


def oriented(orientation: int, form: str = "PNG") -> bytes:
    """Three pixels across, two down: red, green and blue above black, white and black."""
    image = Image.new("RGB", (3, 2))
    image.putdata([RED, GREEN, BLUE, BLACK, WHITE, BLACK])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(image, form, exif=exif)


def test_orientation_6_turns_clockwise() -> None:
    """Phones held upright write orientation 6: the left edge of the file is the top of the picture."""
    loaded = load_image(oriented(6))
    assert loaded.size == (2, 3)
    assert [loaded.getpixel((x, y)) for y in range(3) for x in range(2)] == [BLACK, RED, WHITE, GREEN, BLACK, BLUE]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_orientation_is_applied_once(form: str, orientation: int) -> None:
    """Pillow turns TIFFs itself while decoding; and a loaded picture must not be turned again when loaded again."""
    file = oriented(orientation, form)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file))))
    loaded = load_image(file)
    assert np.array_equal(np.asarray(loaded), expected)
    assert np.array_equal(np.asarray(load_image(loaded)), expected)


def test_orientation_of_a_pillow_image_leaves_it_alone() -> None:
    source = Image.open(io.BytesIO(oriented(6)))
    assert load_image(source).size == (2, 3)
    assert source.size == (3, 2)


def test_damaged_exif_does_not_matter() -> None:
    file = encoded(Image.new("RGB", (2, 2), RED), exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(file).getpixel((0, 0)) == RED


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(form: str) -> None:
    first, *others = (Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE))
    options = {"lossless": True} if form == "WEBP" else {}
    loaded = load_image(encoded(first, form, save_all=True, append_images=others, **options))
    assert loaded.getpixel((4, 4)) == RED


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((2, 3), 7, np.uint8), (7, 7, 7)),
        (np.full((2, 3, 1), 7, np.uint8), (7, 7, 7)),
        (np.tile(np.array([1, 2, 3], np.uint8), (2, 3, 1)), (1, 2, 3)),
        (np.tile(np.array([255, 0, 0, 128], np.uint8), (2, 3, 1)), (255, 127, 127)),
        (np.tile(np.array([0.0, 0.5, 1.0]), (2, 3, 1)), (0, 128, 255)),
        (np.full((2, 3), 32768, np.uint16), (128, 128, 128)),
        (np.full((2, 3), 32768, ">u2"), (128, 128, 128)),
        (np.ones((2, 3), bool), WHITE),
        (np.tile(np.array([1, 2, 3], np.uint8), (2, 3, 1))[:, :, ::-1], (3, 2, 1)),
    ],
)
def test_arrays(array: np.ndarray, expected: tuple) -> None:
    before = array.copy()
    loaded = load_image(array)
    assert loaded.mode == "RGB"
    assert loaded.size == (3, 2)
    assert loaded.getpixel((2, 1)) == expected
    assert np.array_equal(array, before)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 9), np.uint8), r"channels last.*\(3, 8, 9\)"),
        (np.zeros((1, 2, 3, 3), np.uint8), "H x W"),
        (np.zeros((2, 2), np.int64), "int64"),
        (np.full((2, 2), 255.0), "from 0 to 1, got 255"),
        (np.full((2, 2), np.nan), "from 0 to 1, got nan"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
    ],
)
def test_wrong_arrays(array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_image(array)


def test_all_sources_agree(tmp_path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(array).save(path)
    for source in (path, str(path), path.read_bytes(), Image.open(path), array):
        assert np.array_equal(np.asarray(load_image(source)), array)


def test_missing_file_folder_and_other_files(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg not found"):
        load_image(tmp_path / "nowhere.jpg")
    with pytest.raises(FileNotFoundError, match="not found"):
        load_image("a\0b.jpg")
    with pytest.raises(ValueError, match="is a folder"):
        load_image(str(tmp_path))
    text = tmp_path / "notes.jpg"
    for content in (b"", b"hello, I am not an image"):
        text.write_bytes(content)
        with pytest.raises(ValueError, match=r"notes\.jpg is not an image"):
            load_image(text)
    with pytest.raises(ValueError, match="the image is not an image"):
        load_image(b"hello")
    with pytest.raises(ValueError, match="got int"):
        load_image(3)
    with pytest.raises(ValueError, match="no pixels: 0 x 5"):
        load_image(Image.new("RGB", (0, 5)))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM"])
def test_truncated_files(form: str, tmp_path) -> None:
    """Half of a JPEG must not become half of a picture above grey."""
    path = tmp_path / "half.img"
    data = encoded(NOISE, form)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"half\.img is (damaged|not an image)") as error:
        load_image(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_files_give_a_picture_or_one_line(form: str) -> None:
    """Pillow's decoders raise a dozen kinds of errors on damaged files; a batch must survive all of them."""
    data, generator = encoded(NOISE, form), np.random.default_rng(1)
    messages = []
    for _ in range(40):
        damaged = bytearray(data)
        for position in generator.integers(0, min(len(data), 600), 8):
            damaged[position] = generator.integers(0, 256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own remarks on damaged metadata
            try:
                assert load_image(bytes(damaged)).mode == "RGB"
            except ValueError as error:
                messages.append(str(error))
    assert messages  # else nothing was tried
    assert not any("\n" in message for message in messages)


def huge_png(width: int, height: int) -> bytes:
    """The header of a PNG of that size, with next to no data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_too_many_pixels_are_refused_before_decoding(side: int) -> None:
    """Pillow warns at the smaller size and raises an error of its own at the larger."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"the image has .*more than the 128000000 pixels allowed"):
            load_image(huge_png(side, side))


def test_large_pictures_below_the_limit_give_no_warning(monkeypatch) -> None:
    """Between Pillow's limit and ours a picture is fine; Pillow would print a warning about an attack."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(encoded(NOISE)).size == (64, 64)
    monkeypatch.setattr(image_module, "MAX_PIXELS", 4095)
    for source in (encoded(NOISE), NOISE, np.asarray(NOISE)):
        with pytest.raises(ValueError, match="64 x 64 pixels, more than the 4095"):
            load_image(source)


def test_suffixes_are_lower_case_and_start_with_a_dot() -> None:
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in IMAGE_SUFFIXES)
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"} <= set(IMAGE_SUFFIXES)


# What is checked before training must be what training meets: the same pictures refused, in the same words.


def test_a_checked_picture_is_refused_in_the_words_of_load_image(tmp_path) -> None:
    """Damaged and cut files of many kinds; a JPEG decoded small must still be read to its end."""
    generator = np.random.default_rng(2)
    path = tmp_path / "photo.img"
    outcomes = []
    photo = NOISE.resize((160, 120))
    forms = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("WEBP", {}), ("TIFF", {})]
    for form, options in forms:
        data = encoded(photo, form, **options)
        for attempt in range(24):
            damaged = bytearray(data)
            if attempt % 2:
                damaged = damaged[: generator.integers(1, len(data))]
            else:
                for position in generator.integers(0, min(len(data), 900), 4):
                    damaged[position] = generator.integers(0, 256)
            path.write_bytes(bytes(damaged))
            said = []
            for read in (load_image, check_image):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Pillow's own remarks on damaged metadata
                    try:
                        read(path)
                        said.append("")
                    except ValueError as error:
                        said.append(str(error))
            assert said[0] == said[1]
            outcomes.append(said[1])
    assert "" in outcomes
    assert len(set(outcomes)) > 3


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_cut_at_its_end_is_found_by_the_check(mode: str, tmp_path) -> None:
    path = tmp_path / "photo.jpg"
    data = encoded(NOISE.resize((640, 480)).convert(mode), "JPEG")
    path.write_bytes(data)
    assert check_image(path) is None
    path.write_bytes(data[:-2000])
    with pytest.raises(ValueError, match=r"photo\.jpg is damaged or cut short"):
        check_image(str(path))


def test_a_check_refuses_what_is_too_large_before_decoding(tmp_path, monkeypatch) -> None:
    """The small size that a JPEG is decoded at must not hide how large it is."""
    path = tmp_path / "large.png"
    path.write_bytes(huge_png(12_000, 12_000))
    with pytest.raises(ValueError, match=r"large\.png has 12000 x 12000 pixels, more than the 128000000"):
        check_image(path)
    monkeypatch.setattr(image_module, "MAX_PIXELS", 4095)
    NOISE.save(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match="64 x 64 pixels, more than the 4095"):
        check_image(tmp_path / "photo.jpg")


def test_a_check_of_no_file(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg not found"):
        check_image(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match="is a folder"):
        check_image(tmp_path)


def test_a_jpeg_is_checked_at_a_small_size(tmp_path, monkeypatch) -> None:
    """Else checking costs what loading costs."""
    sizes = []
    to_rgb = image_module._to_rgb
    monkeypatch.setattr(image_module, "_to_rgb", lambda image: (sizes.append(image.size), to_rgb(image))[1])
    NOISE.resize((640, 480)).save(tmp_path / "photo.jpg")
    check_image(tmp_path / "photo.jpg")
    assert sizes == [(80, 60)]
    assert load_image(tmp_path / "photo.jpg").size == (640, 480)
