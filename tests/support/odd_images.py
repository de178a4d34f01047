"""Image files in memory, among them one that is too large."""
import io
import struct
import zlib


def saved(image, file_format='PNG', **kwargs):
    file = io.BytesIO()
    image.save(file, file_format, **kwargs)
    file.seek(0)
    return file


def huge_png(side=20_000):
    """The head of an image of 400 megapixels, which would decompress from a few bytes."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    head = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(bytes(100)))
            + chunk(b'IEND', b''))
