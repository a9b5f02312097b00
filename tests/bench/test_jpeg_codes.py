"""`benchmarks/jpeg_codes.py`: headers and tables of JPEGs, and kernels that decode their codes side by side.

A decoder that takes one bit after the other is the specification.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
from importlib import util
from itertools import islice
from operator import and_
from pathlib import Path

import pytest
from PIL import Image

from nopad.preprocessing.jpegs import check_jpeg

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LANE_BITS = 256
PROGRAM = """
import json, sys
from pathlib import Path
from jpeg_kernels import decode, verdicts
from jpeg_scan import pack, read_scan
lane_bits, sweeps = map(int, sys.argv[2:])
batch = pack([read_scan(path.read_bytes()) for path in sorted(Path(sys.argv[1]).iterdir())], lane_bits)
lanes = decode(batch, lane_bits, sweeps=sweeps, lanes_per_program=4096)
print(json.dumps([lanes.states.tolist(), verdicts(batch, lanes, lane_bits).tolist()]))
"""


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The files of the benchmark that need neither Triton nor an encoder, imported as its script imports them."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        global jpeg_samples, jpeg_scan
        jpeg_samples, jpeg_scan = map(importlib.import_module, ("jpeg_samples", "jpeg_scan"))
        yield
    finally:
        sys.path.remove(str(BENCHMARKS))


class Decoder:
    """Reads the codes of a scan, bit by bit."""

    def __init__(self, scan):
        self.bits = "".join(f"{byte:08b}" for byte in scan.codes)
        self.position = self.block = self.coefficient = self.num_blocks = 0
        self.scan, self.codes = scan, [codes_of(table) for table in scan.tables]

    def step(self) -> None:
        """Decode a code and the value behind it."""
        luma = self.block < self.scan.num_luma
        codes = self.codes[(0 if luma else 2) + (self.coefficient > 0)]
        length = next(n for n in range(1, 17) if self.bits[self.position : self.position + n] in codes)
        symbol = codes[self.bits[self.position : self.position + length]]
        self.position += length + symbol % 16
        if self.coefficient == 0:
            self.coefficient = 1
        else:
            self.coefficient = 64 if symbol == 0 else self.coefficient + symbol // 16 + 1
        assert self.coefficient <= 64
        if self.coefficient == 64:
            self.coefficient = 0
            self.num_blocks += 1
            self.block = (self.block + 1) % self.scan.period


def codes_of(table: bytes) -> dict[str, int]:
    codes, code, symbols = {}, 0, iter(table[16:])
    for length, count in enumerate(table[:16], 1):
        for symbol in islice(symbols, count):
            codes[f"{code:0{length}b}"] = symbol
            code += 1
        code *= 2
    return codes


def decoded(scan) -> list[int]:
    """The states at the ends of all lanes but the last, of a scan that is whole."""
    decoder, states = Decoder(scan), []
    for end in range(LANE_BITS, len(decoder.bits) - 7, LANE_BITS):
        while decoder.position < end:
            decoder.step()
        states.append(decoder.position - end | decoder.coefficient << 5 | decoder.block << 11)
    while decoder.num_blocks < scan.num_blocks:
        decoder.step()
    assert decoder.coefficient == 0
    assert 0 <= len(decoder.bits) - decoder.position <= 7
    return states


def whole_files() -> list[bytes]:
    return list(islice(jpeg_samples.small_files(), 0, None, 7))


def test_codes_and_tables_decode_to_all_blocks():
    scans = [jpeg_scan.read_scan(data) for data in whole_files()]
    assert None not in scans
    assert {scan.period for scan in scans} >= {3, 4, 6}
    assert sum(map(len, map(decoded, scans))) > 300


def test_tables_look_up_what_their_codes_are():
    for data in whole_files():
        scan = jpeg_scan.read_scan(data)
        for table, is_dc in zip(scan.tables, (True, False, True, False), strict=True):
            lookup, codes = jpeg_scan.lookup_table(table, is_dc), codes_of(table)
            for code, symbol in codes.items():
                first = int(code.ljust(16, "0"), 2)
                for bits in (first, int(code.ljust(16, "1"), 2)):
                    is_long = bits >= lookup.threshold
                    entry = lookup.entries[512 + bits - lookup.threshold if is_long else bits >> 7]
                    assert entry & 31 == len(code) + symbol % 16
                    assert entry >> 8 & 127 == (1 if is_dc else 64 if symbol == 0 else symbol // 16 + 1)
                    assert entry >> 16 == (0 if is_dc or symbol == 0 else symbol // 16 + 1 + (symbol == 0xF0))
            assert lookup.entries[-1] >> 16 > 64  # ones alone are no code


def test_values_that_no_8_bit_image_has_are_refused():
    counts = bytes([0, 3, *[0] * 14])
    for symbols, is_dc in ((b"\x0b\x0c\x0f", True), (b"\x0a\x0b\x10", False)):
        entries = jpeg_scan.lookup_table(counts + symbols, is_dc).entries
        assert [entry >> 16 > 64 for entry in entries[:512:128]] == [False, True, True, True]


@pytest.mark.parametrize(
    ("counts", "symbols"), [([2], [1, 2]), ([0, 4], [1, 2, 3, 4]), ([1, 3], [1, 2, 3, 4]), ([0], []), ([1, 1], [3, 16])]
)
def test_tables_that_libjpeg_refuses_are_refused(counts, symbols):
    assert jpeg_scan.lookup_table(bytes([*counts, *[0] * (16 - len(counts)), *symbols]), True) is None


def test_scan_of_one_pair_of_tables_has_a_period_of_one():
    data = jpeg_samples.encoded(Image.new("RGB", (40, 24)))
    selectors = data.index(b"\xff\xda") + 6
    same = bytearray(data)
    same[selectors + 2] = same[selectors + 4] = same[selectors]
    scan = jpeg_scan.read_scan(bytes(same))
    assert (scan.period, scan.num_luma, scan.num_blocks) == (1, 1, 6 * 6)


REFUSED = {
    "cut": lambda data: data[:-40],
    "marker": lambda data: data[:-20] + b"\xff\xd0" + data[-20:],
    "0xFF before the end": lambda data: data[:-2] + b"\xff" + data[-2:],
    "second scan behind the end": lambda data: data + b"\xff\xda",
    "bytes between segments": lambda data: data.replace(b"\xff\xdb", b"\0\xff\xdb", 1),
    "restarts": lambda data: data.replace(b"\xff\xdb", b"\xff\xdd\0\4\0\1\xff\xdb", 1),
    "no quantisation": lambda data: data.replace(b"\xff\xdb\0\x43\1", b"\xff\xdb\0\x43\2"),
    "extended": lambda data: data.replace(b"\xff\xc0", b"\xff\xc1"),
    "12 bits": lambda data: data.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "version": lambda data: data.replace(b"JFIF\0\1", b"JFIF\0\2"),
    "spectral selection": lambda data: data.replace(b"\0\x3f\0", b"\0\x3e\0"),
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_files_that_the_cpu_has_to_check_are_refused(change):
    data = jpeg_samples.encoded(jpeg_samples.small(Image.effect_noise((99, 99), 50).convert("RGB"), random.Random(0)))
    assert jpeg_scan.read_scan(data) is not None
    assert jpeg_scan.read_scan(change(data)) is None


def test_batch_has_each_table_once_and_every_code():
    scans = [jpeg_scan.read_scan(data) for data in whole_files()]
    batch = jpeg_scan.pack(scans, LANE_BITS)
    assert batch.num_lanes == sum(len(decoded(scan)) + 1 for scan in scans)
    for scan, (first, bits, *_) in zip(scans, batch.files.tolist(), strict=True):
        assert batch.data[4 * first : 4 * first + bits // 8].numpy().tobytes() == scan.codes
        assert not batch.data[4 * first + bits // 8 :][:4].any()
    assert len(jpeg_scan.pack(scans[:1] * 5, LANE_BITS).tables) == len(jpeg_scan.pack(scans[:1], LANE_BITS).tables)
    with pytest.raises(ValueError, match="lane_bits: got 32"):
        jpeg_scan.pack(scans, 32)


def test_damage_is_of_every_kind():
    data = whole_files()[0]
    draw = random.Random(0)
    damaged = [jpeg_samples.damage(data, draw) for _ in range(200)]
    lengths = {(len(file) > len(data)) - (len(file) < len(data)) for file in damaged}
    assert lengths == {-1, 0, 1}
    assert 20 < sum(check_jpeg(file, max_pixels=1 << 20) is None for file in damaged) < 200


def run_kernels(files, folder, sweeps):
    """States and verdicts by the kernels, in Triton's interpreter, for which a process has to be started."""
    for index, data in enumerate(files):
        (folder / f"{index:04}.jpg").write_bytes(data)
    paths = os.pathsep.join([str(BENCHMARKS), *filter(None, sys.path)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(LANE_BITS), str(sweeps)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


with_triton = pytest.mark.skipif(util.find_spec("triton") is None, reason="Triton is not installed: pip install triton")


@with_triton
def test_lanes_decode_what_one_decoder_does(tmp_path):
    files = whole_files()
    states, verdicts = run_kernels(files, tmp_path, 16)
    first, compared = 0, 0
    for data, verdict in zip(files, verdicts, strict=True):
        expected = decoded(jpeg_scan.read_scan(data))
        if verdict == 0:
            assert states[first : first + len(expected)] == expected
            compared += len(expected)
        first += len(expected) + 1
    assert set(verdicts) <= {0, 1}  # some do not settle
    assert compared > 0.8 * (first - len(files))


@with_triton
def test_no_file_is_clean_that_libjpeg_complains_of(tmp_path):
    damaged = list(jpeg_samples.damaged_files(120))
    damaged = [data for data in damaged if jpeg_scan.read_scan(data) is not None]
    _, verdicts = run_kernels(damaged, tmp_path, 12)
    clean = [verdict == 0 for verdict in verdicts]
    complaints = [check_jpeg(data, max_pixels=1 << 20) is None for data in damaged]
    assert not any(map(and_, clean, complaints))
    assert sum(clean) > 5
    assert sum(complaints) > 20
